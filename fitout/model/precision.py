"""Which numbers to compute with: decided by the device, and on a CPU by a short measurement."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..errors import RequestError


@dataclass(frozen=True)
class Precision:
    """`kind` is fp32, bf16 or fp16; `why` is one line for people."""

    kind: str
    why: str


def best_device() -> torch.device:
    """CUDA (this process's card under torchrun), else CPU."""
    import os

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def decide(asked: str, device: torch.device, *, rows: int = 512, width: int = 512, hidden: int = 1536) -> Precision:
    """The precision to use. `auto`: bf16 on CUDA cards that have it, on CPU when a probe shows it at least 1.3 times as
    fast for a layer of this size; otherwise fp32. fp16 is refused on CPU (it is hundreds of times slower)."""
    if asked == "fp16" and device.type == "cpu":
        raise RequestError(
            "fp16 on a CPU is emulated and hundreds of times slower",
            where="train.precision",
            hint="Use auto, fp32 or bf16.",
        )
    if asked != "auto":
        return Precision(asked, "as the recipe says")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this card has bf16")
        return Precision("fp16", "this card has no bf16; loss scaling is on")
    ratio = _bf16_gain(rows, width, hidden)
    if ratio >= 1.3:
        return Precision("bf16", f"a linear layer runs {ratio:.1f} times as fast in bf16 as in fp32 here")
    return Precision("fp32", f"bf16 does not pay here ({ratio:.1f} times fp32 in a linear layer)")


def _bf16_gain(rows: int, width: int, hidden: int) -> float:
    """How many times as fast bf16 is in a linear layer and back, (rows, width) x (width, hidden)."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, width).to(dtype)
        w = torch.randn(width, hidden).to(dtype)
        timings = []
        for _ in range(8):
            start = time.perf_counter()
            (x @ w) @ w.t()
            timings.append(time.perf_counter() - start)
        seconds[dtype] = min(timings)
    return seconds[torch.float32] / seconds[torch.bfloat16]
