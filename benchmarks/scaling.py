"""How speed and memory change with a block's length and with LoRA's rank: Fitout and transformers' Trainer in turn.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json

Each point is what `against_trl` measures, with its parity; the protocol is in README.md. The number of rows is the
business of `preparing.py`: what a training step costs does not depend on it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from .against_trl import LENGTH, RANK, child, machine, parity, round_of

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
RANKS = (8, 16, 64, 256)
PEER = "trainer best"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=("30m", "135m"), default="30m")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    curves = {
        "length": [_point(asked, "blocks", RANK, length) for length in LENGTHS],
        "rank": [_point(asked, "alpaca", rank, LENGTH) for rank in RANKS],
    }
    result = {
        "kind": "scaling", "quick": False, "shape": asked.shape, "precision": asked.precision, "steps": asked.steps,
        "machine": machine(), "curves": curves,
    }  # fmt: skip
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


def _point(asked: argparse.Namespace, data: str, rank: int, length: int) -> dict[str, Any]:
    print(f"{data}, rank {rank}, length {length}", flush=True)
    per = max(1, 1024 // length) if data == "blocks" else 2  # blocks have no padding; 2 was best for Alpaca rows
    sides = {"fitout": None, PEER: f"per={per},recompute=0,sort=1,trainer=plain"}
    with tempfile.TemporaryDirectory(prefix="fitout-benchmark-") as name:
        folder = Path(name)
        child("work", folder, asked.shape, asked.precision, asked.steps, "lora", data, rank, length)
        work = json.loads((folder / "work.json").read_text())
        rounds = [round_of(folder, work, sides, 2, number) for number in range(asked.rounds)]
    return {"rank": rank, "length": length, "rounds": rounds, "parity": parity(rounds, PEER, work)}


if __name__ == "__main__":
    main()
