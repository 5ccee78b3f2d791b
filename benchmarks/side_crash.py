"""The peer of crash.py, one process: `python -m benchmarks.side_crash ROWS RUN`. Transformers' Trainer with peft.

Started again it goes on from the last checkpoint as transformers finds it, or from the beginning when there is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(file: Path, run: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
    from transformers.trainer_utils import get_last_checkpoint

    work = json.loads(file.read_text())
    set_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=work["dropout"], target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(work["base"], dtype=torch.float32), config)
    settings = TrainingArguments(
        output_dir=str(run), max_steps=work["steps"], per_device_train_batch_size=work["batch"],
        learning_rate=work["rate"], save_steps=work["save_every"], save_total_limit=2, logging_steps=1, report_to=[],
        use_cpu=True, seed=0, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=work["rows"], data_collator=collate)
    last = get_last_checkpoint(str(run)) if run.exists() else None
    trainer.train(resume_from_checkpoint=last)
    model.save_pretrained(run / "adapter")


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    longest = max(len(row["ids"]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, seen = torch.full_like(ids, -100), torch.zeros_like(ids)
    for at, row in enumerate(rows):
        length = len(row["ids"])
        ids[at, :length] = torch.tensor(row["ids"])
        seen[at, :length] = 1
        on = torch.tensor(row["mask"], dtype=torch.bool)
        labels[at, :length][on] = ids[at, :length][on]
    return {"input_ids": ids, "labels": labels, "attention_mask": seen}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
