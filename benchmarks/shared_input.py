"""LoRA layers that share an input (q, k, v; gate, up) as they are, and as one layer of stacked weights. Does that help?

    python -m benchmarks.shared_input --out benchmarks/results/shared-input.json

Stacked: one product with the frozen weights of all, one with all A, one for the gradient of the input; B stay apart.
Forward and backward, fp32, in turn; medians over ROUNDS, after gradients of both were seen to agree. `plain` is the
same without LoRA: what is left of a layer's time when all of LoRA costs nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitout.model.fused import lora_linear

from .against_trl import machine

RANK, SCALE, ROUNDS = 16, 2.0, 15
LAYERS = {
    "q, k, v of 512": (512, [512] * 3),
    "gate, up of 1,376": (512, [1376] * 2),
    "q, k, v of 576": (576, [576, 192, 192]),
}
TOKENS = (256, 1024, 4096)


class Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, sizes: tuple[int, ...]) -> Tensor:
        low = x @ a.t()
        out = F.linear(x, weight)
        for part, one, own in zip(out.split(sizes, 1), b.split(sizes), low.split(RANK, 1), strict=True):
            part.addmm_(own, one.t(), alpha=SCALE)
        ctx.save_for_backward(x, low, weight, a, b)
        ctx.sizes = sizes
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        parts = list(zip(grads[0].split(ctx.sizes, 1), b.split(ctx.sizes), low.split(RANK, 1), strict=True))
        grad_low = torch.cat([grad @ one for grad, one, _ in parts], 1).mul_(SCALE)
        grad_b = torch.cat([grad.t() @ own for grad, _, own in parts]).mul_(SCALE)
        return (grads[0] @ weight).addmm_(grad_low, a), None, grad_low.t() @ x, grad_b, None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    result: dict[str, Any] = {"kind": "shared input", "quick": False, "machine": machine(), "points": {}}
    for name, (width, sizes) in LAYERS.items():
        for tokens in TOKENS:
            found = measure(width, sizes, tokens)
            result["points"][f"{name}, {tokens:,} tokens"] = found
            print(name, tokens, {key: round(1000 * value, 2) for key, value in found.items()}, flush=True)
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(width: int, sizes: list[int], tokens: int) -> dict[str, float]:
    """Seconds forward and backward, by kind."""
    torch.manual_seed(0)
    x = torch.randn(tokens, width, requires_grad=True)
    weights = [torch.randn(size, width) / width**0.5 for size in sizes]
    a = [torch.randn(RANK, width, requires_grad=True) for _ in sizes]
    b = [torch.randn(size, RANK, requires_grad=True) for size in sizes]
    stacked = [torch.cat([one.detach() for one in parts]) for parts in (weights, a, b)]
    grads = [torch.randn(tokens, size) for size in sizes]
    ways: dict[str, Callable[[], list[Tensor]]] = {
        "apart": lambda: [lora_linear(x, w, None, *ab, SCALE) for w, *ab in zip(weights, a, b, strict=True)],
        "stacked": lambda: list(
            Stacked.apply(x, stacked[0], stacked[1].requires_grad_(), stacked[2].requires_grad_(), tuple(sizes)).split(
                sizes, 1
            )
        ),
        "plain": lambda: [F.linear(x, weight) for weight in weights],
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    seen = {}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            x.grad = None
            start = time.perf_counter()
            torch.autograd.backward(way(), grads)
            taken[name].append(time.perf_counter() - start)
            seen[name] = x.grad
    torch.testing.assert_close(seen["stacked"], seen["apart"], rtol=1e-4, atol=1e-3)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


if __name__ == "__main__":
    main()
