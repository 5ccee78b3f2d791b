"""The memory's constants, fitted on measured trainings; and the score of what runs predicted before they began."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from .planner import result

MB = 2**20
BOUNDS = {  # of the memory's constants: what they can mean
    "first_use_mb": (0.0, 150.0), "layer": (1.0, 3.0), "chunks": (2.0, 4.0), "spread": (1.0, 2.0),
}  # fmt: skip


def fit(jobs: list[dict[str, Any]], constants: Path) -> None:
    """Fits the memory's constants on what has been measured of `jobs` and writes them."""
    known = json.loads(constants.read_text())
    for precision in ("fp32", "bf16"):
        half = [job for job in _measured(jobs) if job["recipe"]["train"]["precision"] == precision]
        known["memory"][precision].update(_fit_memory(half, precision))
    known["calibrated"] = {"configurations": len(_measured(jobs)), **_machine()}
    constants.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(known["memory"], indent=1))


def score(jobs: list[dict[str, Any]], seed: int, out: Path) -> None:
    """Writes what the runs of `jobs` said beforehand beside what was measured."""
    rows = [_row(job) for job in _measured(jobs)]
    found = {"kind": "planner", "quick": False, "seed": seed, "machine": _machine(), "rows": rows}
    out.write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        off = [_off(row, key) for key in ("peak_mb", "step_seconds")]
        print(f"{row['name']:8} {row['train']['precision']} {row['parameters'] / 1e6:6.1f} M: memory {off[0]}, "
              f"time {off[1]}")  # fmt: skip


def _off(row: dict[str, Any], key: str) -> str:
    """No memory was measured where the rehearsal before a training of small steps took more than it."""
    there = row["measured"][key]
    return f"{row['predicted'][key] / there - 1:+.2f}" if there else "-"


def _measured(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [job | {"measured": json.loads(result(job).read_text())} for job in jobs if result(job).exists()]


def _case(job: dict[str, Any]) -> tuple[Any, ...]:
    """(shape, cost, setup, work) of a measured training, as the planner saw them before it."""
    from fitout import config
    from fitout.data.batches import Batches
    from fitout.data.store import Part
    from fitout.model.shape import shape_of
    from fitout.plan.machine import machine
    from fitout.plan.planner import first_budget, setup_of
    from fitout.plan.work import work_of

    folder = Path(job["folder"])
    recipe = config.load(folder / "recipe.yaml")
    values = {"model_type": "llama", **job["shape"]}
    shape = shape_of(values, file_bytes=4 * shape_of(values).parameters, file_width=4)  # the file itself is not kept
    batches = Batches(Part(folder / "run" / "data" / "train.arrow"), batch_size=recipe.train.batch_size)
    batches.share = False
    work = work_of(batches, budget=first_budget(recipe.train, "cpu"), epochs=1, max_steps=recipe.train.max_steps)
    return shape, recipe.method.cost(shape), setup_of(recipe.train, recipe.train.precision, machine("cpu-64g")), work


def _fit_memory(jobs: list[dict[str, Any]], precision: str) -> dict[str, float]:
    """A search over the constants for the least relative error; coarse steps, then finer ones. What the process held
    before is the run's own figure."""
    from fitout.plan import estimate

    cases = []
    for job in jobs:
        shape, cost, setup, work = _case(job)
        measured = job["measured"]
        held = measured["plan"]["resident_mb"] * MB
        cases.append(((shape, cost, replace(setup, resident=held), work), measured["peak_mb"]))
    found = {name: low for name, (low, _) in BOUNDS.items()}
    steps = {name: (high - low) / 4 for name, (low, high) in BOUNDS.items()}

    def error(values: dict[str, float]) -> float:
        estimate.constants()["memory"][precision].update(values)
        return sum(abs(np.log(estimate.memory(*case).peak / MB / peak)) ** 1.5 for case, peak in cases)

    best = error(found)
    for _ in range(8):
        moved = True
        while moved:
            moved = False
            for name, step in steps.items():
                for sign in (-1, 1):
                    low, high = BOUNDS[name]
                    tried = {**found, name: min(high, max(low, found[name] + sign * step))}
                    if (now := error(tried)) < best - 1e-9:
                        found, best, moved = tried, now, True
        steps = {name: step / 2 for name, step in steps.items()}
    return {name: round(float(value), 3) for name, value in found.items()}


def _row(job: dict[str, Any]) -> dict[str, Any]:
    plan, train = job["measured"]["plan"], job["recipe"]["train"]
    method = job["recipe"]["method"]
    return {
        "name": "freeze" if "last_layers" in method else method["kind"],
        "method": method,
        "train": {k: train[k] for k in ("precision", "batch_size", "micro_batch_tokens", "gradient_checkpointing")},
        "shape": job["shape"],
        "parameters": plan["parameters"],
        "predicted": plan["predicted"],
        "measured": plan["measured"],
        "others": job["measured"]["others"],
    }


def _machine() -> dict[str, Any]:
    import torch

    from fitout.plan.machine import processor

    return {
        "processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": version("torch"), "transformers": version("transformers"), "when": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
