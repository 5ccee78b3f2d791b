"""One of two ranks: trains every method under test, as test_ranks.py does in one process, and writes what came out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from safetensors.torch import save_file

from fitout.train.backend import Backend
from fitout.train.loop import fit

from .small import CPU, METHODS_UNDER_TEST, adapted, job_of, random_part, trained_tensors


def outcome(folder: Path, kind: str):
    """Trained tensors and the method's state after eight steps."""
    model, method = adapted(
        METHODS_UNDER_TEST[kind], seed=5 + int(os.environ.get("RANK", 0))
    )  # the main rank's start is what counts
    job = job_of(folder, model, random_part(folder, 26), total=8, lr=3e-3, method=method)
    fit(job, Backend(CPU), [])
    return trained_tensors(model) | method.state(model)


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    for kind in METHODS_UNDER_TEST:
        save_file(outcome(folder / kind / rank, kind), folder / f"{kind}-{rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
