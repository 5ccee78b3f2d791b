"""Losses and gradients on the card beside the CPU's, for every method: `python -m benchmarks.gpu_equal --out FILE`.

A small random Llama, rows that share a prompt and rows that do not, packed into one micro-batch. In fp32 the two agree
to rounding (1e-4 of the largest entry, with TF32 off); in bf16 the card is held against the CPU's fp32, within 3e-2 of
a gradient's norm. On a machine without a card both sides are its CPU, which shows that the command runs.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

METHODS: list[dict[str, Any]] = [
    {"kind": "full"},
    {"kind": "lora", "rank": 8},
    {"kind": "lora", "rank": 8, "targets": ["q_proj", "lm_head"]},
    {"kind": "dora", "rank": 8},
    {"kind": "qlora", "rank": 8},
    {"kind": "adapter", "style": "houlsby", "reduction": 4},
    {"kind": "sparse", "density": 0.02, "select": "random"},
]
FP32, BF16 = 1e-4, 3e-2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False
    card = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row for settings in METHODS for row in _compared(settings, card)]
    for row in rows:
        print(json.dumps(row), flush=True)
    name = torch.cuda.get_device_name(card) if card.type == "cuda" else "no card: the CPU beside itself"
    result = {"kind": "gpu equal", "quick": False, "device": name, "torch": torch.__version__, "rows": rows}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(row["held"] for row in rows) else 1


def _compared(settings: dict[str, Any], card: Any) -> list[dict[str, Any]]:
    """One row for fp32 and one for bf16."""
    import torch

    if settings["kind"] == "qlora":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            return []
    rows = []
    for dtype, limit in ((torch.float32, FP32), (torch.bfloat16, BF16)):
        rounded = dtype if settings["kind"] == "qlora" else torch.float32  # 4 bits of rounded weights are other weights
        truth = _gradients(settings, torch.device("cpu"), rounded)
        loss, gradients = _gradients(settings, card, dtype)
        worst = 0.0
        for name, want in truth[1].items():
            scale = want.norm() if dtype == torch.bfloat16 else want.abs().max()
            gap = (gradients[name] - want).norm() if dtype == torch.bfloat16 else (gradients[name] - want).abs().max()
            floor = 1e-2 * max(one.norm() for one in truth[1].values())
            worst = max(worst, float(gap / max(scale, floor)))
        gap = abs(loss - truth[0]) / abs(truth[0])
        held = gradients.keys() == truth[1].keys() and worst <= limit and gap <= limit
        rows.append({
            "method": settings, "dtype": str(dtype).removeprefix("torch."), "loss_gap": gap, "gradient_gap": worst,
            "limit": limit, "held": held,
        })  # fmt: skip
    return rows


def _gradients(settings: dict[str, Any], device: Any, dtype: Any) -> tuple[float, dict[str, Any]]:
    import numpy as np
    import torch
    from pydantic import TypeAdapter
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.data.pack import lay_out
    from fitout.model import methods
    from fitout.model.attention import NAME, register
    from fitout.model.fuse import fused
    from fitout.model.load import load_base
    from fitout.model.methods.base import trainable
    from fitout.objectives.base import token_losses

    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, attn_implementation=NAME,
    )  # fmt: skip
    chosen = TypeAdapter(methods.MethodSettings).validate_python(settings)
    method = methods.create(chosen)
    base = Path("build") / "gpu-equal"
    if not base.exists():
        LlamaForCausalLM(config).save_pretrained(base)
    stored = dtype if method.frozen_base else torch.float32
    model: Any = load_base(str(base), dtype=stored, packed=True, device=device, extra=method.load_kwargs(dtype))
    torch.manual_seed(1)
    method.apply(model)
    with torch.no_grad():
        for name, parameter in sorted(trainable(model).items()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.02)
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 1024, 96)
    ids = [np.concatenate([prompt, rng.integers(1, 1024, 40 + 9 * n)]).astype(np.int32) for n in range(4)]
    ids += [rng.integers(1, 1024, 70 + 31 * n).astype(np.int32) for n in range(3)]
    train_on = [(np.arange(len(one)) >= 60).astype(np.uint8) for one in ids]
    layout = lay_out(ids, train_on, range(len(ids)), share=True)
    casting = dtype != torch.float32 and not method.frozen_base

    def backward() -> Any:
        with torch.autocast(device.type, dtype, enabled=casting):
            loss, _ = token_losses(model, layout)
        loss.backward()
        return loss

    def gradients() -> Any:
        backward()
        yield

    model.train()
    with fused(model):
        method.begin(model, gradients)
        model.zero_grad()
        loss = backward()
    found = {name: copy.deepcopy(p.grad).float().cpu() for name, p in trainable(model).items() if p.grad is not None}
    return float(loss.detach()), found


if __name__ == "__main__":
    sys.exit(main())
