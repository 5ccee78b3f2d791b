"""Matrix products of a model's sizes on a CPU: by the library that PyTorch asks, and as a training here has them.

    python -m benchmarks.products --out benchmarks/results/products.json

GFLOP/s of x W^T, g W and g^T x for 1,088 tokens, and for one, as in generating; in turn, medians over ROUNDS.
`largest_error` is that of x W^T against double precision, over the largest number. `onednn` is whether a training asks
oneDNN on this processor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fitout.model.precision import faster_products, onednn_multiplies

from .against_trl import machine

ROUNDS, WARMUP = 21, 4
SIZES = ((512, 512), (512, 1376), (1376, 512), (576, 1536), (2048, 2048))  # from, to
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with faster_products(CPU):
        onednn = onednn_multiplies()
    points = [_compare(1088, *size) for size in SIZES] + [_compare(1, 512, 1376)]
    result = {"kind": "products", "quick": False, "machine": machine(), "onednn": onednn, "points": points}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(points, indent=1))


def _compare(tokens: int, inputs: int, outputs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, w, g = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
    low = [one.bfloat16() for one in (x, w, g)]
    exact = x.double() @ w.double().t()
    sides: dict[str, tuple[Any, list[torch.Tensor]]] = {
        "pytorch, fp32": (nullcontext, [x, w, g]), "fitout, fp32": (lambda: faster_products(CPU), [x, w, g]),
        "bf16": (nullcontext, low),
    }  # fmt: skip
    seconds: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    errors = {}
    for _ in range(ROUNDS + WARMUP):
        for side, (setting, (a, b, c)) in sides.items():
            calls: dict[str, Callable[[], torch.Tensor]] = {
                "x W^T": lambda a=a, b=b: a @ b.t(), "g W": lambda b=b, c=c: c @ b, "g^T x": lambda a=a, c=c: c.t() @ a,
            }  # fmt: skip
            with setting():
                for what, call in calls.items():
                    start = time.perf_counter()
                    found = call()
                    seconds[side].setdefault(what, []).append(time.perf_counter() - start)
                    if what == "x W^T":
                        errors[side] = float((found.double() - exact).abs().max() / exact.abs().max())
    flops = 2 * tokens * inputs * outputs
    rates = {
        side: {what: round(flops / statistics.median(taken[WARMUP:]) / 1e9) for what, taken in each.items()}
        for side, each in seconds.items()
    }
    return {"tokens": tokens, "from": inputs, "to": outputs, "gflops": rates, "largest_error": errors}


if __name__ == "__main__":
    main()
