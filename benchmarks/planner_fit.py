"""The machine constants, fitted on the calibration half of the planner's measurements; the scores of both halves."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

MB = 2**20


def fit(jobs: list[dict[str, Any]], work: Path, constants: Path, out: Path) -> None:
    """Fits what has been measured of `jobs` and writes the constants, then scores with them and writes the result."""
    os.environ["FITOUT_HOME"] = str(work / "home")
    measured = [job for job in jobs if (work / f"{job['number']:03d}.json").exists()]
    for job in measured:
        job["measured"] = json.loads((work / f"{job['number']:03d}.json").read_text())
    calibration = [job for job in measured if not job["held_out"]]
    known = json.loads(constants.read_text())
    for precision in ("fp32", "bf16"):
        half = [job for job in calibration if job["recipe"]["train"]["precision"] == precision]
        known["memory"][precision] = _fit_memory(half, precision)
        known["time"][precision] = _fit_time(half)
    known["calibrated"] = {"configurations": len(calibration), **_machine()}
    constants.write_text(json.dumps(known, indent=1) + "\n")
    rows = [_scored(job) for job in measured]
    result = {
        "kind": "planner",
        "quick": False,
        "machine": _machine(),
        "scores": {half: _summary([row for row in rows if row["held_out"] == (half == "held out")])
                   for half in ("calibration", "held out")},
        "rows": rows,
    }  # fmt: skip
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["scores"], indent=1))


def _case(job: dict[str, Any]) -> tuple[Any, ...]:
    """(shape, cost, setup, work) of a measured training, as the planner sees them before it."""
    from fitout import config
    from fitout.data.batches import Batches
    from fitout.data.store import Part
    from fitout.model.shape import shape_of
    from fitout.plan.machine import machine
    from fitout.plan.planner import first_budget, setup_of
    from fitout.plan.work import work_of

    folder = Path(job["folder"])
    recipe = config.load(folder / "recipe.yaml")
    saved = 4 * shape_of({"model_type": "llama", **job["shape"]}).parameters  # the weights file is not kept
    shape = shape_of({"model_type": "llama", **job["shape"]}, file_bytes=saved, file_width=4)
    batches = Batches(Part(folder / "run" / "data" / "train.arrow"), batch_size=recipe.train.batch_size)
    batches.share = False
    work = work_of(batches, budget=first_budget(recipe.train, "cpu"), epochs=1, max_steps=recipe.train.max_steps)
    return shape, recipe.method.cost(shape), setup_of(recipe.train, recipe.train.precision, machine("cpu-64g")), work


BOUNDS = {  # of the memory's constants: what they can mean
    "overhead_mb": (0.0, 700.0), "layer": (1.0, 3.0), "chunks": (2.0, 4.0), "spread": (1.0, 1.4),
    "size_mb": (0.0, 40.0), "length_mb": (0.0, 10.0),
}  # fmt: skip


def _fit_memory(jobs: list[dict[str, Any]], precision: str) -> dict[str, float]:
    """A search over the constants for the least relative error; coarse steps, then finer ones. What the process takes
    with nothing but its weights loaded is measured apart and bounds the framework's part from below; fp32 compiles no
    kernels."""
    from fitout.plan import estimate

    cases = [(_case(job), job["measured"]["peak_mb"]) for job in jobs]
    bounds = {name: list(pair) for name, pair in BOUNDS.items()}
    bounds["overhead_mb"][0] = min(job["measured"]["loaded_mb"] - 4 * case[0].parameters / MB
                                   for job, (case, _) in zip(jobs, cases, strict=True))  # fmt: skip
    if precision == "fp32":
        bounds["size_mb"] = bounds["length_mb"] = [0.0, 0.0]
    found = {name: low for name, (low, _) in bounds.items()}
    steps = {name: (high - low) / 4 for name, (low, high) in bounds.items()}

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
                    low, high = bounds[name]
                    tried = {**found, name: min(high, max(low, found[name] + sign * step))}
                    if (now := error(tried)) < best - 1e-9:
                        found, best, moved = tried, now, True
        steps = {name: step / 2 for name, step in steps.items()}
    error(found)
    return {name: round(float(value), 3) for name, value in found.items()}


def _fit_time(jobs: list[dict[str, Any]]) -> dict[str, float]:
    """Non-negative weights of the features, least squares on relative errors of single steps; steps far off (another
    process, a page-out) count less."""
    from fitout.plan import estimate
    from fitout.plan.machine import machine

    speed, rows, measured = machine().speed, [], []
    for job in jobs:
        shape, cost, setup, work = _case(job)
        rows += [estimate.features(shape, cost, setup, *step, speed, fresh) for *step, fresh in _with_fresh(work)]
        measured += job["measured"]["seconds"][1:]
    names, seconds = list(rows[0]), np.array(measured)
    matrix = np.array([[row[name] for name in names] for row in rows])
    scale, trust = seconds, np.ones(len(rows))
    for _ in range(12):
        weights = _non_negative(matrix / scale[:, None] * trust[:, None], seconds / scale * trust)
        predicted = matrix @ weights
        scale = np.sqrt(seconds * predicted)  # ratios count alike whether over or under
        trust = 1 / np.sqrt(np.maximum(1, np.abs(np.log(predicted / seconds)) / 0.15))
    return {name: float(f"{weight:.4g}") for name, weight in zip(names, weights, strict=True)}


def _with_fresh(work: Any) -> list[tuple[Any, int]]:
    """The steps after the first, each with how many document lengths it meets for the first time."""
    known, found = set(), []
    for step in work.steps:
        lengths = {length for one in step for length in one.lengths}
        found.append((step, len(lengths - known)))
        known |= lengths
    return found[1:]


def _non_negative(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """min |M x - w| with x >= 0, by coordinate descent on columns scaled to one."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1
    m, x = matrix / scale, np.zeros(matrix.shape[1])
    left = wanted - m @ x
    for _ in range(20_000):
        for j in range(len(x)):
            step = max(-x[j], m[:, j] @ left)
            x[j] += step
            left -= step * m[:, j]
    return x / scale


