"""Fitout's side, one process: `python -m benchmarks.side_fitout FOLDER OUT`. Runs `fitout.verbs.train`."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .against_trl import SPEED
from .work import peak_mb


class Stopwatch:
    """A listener that notes when each step ended, its loss, and the memory peak so far."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.peaks: list[float] = []

    def start(self, info: dict[str, Any]) -> None: ...

    def row(self, row: dict[str, Any]) -> None:
        if "event" not in row:
            self.ends.append(time.time())
            self.losses.append(row["loss"])
            self.peaks.append(peak_mb())

    def close(self) -> None: ...


def main(folder: Path, out: Path) -> None:
    from fitout import config, verbs

    watch = Stopwatch()
    run = out.with_suffix(".run")
    shutil.copytree(folder / "prepared", run)
    layouts = _record_layouts()
    recipe = config.load(folder / "recipe.yaml")
    trained = verbs.train(recipe, out=run, resume=True, screen=verbs.Screen(listeners=lambda: [watch]))
    told = trained.read_status()["training"]
    shutil.rmtree(run)
    audit = [_hash(step) for step in layouts]
    computed = [sum(layout.tokens for layout in step) for step in layouts]
    out.write_text(
        json.dumps({"ends": watch.ends, "losses": watch.losses, "peaks": watch.peaks, "hashes": audit,
                    "computed": computed, **{key: told[key] for key in SPEED if key in told}})
    )  # fmt: skip


def _record_layouts() -> list[list[Any]]:
    """Keeps the very layouts that each optimizer step is computed on, to hash them afterwards."""
    from fitout.train import loop

    seen: list[list[Any]] = []
    original = loop.train_step

    def train_step(model: Any, objective: Any, layouts: Any, *rest: Any) -> Any:
        seen.append(list(layouts))
        return original(model, objective, layouts, *rest)

    loop.train_step = train_step
    return seen


def _hash(layouts: list[Any]) -> str:
    """Reads the samples back: a sample is the way from the root to the segment that holds its last trained token."""
    import numpy as np

    from .work import hash_step

    rows = []
    for layout in layouts:
        segments = layout.segments
        owner = np.repeat(np.arange(len(segments)), [segment.length for segment in segments])
        for sample in np.unique(layout.target_sample):
            its = layout.target_sample == sample
            at, token = layout.target_at[its], layout.target_token[its][layout.target_at[its].argmax()]
            end = int(owner[at.max()])
            if at.max() + 1 == segments[end].end:  # predicted at the end of a trunk: the branch that begins with it
                [end] = [n for n, s in enumerate(segments) if s.parent == end and layout.ids[s.start] == token]
            line: list[int] = []
            while end >= 0:
                line = [*range(segments[end].start, segments[end].end), *line]
                end = segments[end].parent
            trained = {place + 1 for place in np.searchsorted(line, at).tolist()}
            rows.append((tuple(layout.ids[line].tolist()), tuple(place in trained for place in range(len(line)))))
    return hash_step(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
