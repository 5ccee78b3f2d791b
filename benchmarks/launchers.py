"""One recipe started by every launcher that docs/parallel.md names, on two gloo ranks, against one process.

    python -m benchmarks.launchers --out benchmarks/results/launchers.json

Each must come to its end with exit code 0 on two ranks; the losses of all steps must be those of one process within
1e-5, every tensor of the adapter within 1e-4 (AdamW magnifies the rounding of entries whose gradient is nearly nothing;
benchmarks.engines compares to 1e-5 where there are none), none missing or empty. Takes some minutes: DeepSpeed compiles
at its first use. What starts on two machines is in benchmarks.two_machines.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .small import environment, machine, recipe, write

BIN = Path(sys.executable).parent
ACCELERATE = ["accelerate", "launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no"]  # fmt: skip
LAUNCHERS = {
    "fitout run --processes 2": ["fitout", "run", "RECIPE", "--processes", "2"],
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "fitout", "run", "RECIPE"],
    "accelerate launch --multi_gpu": [*ACCELERATE, "--multi_gpu", "-m", "fitout", "run", "RECIPE"],
    "accelerate launch --use_fsdp": [*ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "-m", "fitout", "run", "RECIPE"],
    "accelerate launch --use_deepspeed": [
        *ACCELERATE, "--use_deepspeed", "--zero_stage", "1", "-m", "fitout", "run", "RECIPE",
    ],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--module", "fitout", "run", "RECIPE"],
}  # fmt: skip
LOSS, ADAPTER = 1e-5, 1e-4
TRAINED = recipe(
    "launched",
    "rank: 8, alpha: 16, dropout: 0.0",
    "max_steps: 12, lr: 1.0e-3, save_every: 6, listeners: []",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--work", type=Path, default=Path("build/launchers"))
    asked = arguments.parse_args()
    work = asked.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    path = work / "recipe.yaml"
    path.write_text(TRAINED)
    one = work / "one"
    ended(start(["fitout", "run", str(path)], one), one)
    result: dict[str, Any] = {"machine": machine(1), "launchers": {}}
    for number, (name, words) in enumerate(LAUNCHERS.items()):
        run, began = work / str(number), time.monotonic()
        said = ended(start([str(path) if word == "RECIPE" else word for word in words], run), run)
        found = {
            "ranks": 2 if "2 ranks" in said else 1,
            **compare(run, one),
            "seconds": round(time.monotonic() - began),
        }
        result["launchers"][name] = found
        print(f"{name}: {found}", flush=True)
    write(asked.out, result)
    found = result["launchers"].values()
    sys.exit(not all(one["ranks"] == 2 and one["loss"] <= LOSS and one["adapter"] <= ADAPTER for one in found))


def start(command: list[str], run: Path) -> subprocess.Popen[str]:
    told = {"PATH": f"{BIN}:{os.environ['PATH']}", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [str(BIN / command[0]), *command[1:], "--out", str(run)], env=environment(**told), cwd=run.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], run: Path) -> str:
    """What it said, once it has ended well."""
    said = process.communicate(timeout=600)[0]
    if process.returncode:
        sys.exit(f"{run.name} ended with exit code {process.returncode}:\n{said[-4000:]}")
    return said


def compare(run: Path, one: Path) -> dict[str, Any]:
    """Losses and the adapter's tensors, against one process."""
    import torch
    from safetensors.torch import load_file

    gaps = [abs(a - b) for a, b in zip(losses(run), losses(one), strict=True)]
    name = "adapter/adapter_model.safetensors"
    mine, wanted = load_file(run / name), load_file(one / name)
    assert mine.keys() == wanted.keys()
    assert all(tensor.numel() and torch.isfinite(tensor).all() for tensor in mine.values())
    far = max(float((mine[key] - tensor).abs().max()) for key, tensor in wanted.items())
    return {"loss": max(gaps), "adapter": far}


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "event" not in row]


if __name__ == "__main__":
    main()
