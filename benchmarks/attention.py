"""Attention of one document on a CPU, forward and backward: in tiles of matrix products, and by PyTorch's kernel.

    python -m benchmarks.attention --out benchmarks/results/attention.json

In turn; medians over ROUNDS, with the largest relative error of output and gradients against the same in double
precision. `taken` is which of the two Fitout takes for that shape. `kept_mb` is by how much the process grows for each
of many lengths in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitout.layout import Segment
from fitout.model import tiles
from fitout.model.attention import packed_attention
from fitout.model.precision import has_bf16
from fitout.plan.machine import resident

from .against_trl import machine

HEADS = ((8, 8, 64), (9, 3, 64), (16, 8, 128))  # of queries, of keys, numbers of each
LENGTHS = (128, 200, 264, 400, 512, 768, 1024, 2048)
ROUNDS, WARMUP = 15, 2
SIDES = {"tiles": (0, 1 << 30), "kernel": (math.inf, 1024)}  # what tiles.ENOUGH and LONG_WIDE are for them
KEPT = range(641, 1001, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    kept = {side: _kept(side) for side in SIDES}  # first, while the process has nothing that it could use again
    print(kept)
    torch.ones(7 << 20)  # as a training does: glibc then keeps what tiles give back, instead of clearing it anew
    points = []
    for heads, keys, width in HEADS:
        for kind in (torch.float32, torch.bfloat16):
            for length in LENGTHS:
                points.append(_compare(heads, keys, width, length, kind))
                print(points[-1], flush=True)
    result = {"kind": "attention", "quick": False, "machine": machine(), "points": points, "kept_mb": kept}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


def _compare(heads: int, keys: int, width: int, length: int, kind: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    shapes = [(1, length, n, width) for n in (heads, keys, keys)]
    leaves = [torch.randn(shape).to(kind).transpose(1, 2).requires_grad_() for shape in shapes]
    slope = torch.randn(1, length, heads, width).to(kind)
    exact = _exact(leaves, slope)
    chosen = tiles.ENOUGH, tiles.NARROW, tiles.LONG_WIDE
    computed = [x if has_bf16() else x.float() for x in leaves[:2]]
    taken = "tiles" if tiles.pays(*computed) else "kernel"
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    errors: dict[str, float] = {}
    for _ in range(WARMUP + ROUNDS):
        for side in SIDES:
            _take(side)
            start = time.perf_counter()
            found = _outcome(leaves, slope)
            seconds[side].append(time.perf_counter() - start)
            errors[side] = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
    tiles.ENOUGH, tiles.NARROW, tiles.LONG_WIDE = chosen
    return {
        "heads": heads, "key_heads": keys, "width": width, "length": length, "type": str(kind).removeprefix("torch."),
        "ms": {side: round(statistics.median(times[WARMUP:]) * 1000, 3) for side, times in seconds.items()},
        "largest_error": errors, "taken": taken,
    }  # fmt: skip


def _take(side: str) -> None:
    enough, longest = SIDES[side]
    tiles.ENOUGH, tiles.NARROW, tiles.LONG_WIDE = dict.fromkeys(tiles.ENOUGH, enough), 0, longest


def _kept(side: str) -> float:
    """MB for each of KEPT lengths, of 8 heads of 64."""
    chosen = tiles.ENOUGH, tiles.NARROW, tiles.LONG_WIDE
    _take(side)
    before = 0
    for number, length in enumerate((KEPT[-1], *KEPT[:-1])):
        leaves = [torch.randn(1, 8, length, 64).bfloat16().requires_grad_() for _ in range(3)]
        _outcome(leaves, torch.randn(1, length, 8, 64).bfloat16())
        before = before if number else resident()
    tiles.ENOUGH, tiles.NARROW, tiles.LONG_WIDE = chosen
    return round((resident() - before) / (len(KEPT) - 1) / 2**20, 2)


def _outcome(leaves: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    out, _ = packed_attention(torch.nn.Module(), *leaves, None, segments=(Segment(0, slope.shape[1]),))
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def _exact(leaves: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out = F.scaled_dot_product_attention(*doubles, is_causal=True, enable_gqa=True).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, doubles, slope.double())]


if __name__ == "__main__":
    main()
