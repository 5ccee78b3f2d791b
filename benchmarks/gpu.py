"""Everything that only a GPU can show, unattended, in parts of under ten minutes each.

    python -m benchmarks.gpu --out FOLDER [--only PART ...]     on a machine with a CUDA card
    python -m benchmarks.gpu --out FOLDER --rehearse            tiny shapes, also on a CPU: do the commands run

A part that has its result in FOLDER is not done again, so the command is repeated until it says that all are there.
Nothing besides the repository is needed: models are random, texts are made up. TRL (with Liger where that is installed)
and transformers' Trainer are measured where they are installed.

    equal            losses and gradients of every method on the card beside the CPU's (`gpu_equal.py`)
    SHAPE-METHOD-DATA   as `against_trl`, in bf16: 0.5b, 1.5b and 8b shapes, blocks of 4,096 tokens and Alpaca lengths
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SECONDS = 570  # for a part
DATA = {"words": 4096, "lengths": 1024}  # and the tokens of a sample at most
PARTS = {
    "equal": [],
    **{
        f"{shape}-{method}-{data}": [shape, method, data]
        for shape, method in (("0.5b", "lora"), ("1.5b", "lora"), ("8b", "lora"), ("0.5b", "full"), ("1.5b", "full"))
        for data in DATA
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    left = []
    for name in asked.only:
        out = asked.out / f"gpu-{name}.json"
        if out.exists():
            continue
        try:
            code = subprocess.run(_command(name, out, asked.rehearse), timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
        print(f"{name}: {'done' if code == 0 else f'failed ({code})'}", flush=True)
        left += [name] if code else []
    print(f"left: {', '.join(left)}" if left else "all are there")
    return 1 if left else 0


def _command(name: str, out: Path, rehearse: bool) -> list[str]:
    python = [sys.executable, "-m"]
    if name == "equal":
        return [*python, "benchmarks.gpu_equal", "--out", str(out)]
    shape, method, data = PARTS[name]
    steps = ["--steps", "3", "--rounds", "1", "--warmup", "1"] if rehearse else ["--steps", "12", "--rounds", "2"]
    length = DATA[data] if not rehearse else 256
    sides = []
    if find_spec("trl") and find_spec("peft"):
        sides.append("trl best")
    if find_spec("accelerate") and (method == "full" or find_spec("peft")):
        sides.append("trainer best")
    best = "per=8,recompute=0,sort=1" if data == "lengths" else "per=2,recompute=0"
    liger = ",liger=1" if find_spec("liger_kernel") and not rehearse else ""
    return [
        *python, "benchmarks.against_trl", "--shape", "tiny" if rehearse else shape, "--method", method, "--data", data,
        "--length", str(length), "--precision", "fp32" if rehearse else "bf16", *steps,
        "--best", best + liger, "--out", str(out), "--sides", *sides,
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
