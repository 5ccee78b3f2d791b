"""What a layer keeps for the backward pass, read from the code that runs: `python -m benchmarks.planner_kept`.

Tiny random Llamas go forward; the bytes of all storages that are still there afterwards are a sum of widths times whole
numbers, and differences between shapes give these. Written to fitout/plan/constants.json.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

CONSTANTS = Path(__file__).parents[1] / "fitout" / "plan" / "constants.json"
WIDTHS = ("hidden", "attention", "kv", "ffn", "heads", "one")
SIZES = {"hidden": 24, "ffn": 52, "layers": 2, "heads": 6, "kv_heads": 3, "head_dim": 4}
RANK, TOKENS, TARGETS = 3, 64, 5  # a length that needs no filling (objectives.base.ROUND_TO)


def main() -> None:
    constants = json.loads(CONSTANTS.read_text())
    for base in ("trained", "frozen"):
        for precision in ("fp32", "bf16"):
            constants["kept"][base][precision] = fitted(base, precision)
            print(base, precision, constants["kept"][base][precision])
    CONSTANTS.write_text(json.dumps(constants, indent=1) + "\n")


def fitted(base: str, precision: str) -> dict[str, float]:
    """Bytes a token and layer, by the width they belong to."""
    variants = [{}, {"hidden": 36}, {"ffn": 64}, {"head_dim": 8}, {"kv_heads": 2},
                {"heads": 12, "head_dim": 2, "kv_heads": 6}, {"heads": 3, "head_dim": 8}]  # fmt: skip
    left, right = [], []
    for changes in variants:
        sizes = {**SIZES, **changes}
        one, two = (saved_bytes(base, precision, **{**sizes, "layers": layers}) for layers in (1, 2))
        left.append(_widths(sizes))
        right.append((two - one - _method(base, precision, sizes)) / TOKENS)
    found, *_ = np.linalg.lstsq(np.array(left, float), np.array(right, float), rcond=None)
    return {name: round(float(value), 2) + 0.0 for name, value in zip(WIDTHS, found, strict=True)}


def _widths(sizes: dict[str, int]) -> list[int]:
    heads, keys = sizes["heads"], sizes["kv_heads"]
    return [sizes["hidden"], heads * sizes["head_dim"], keys * sizes["head_dim"], sizes["ffn"], heads, 1]


def _method(base: str, precision: str, sizes: dict[str, int]) -> int:
    """What is not the block's: LoRA's x A^T; in bf16 the copies of its factors, and of the weights that autocast
    makes."""
    hidden, attention, kv, ffn, *_ = _widths(sizes)
    width = 4 if precision == "fp32" else 2
    if base == "frozen":
        factors = RANK * (7 * hidden + 2 * attention + 2 * kv + 3 * ffn)
        return 7 * RANK * TOKENS * width + (2 * factors if precision == "bf16" else 0)
    return 2 * (2 * hidden * attention + 2 * hidden * kv + 3 * hidden * ffn) if precision == "bf16" else 0


def saved_bytes(base: str, precision: str, *, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int,
                head_dim: int) -> int:  # fmt: skip
    """Bytes kept between forward and backward by one micro-batch of TOKENS in two documents."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.layout import Layout, Segment
    from fitout.model import methods
    from fitout.model.attention import NAME, register
    from fitout.model.fuse import fused
    from fitout.objectives.base import token_losses

    register()
    config = LlamaConfig(
        vocab_size=31, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, attn_implementation=NAME, tie_word_embeddings=True,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    low = precision == "bf16"
    if base == "frozen":
        model = model.to(torch.bfloat16) if low else model
        methods.create(methods.LoraSettings(rank=RANK)).apply(model)
    model.train()
    half = TOKENS // 2
    layout = Layout(
        np.arange(TOKENS) % 31, np.tile(np.arange(half), 2), (Segment(0, half), Segment(half, TOKENS)),
        np.arange(TARGETS), np.arange(TARGETS), np.ones(TARGETS, np.float32), np.zeros(TARGETS, np.int64),
    )  # fmt: skip
    autocast = torch.autocast("cpu", torch.bfloat16) if low and base == "trained" else contextlib.nullcontext()
    with fused(model), autocast, Made(model) as made:
        losses = token_losses(model, layout)
        alive = made.alive()
    del losses
    return alive


class Made(TorchDispatchMode):
    """Notes the memory of every tensor that an operation gives, but the model's own."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.own = {held.untyped_storage().data_ptr() for held in (*model.parameters(), *model.buffers())}
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.own:
                storage = x.untyped_storage()
                self.seen[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return out

    def alive(self) -> int:
        """Bytes of what is still there."""
        return sum(size for storage, size in self.seen.values() if not storage.expired())


if __name__ == "__main__":
    main()
