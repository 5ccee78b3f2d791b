"""Attention of documents on a CPU, forward and backward: by code of our own (model/native.py), and by PyTorch's kernel.

    python -m benchmarks.attention --out benchmarks/results/attention.json

In turn; medians over ROUNDS, with the largest relative error of output and gradients against the same in double
precision. A row of `tokens` tokens holds documents of one length; `pytorch` is F.scaled_dot_product_attention of each
by itself, `kernel` what Fitout does with PyTorch's kernel where its own code cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitout.layout import Segment
from fitout.model.attention import _Documents, _Native

from .against_trl import machine

HEADS = ((8, 8, 64), (9, 3, 64), (16, 8, 128))  # of queries, of keys, numbers of each
ROWS = ((1024, 64), (1056, 132), (1056, 264), (1024, 512), (1024, 1024), (2048, 2048), (4096, 4096))  # tokens, of each
ROUNDS, WARMUP = 11, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    points = []
    for heads, keys, width in HEADS:
        for kind in (torch.float32, torch.bfloat16):
            for tokens, length in ROWS:
                points.append(_compare(heads, keys, width, tokens, length, kind))
                print(points[-1], flush=True)
    result = {"kind": "attention", "quick": False, "machine": machine(), "points": points}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


def _compare(heads: int, keys: int, width: int, tokens: int, length: int, kind: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    segments, scale = tuple(Segment(at, at + length) for at in range(0, tokens, length)), width**-0.5
    shapes = [(1, tokens, n, width) for n in (heads, keys, keys)]
    leaves = [torch.randn(shape).to(kind).transpose(1, 2).requires_grad_() for shape in shapes]
    slope = torch.randn(1, tokens, heads, width).to(kind)
    sides: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *x: _Native.apply(*x, segments, scale, None),
        "kernel": lambda *x: _Documents.apply(*x, segments, scale),
        "pytorch": lambda *x: _one_by_one(*x, length=length),
    }
    exact = _outcome(sides["pytorch"], [x.detach().double().requires_grad_() for x in leaves], slope.double())
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    errors: dict[str, float] = {}
    for _ in range(WARMUP + ROUNDS):
        for side, attend in sides.items():
            start = time.perf_counter()
            found = _outcome(attend, leaves, slope)
            seconds[side].append(time.perf_counter() - start)
            errors[side] = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
    return {
        "heads": heads, "key_heads": keys, "width": width, "tokens": tokens, "length": length,
        "type": str(kind).removeprefix("torch."), "largest_error": errors,
        "ms": {side: round(statistics.median(times[WARMUP:]) * 1000, 3) for side, times in seconds.items()},
    }  # fmt: skip


def _outcome(attend: Callable[..., Tensor], leaves: Sequence[Tensor], slope: Tensor) -> list[Tensor]:
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, *, length: int) -> Tensor:
    parts = zip(*(x.split(length, 2) for x in (query, key, value)), strict=True)
    out = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(out, 2).transpose(1, 2)


if __name__ == "__main__":
    main()
