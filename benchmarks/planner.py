"""How far the planner is off: random models trained through fitout.verbs.train against what was predicted before.

    python -m benchmarks.planner measure --seed 41 --seconds 100     # again until it says that all are measured
    python -m benchmarks.planner fit --seed 41                       # the memory's constants, on these measurements
    python -m benchmarks.planner measure --seed N --seconds 100      # a seed that nothing was looked at with
    python -m benchmarks.planner score --seed N                      # what the runs said beforehand against measured

Llama shapes from 1 M to 135 M parameters, every method there is, fp32 and bf16, short and long samples, small and
large micro-batches. `score` takes the predictions that each run wrote into its run.json before it began. Measure on a
quiet machine: nothing else may compute meanwhile. This process imports no heavy library while it measures: what it
holds would count in its children's peaks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
QUIET = 0.15  # cores that other processes may keep busy; else the measurement is thrown away
SECONDS = 10.0  # of computing that a configuration may take, guessed from its FLOPs
STEPS = 6
RATES = {"fp32": 80e9, "bf16": 180e9, "slow bf16": 3e9}  # FLOP/s, for that guess
METHODS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "full", "last_layers": 2},
    {"kind": "lora", "rank": 16},
    {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
    {"kind": "dora", "rank": 16},
    {"kind": "qlora", "rank": 16},
    {"kind": "adapter", "style": "pfeiffer", "reduction": 8},
    {"kind": "adapter", "style": "houlsby", "reduction": 16},
    {"kind": "sparse", "density": 0.01, "select": "gradient"},
    {"kind": "sparse", "density": 0.05, "select": "random"},
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit", "score"))
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=44, help="configurations")
    parser.add_argument("--seconds", type=float, default=100, help="stop measuring after so long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "planner-cpu.json")
    asked = parser.parse_args()
    jobs = grid(asked.seed, asked.count)
    if asked.what == "measure":
        measure(jobs, asked.seconds)
        return
    from .planner_fit import fit, score

    if asked.what == "fit":
        fit(jobs, CONSTANTS)
    else:
        score(jobs, asked.seed, asked.out)


def grid(seed: int, count: int) -> list[dict[str, Any]]:
    """The configurations, the same at every call: each method in turn, every third round in bf16."""
    rng = random.Random(seed)
    jobs = []
    for number in range(count):
        turn, at = divmod(number, len(METHODS))
        jobs.append(_job(seed, number, METHODS[at], "bf16" if turn % 3 == 1 else "fp32", rng))
    return jobs


def _job(seed: int, number: int, method: dict[str, Any], precision: str, rng: random.Random) -> dict[str, Any]:
    words = rng.choice((30, 90, 90, 200))
    each = 6 * words * 1.6 * (STEPS + 1)  # FLOPs of a row and parameter
    most = SECONDS * RATES["slow bf16" if precision == "bf16" and not has_bf16() else precision] / each
    shape = _shape(rng, most)
    batch = max(1, min(16, int(most / parameters(shape))))
    folder = WORK / str(seed) / f"{number:03d}"
    train = {
        "max_steps": STEPS, "batch_size": batch, "precision": precision, "listeners": [], "save_every": 1000,
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
        "number": number, "folder": str(folder), "seed": 1000 * seed + number, "rows": max(50, batch * (STEPS + 1)),
        "words": words, "max_words": 550, "shape": shape, "recipe": recipe,
    }  # fmt: skip


def has_bf16() -> bool:
    """Whether the processor has products in bf16."""
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _shape(rng: random.Random, most: float) -> dict[str, Any]:
    """A Llama of a size drawn evenly on a logarithmic scale between 1 and 135 M parameters (or `most`)."""
    target = math.exp(rng.uniform(math.log(1e6), math.log(min(135e6, most))))
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


def measure(jobs: list[dict[str, Any]], limit: float) -> None:
    """Measures what is not measured yet, until the time is over."""
    start = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    while left := [job for job in jobs if not result(job).exists()]:
        for job in (portion := left[:4]):
            shutil.rmtree(job["folder"], ignore_errors=True)
        (WORK / "jobs.json").write_text(json.dumps(portion))
        _child("make", str(WORK / "jobs.json"))
        for job in portion:
            if time.monotonic() - start > limit:
                print(f"{len([j for j in jobs if not result(j).exists()])} of {len(jobs)} are left: run again")
                return
            _child(job["folder"], str(result(job)))
            for part in ("base/model.safetensors", "run/checkpoints", "run/adapter", "run/model"):
                path = Path(job["folder"]) / part
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            found = json.loads(result(job).read_text())
            if found["others"] > QUIET:
                result(job).unlink()  # measured again in the next round
            plan = found["plan"]
            told = [f"{key} {plan['predicted'][key]} / {plan['measured'][key]}" for key in ("peak_mb", "step_seconds")]
            size = f"{parameters(job['shape']) / 1e6:.1f}M"
            train = job["recipe"]["train"]
            print(job["number"], job["recipe"]["method"], train["precision"], size, *told,
                  f"others {found['others']}, whole {found['whole_seconds']} s", flush=True)  # fmt: skip
    print("all are measured")


def result(job: dict[str, Any]) -> Path:
    return Path(job["folder"] + ".json")


def _child(*arguments: str) -> None:
    command = [sys.executable, "-m", "benchmarks.planner_side", *arguments]
    environment = {**os.environ, "FITOUT_HOME": str(WORK / "home")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])


if __name__ == "__main__":
    main()