def _scored(job: dict[str, Any]) -> dict[str, Any]:
    from fitout.plan import estimate
    from fitout.plan.machine import machine

    shape, cost, setup, work = case = _case(job)
    memory, speed = estimate.memory(*case), machine().speed
    weights = estimate.time_constants(setup)
    steps = [
        sum(weights[name] * value for name, value in found.items())
        for found in (estimate.features(shape, cost, setup, *step, speed, fresh) for *step, fresh in _with_fresh(work))
    ]
    seconds, measured = median(steps), median(job["measured"]["seconds"][1:])  # the first warms up
    return {
        "method": job["recipe"]["method"],
        "train": {k: job["recipe"]["train"][k] for k in
                  ("precision", "batch_size", "micro_batch_tokens", "gradient_checkpointing")},
        "shape": job["shape"],
        "parameters": shape.parameters,
        "largest_micro_batch": work.largest.tokens,
        "held_out": job["held_out"],
        "predicted": {"peak_mb": round(memory.peak / MB), "step_seconds": round(seconds, 4), "moment": memory.moment,
                      "terms_mb": {name: round(size / MB) for name, size in memory.terms.items()}},
        "measured": {"peak_mb": job["measured"]["peak_mb"], "step_seconds": round(measured, 4)},
    }  # fmt: skip


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"configurations": len(rows)}
    for what, key, target in (("memory", "peak_mb", 0.10), ("time", "step_seconds", 0.20)):
        errors = [row["predicted"][key] / row["measured"][key] - 1 for row in rows]
        sizes = sorted(abs(error) for error in errors)
        found[what] = {
            "median": round(median(sizes), 3),
            "ninety_percent_within": round(sizes[math.ceil(0.9 * len(sizes)) - 1], 3),
            "largest": round(sizes[-1], 3),
            "bias": round(float(np.mean(errors)), 3),
            "target": target,
            "within_target": sum(size <= target for size in sizes),
        }
    return found


def _machine() -> dict[str, Any]:
    from fitout.plan.machine import processor

    return {
        "processor": processor(), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": version("torch"), "transformers": version("transformers"), "when": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip
