"""What memory costs in time: the head in chunks, and layers recomputed, each run a process of its own.

    python -m benchmarks.memory --out benchmarks/results/memory.json

head        a Gemma 2 head (soft-capped logits, 256,000 tokens, 64 wide) on 1,500 supervised rows: all logits at once,
            as the model's own forward makes them, and in chunks (model/head.py)
recompute   LoRA on 30 M parameters, blocks of 1,024 tokens, four in a micro-batch, by the share of layers recomputed
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .against_trl import LENGTH, RANK, child, machine, measure

SHARES = (False, 0.25, 0.5, 0.75, True)
ROWS, WIDTH, VOCABULARY = 1500, 64, 256_000
STEPS, WARMUP, ROUNDS = 5, 2, 2


def main() -> None:
    if sys.argv[1:2] == ["head"]:
        _head(sys.argv[2], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fitout-benchmark-") as name:
        folder = Path(name)
        heads = {way: _child_head(folder, way) for way in ("whole", "chunks")}
        child("work", folder, "30m", "fp32", STEPS, "lora", "blocks", RANK, LENGTH)
        recomputed = _recomputed(folder)
    result = {"kind": "memory", "quick": False, "machine": machine(), "head": heads, "recompute": recomputed}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


def _child_head(folder: Path, way: str) -> dict[str, float]:
    child("memory", "head", way, folder / "head.json")
    return json.loads((folder / "head.json").read_text())


def _head(way: str, out: Path) -> None:
    import torch
    import torch.nn.functional as F
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from fitout.model import head

    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
        head_dim=16, vocab_size=VOCABULARY,
    )  # fmt: skip
    model: Any = Gemma2ForCausalLM(config).requires_grad_(False)
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    targets, weights = torch.randint(VOCABULARY, (ROWS,)), torch.ones(ROWS)
    assert head.kind_of_head(model) == head.OWN
    before, began = _peak(), time.perf_counter()
    if way == "whole":
        logits = head._own_logits(model, hidden).float()
        loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    else:
        loss, _ = head.head_cross_entropy(model, hidden, targets, weights)
    loss.backward()
    told = {
        "seconds": round(time.perf_counter() - began, 2), "memory_mb": round(_peak() - before),
        "loss": float(loss.detach()), "gradient_norm": float(hidden.grad.norm()),
    }  # fmt: skip
    out.write_text(json.dumps(told))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _recomputed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Runs by share, in turn; the order is turned around every other round."""
    import yaml

    path, work = folder / "recipe.yaml", json.loads((folder / "work.json").read_text())
    recipe = yaml.safe_load(path.read_text())
    runs: dict[str, list[dict[str, Any]]] = {str(float(share)): [] for share in SHARES}
    for number in range(ROUNDS):
        for share in SHARES if number % 2 == 0 else SHARES[::-1]:
            recipe["train"] |= {"gradient_checkpointing": share, "micro_batch_tokens": 4 * LENGTH}
            path.write_text(yaml.safe_dump(recipe, sort_keys=False))
            runs[str(float(share))].append(measure(folder, work, f"recompute {share}", None, WARMUP))
    return runs


if __name__ == "__main__":
    main()
