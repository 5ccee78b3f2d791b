"""How far the planner is off: random models trained through fitout.verbs.train against what was predicted before.

    python -m benchmarks.planner measure --seconds 100     # again until it says that all are measured
    python -m benchmarks.planner fit --out benchmarks/results/planner-cpu.json

Llama shapes from 1 M to 135 M parameters, every method there is, fp32 and bf16, short and long samples, small and
large micro-batches, in turn for calibration and held out. `fit` fits the machine constants of
fitout/plan/constants.json on the calibration half only, and scores both halves. Measure on a quiet machine: nothing
else may compute meanwhile. This process imports no heavy library while it measures: what it holds would count in its
children's peaks.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "planner"
CONSTANTS = ROOT / "fitout" / "plan" / "constants.json"
COUNT, SEED = 56, 11
SECONDS = 9.0  # of computing that a configuration may take, guessed from its FLOPs
METHODS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "lora", "rank": 16},
    {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
    {"kind": "lora", "rank": 64},
    {"kind": "dora", "rank": 16},
    {"kind": "qlora", "rank": 16},
    {"kind": "adapter", "style": "pfeiffer", "reduction": 8},
    {"kind": "adapter", "style": "houlsby", "reduction": 16},
    {"kind": "sparse", "density": 0.01},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("--seconds", type=float, default=100, help="stop measuring after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "planner-cpu.json")
    asked = parser.parse_args()
    if asked.what == "measure":
        measure(asked.seconds)
    else:
        from .planner_fit import fit

        fit(grid(), WORK, CONSTANTS, asked.out)


def grid() -> list[dict[str, Any]]:
    """The configurations, the same at every call; every other one of a method and precision is held out."""
    from fitout.model.methods import METHODS as SETTINGS

    kinds = {settings.model_fields["kind"].default for settings in SETTINGS}
    methods = [method for method in METHODS if method["kind"] in kinds]
    rng, seen, jobs = random.Random(SEED), {}, []
    for number in range(COUNT):
        method = methods[number % len(methods)]
        precision = ("fp32", "bf16")[number // len(methods) % 2]
        turn = seen[method["kind"], precision] = seen.get((method["kind"], precision), -1) + 1
        jobs.append(_job(number, method, precision, rng) | {"held_out": bool(turn % 2)})
    return jobs


def _job(number: int, method: dict[str, Any], precision: str, rng: random.Random) -> dict[str, Any]:
    shape = _shape(rng)
    words = rng.choice((30, 90, 90, 200))
    size = parameters(shape)
    steps = 5
    most = SECONDS * (120e9 if precision == "fp32" else 180e9) / (6 * size * words * 1.6 * (steps + 1))
    batch = max(1, min(16, int(most)))
    folder = WORK / f"{number:03d}"
    train = {
        "max_steps": steps, "batch_size": batch, "precision": precision, "listeners": [], "save_every": 1000,
        "micro_batch_tokens": rng.choice(("auto", "auto", 512, 1024, 4096)), "evaluate_every": 1000,
        "gradient_checkpointing": rng.random() < 0.15,
    }  # fmt: skip
    recipe = {
        "name": "planned",
        "model": {"base": str(folder / "base")},
        "data": {
            "sources": [{"path": str(folder / "rows.jsonl"), "format": "alpaca"}], "max_length": 1024,
            "split": {"train": 0.98, "validation": 0.02, "test": 0.0},
        },
        "method": method,
        "train": train,
    }  # fmt: skip
    return {
        "number": number, "folder": str(folder), "seed": number, "rows": max(50, batch * (steps + 1)), "words": words,
        "max_words": 550, "shape": shape, "recipe": recipe,
    }  # fmt: skip


def _shape(rng: random.Random) -> dict[str, Any]:
    """A Llama of a size drawn evenly on a logarithmic scale between 1 and 135 M parameters."""
    target = math.exp(rng.uniform(math.log(1e6), math.log(135e6)))
    best: dict[str, Any] = {}
    for _ in range(300):
        width = 64 * rng.randint(1, 14)
        heads = rng.choice([h for h in (1, 2, 3, 4, 6, 8, 9, 12) if width % h == 0 and 16 <= width // h <= 128])
        shape = {
            "hidden_size": width,
            "intermediate_size": 32 * round(width * rng.uniform(2, 4) / 32),
            "num_hidden_layers": rng.randint(2, 30),
            "num_attention_heads": heads,
            "num_key_value_heads": rng.choice([k for k in (2, 3, 4, 6, 8, 9, 12) if heads % k == 0] or [heads]),
            "vocab_size": rng.choice((4096, 8192, 16384, 32768, 49152)),
            "tie_word_embeddings": rng.random() < 0.7,
        }
        if not best or abs(math.log(parameters(shape) / target)) < abs(math.log(parameters(best) / target)):
            best = shape
    return best


def parameters(shape: dict[str, Any]) -> int:
    from fitout.model.shape import shape_of

    return shape_of({"model_type": "llama", **shape}).parameters


def measure(limit: float) -> None:
    """Measures what is not measured yet, until the time is over."""
    start, jobs = time.monotonic(), grid()
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "here").mkdir(exist_ok=True)
    while left := [job for job in jobs if not _result(job).exists()]:
        for job in (portion := left[:6]):
            shutil.rmtree(job["folder"], ignore_errors=True)
        (WORK / "jobs.json").write_text(json.dumps(portion))
        _child("make", str(WORK / "jobs.json"))
        for job in portion:
            if time.monotonic() - start > limit:
                print(f"{len([j for j in jobs if not _result(j).exists()])} of {len(jobs)} are left: run again")
                return
            _child(job["folder"], str(_result(job)))
            for part in ("base/model.safetensors", "run/checkpoints", "run/adapter", "run/model"):
                path = Path(job["folder"]) / part
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            found = json.loads(_result(job).read_text())
            print(job["number"], job["recipe"]["method"]["kind"], found["peak_mb"], found["seconds"], flush=True)
    print("all are measured")


def _result(job: dict[str, Any]) -> Path:
    return WORK / f"{job['number']:03d}.json"


def _child(*arguments: str) -> None:
    command = [sys.executable, "-m", "benchmarks.planner_side", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])


if __name__ == "__main__":
    main()
