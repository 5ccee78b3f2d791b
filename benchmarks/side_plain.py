"""What plain transformers and peft make of a run's files, without Fitout: a process of its own, one JSON object.

    python -m benchmarks.side_plain BASE RUN

A LoRA run: base + adapter by peft against merged/ by transformers, all logits on the same ids. A full run: that model/
loads without a missing or unexpected tensor, and how far its logits are from the base's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTH, ROWS = 128, 8


def main(base: str, run: Path) -> None:
    adapter = run / "adapter"
    folder = run / "merged" if adapter.exists() else run / "model"
    final, problems = _load(folder)
    plain, _ = _load(base)
    if adapter.exists():
        from peft import PeftModel

        reference = PeftModel.from_pretrained(plain, adapter)
    else:
        reference = plain
    ids = _ids(folder, final.config.vocab_size)
    wanted, found = _logits(reference, ids), _logits(final, ids)
    gap = float((found - wanted).abs().max())
    facts = {
        "folder": folder.name,
        "against": "base + adapter" if adapter.exists() else "base",
        "loading_problems": problems,
        "logits": wanted.numel(),
        "max_abs": gap,
        "max_relative": gap / float(wanted.abs().max()),
        "same_argmax": float((found.argmax(-1) == wanted.argmax(-1)).float().mean()),
        "finite": bool(found.isfinite().all()),
    }
    assert not any(name.split(".")[0] == "fitout" for name in sys.modules), "the judge must not use Fitout"
    print(json.dumps(facts))


def _load(folder: str | Path) -> tuple[Any, list[str]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), [f"{kind}: {what}" for kind, what in info.items() if what]


def _ids(folder: Path, vocabulary: int) -> torch.Tensor:
    """Random ids over the whole vocabulary, and a row of text as the saved tokenizer cuts it; shape (ROWS, LENGTH)."""
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    text = AutoTokenizer.from_pretrained(folder)("Once upon a time there was a little girl. " * LENGTH)["input_ids"]
    ids[0] = torch.tensor(text[:LENGTH])
    return ids


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits.float()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
