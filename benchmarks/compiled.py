"""What lies between a layer's products, in the two forms of fitout/model/between.py: the gated activation and the norm.

    python -m benchmarks.compiled --out benchmarks/results/compiled.json

1,536 tokens of a model 512 wide, feed-forward 1,376, written for a CPU and compiled as `train.compile: true` does.
In turn, medians over ROUNDS, after results were seen to agree. `compile_s` is the time to the first results of all
three, with nothing compiled before.
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
from torch._inductor import config as inductor

from fitout.model import between

from .against_trl import machine

TOKENS, WIDTH, FFN, ROUNDS = 1536, 512, 1376, 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    points = {str(kind).removeprefix("torch."): _compare(kind) for kind in (torch.float32, torch.bfloat16)}
    result = {"kind": "compiled", "quick": False, "machine": machine(), "points": points}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(points, indent=1))


def _compare(kind: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    inductor.force_disable_caches = True
    gate, up, grad = (torch.randn(1, TOKENS, FFN).to(kind) for _ in range(3))
    x, weight = torch.randn(1, TOKENS, WIDTH).to(kind), torch.ones(WIDTH, dtype=kind)

    def calls(form: between.Between) -> dict[str, Callable[[], Any]]:
        return {
            "gated": lambda: form.gated(gate, up),
            "gated_backward": lambda: form.gated_slopes(grad, gate, up, None),
            "norm": lambda: form.norm(x, weight, 1e-5),
        }

    own, compiled = calls(between.WRITTEN), calls(between.compiled())
    began = time.perf_counter()
    for function in compiled.values():
        function()
    found: dict[str, Any] = {"compile_s": round(time.perf_counter() - began, 1)}
    for what in own:
        torch.testing.assert_close(own[what](), compiled[what](), atol=3e-2, rtol=3e-2)
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for function, taken in zip((own[what], compiled[what]), seconds, strict=True):
                start = time.perf_counter()
                function()
                taken.append(time.perf_counter() - start)
        found[what] = [round(1000 * statistics.median(taken), 3) for taken in seconds]
    return found


if __name__ == "__main__":
    main()
