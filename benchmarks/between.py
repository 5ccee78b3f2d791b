"""What lies between products on a CPU, in the three forms of fitout/model/between.py.

    python -m benchmarks.between --out benchmarks/results/between.json

1,088 tokens of a model 512 wide with 8 heads, feed-forward 1,376; 256 rows of 8,192 logits. Written out of PyTorch's
operations, in code of our own, and compiled as `train.compile: true` does. In turn, medians over ROUNDS in ms, after
results were seen to agree. `compile_s` is the time to the first results of all of them, with nothing compiled before.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._inductor import config as inductor

from fitout.model import between, native

from .against_trl import machine

TOKENS, WIDTH, HEADS, FFN, ROUNDS = 1088, 512, 8, 1376, 31
ROWS, VOCABULARY = 256, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    points = {str(kind).removeprefix("torch."): _compare(kind) for kind in (torch.float32, torch.bfloat16)}
    result = {"kind": "between", "quick": False, "machine": machine(), "points": points}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(points, indent=1))


def _compare(kind: torch.dtype) -> dict[str, Any]:
    assert native.why_not() is None
    torch.manual_seed(0)
    torch._dynamo.reset()
    inductor.force_disable_caches = True
    gate, up, grad = (torch.randn(1, TOKENS, FFN).to(kind) for _ in range(3))
    x, weight = torch.randn(1, TOKENS, WIDTH).to(kind), torch.ones(WIDTH, dtype=kind)
    heads = x.view(1, TOKENS, HEADS, -1).transpose(1, 2)
    cos, sin = (torch.randn(1, 1, TOKENS, WIDTH // HEADS).to(kind) for _ in range(2))
    logits, targets, weights = torch.randn(ROWS, VOCABULARY).to(kind), torch.arange(ROWS)[:, None], torch.rand(ROWS)
    again = logits.clone()  # which the loss overwrites

    def calls(form: between.Between) -> dict[str, Callable[[], Any]]:
        return {
            "gated activation": lambda: form.gated(gate, up),
            "backward of the activation": lambda: form.gated_slopes(grad, gate, up, None),
            "norm": lambda: form.norm(x, weight, 1e-5)[0],
            "backward of the norm": lambda: form.norm_slope(
                x, x, weight, weight.new_ones(1, TOKENS, 1, dtype=torch.float32)
            ),
            "rotation": lambda: form.turned(heads, cos, sin),
            "loss and its gradient": lambda: form.loss_slopes(again.copy_(logits), targets, weights, kind)[1],
        }

    forms = {"written": between.WRITTEN, "native": between.NATIVE, "compiled": between.compiled()}
    sides = {name: calls(form) for name, form in forms.items()}
    began = time.perf_counter()
    for function in sides["compiled"].values():
        function()
    found: dict[str, Any] = {"compile_s": round(time.perf_counter() - began, 1)}
    for what, written in sides["written"].items():
        for side in ("native", "compiled"):
            own = copy.deepcopy(written())  # the loss is written where the next one will be
            torch.testing.assert_close(own, sides[side][what](), atol=3e-2, rtol=3e-2)
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, functions in sides.items():
                start = time.perf_counter()
                functions[what]()
                seconds[side].append(time.perf_counter() - start)
        found[what] = {side: round(1000 * statistics.median(taken), 3) for side, taken in seconds.items()}
    return found


if __name__ == "__main__":
    main()
