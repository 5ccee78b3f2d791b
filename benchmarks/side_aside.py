"""Fitout's command line, with checkpoints written by a thread while the training goes on, as on a GPU:
`python -m benchmarks.side_aside run RECIPE --out RUN`."""

from __future__ import annotations

from fitout.cli.app import main
from fitout.train.backend import Backend

if __name__ == "__main__":
    Backend.saves_aside = property(lambda self: True)  # type: ignore[assignment]
    main()
