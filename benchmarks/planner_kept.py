"""What a layer keeps for the backward pass, read from the code that runs: `python -m benchmarks.planner_kept`.

Tiny random Llamas go forward under saved-tensor hooks; the bytes of all distinct storages but the parameters' are a sum
of widths times whole numbers, and differences between shapes give these. Written to fitout/plan/constants.json.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    """What is not the block's: LoRA's x A^T, less the gated product that it forms again and another method keeps; in
    bf16 the copies of its factors, and of the weights that autocast makes."""
    hidden, attention, kv, ffn, *_ = _widths(sizes)
    width = 4 if precision == "fp32" else 2
    if base == "frozen":
        factors = RANK * (7 * hidden + 2 * attention + 2 * kv + 3 * ffn)
        return (7 * RANK - ffn) * TOKENS * width + (2 * factors if precision == "bf16" else 0)
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
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if low and base == "trained" else contextlib.nullcontext()
    with fused(model), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), autocast:
        token_losses(model, layout)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


if __name__ == "__main__":
    main()
