"""A peer's side, one process: `python -m benchmarks.side_trl FOLDER OUT OPTIONS`, with OPTIONS as `key=value,...`:

trainer=trl   TRL's SFTTrainer; `plain` is transformers' Trainer with peft and a padding collator
ref=0     of DPO, 1: the reference's log-probabilities are computed before the training (precompute_ref_log_probs)
per=8     examples a device batch; gradient accumulation makes a step of them
recompute=1   activation checkpointing (TRL's default)
sort=0    examples of a step sorted by length (the step's set stays the same), so that less is padding
free=0    padding_free: a device batch flattened into one row
liger=0   Liger kernels (a GPU, and their package)
base=fp32     dtype of the frozen weights; bf16 runs compute under autocast either way
onednn=0  1: PyTorch has oneDNN multiply fp32, as a training by Fitout does on AMD's processors with AVX-512
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from .work import ALPHA, SEED, hash_step, peak_mb

DEFAULT = {
    "trainer": "trl", "per": "8", "recompute": "1", "sort": "0", "free": "0", "liger": "0", "base": "fp32",
    "onednn": "0", "ref": "0",
}  # fmt: skip


def main(folder: Path, out: Path, text: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    work, options = asked(folder, text)
    if options["onednn"] == "1":
        import torch

        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    trainer, watch, batches = _trainer(folder, work, options)
    trainer.train()
    write(out, watch, batches, work["batch"] // int(options["per"]))


def asked(folder: Path, text: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The work, and the options with their defaults."""
    work = json.loads((folder / "work.json").read_text())
    options = {**DEFAULT, **dict(pair.split("=") for pair in text.split(",") if pair)}
    options["per"] = str(min(int(options["per"]), work["batch"]))
    return work, options


def training(folder: Path, work: dict[str, Any], options: dict[str, str]) -> dict[str, Any]:
    """What transformers' TrainingArguments are told, whichever program they are of."""
    import torch

    per = int(options["per"])
    return {
        "output_dir": str(folder / "peer"),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": work["precision"] == "bf16",
        "per_device_train_batch_size": per,
        "gradient_accumulation_steps": work["batch"] // per,
        "max_steps": len(work["steps"]),
        "learning_rate": work["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": SEED,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _trainer(folder: Path, work: dict[str, Any], options: dict[str, str]) -> tuple[Any, Any, list[dict[str, Any]]]:
    from datasets import Dataset

    steps = read_steps(folder, sort=options["sort"] == "1", pairs=work["data"] == "dpo")
    rows = [row for step in steps for row in step]
    if work["data"] == "dpo":
        [options["after"]] = {row["mask"][::-1].index(1) for row in rows}
        data = Dataset.from_list([_pair(*two) for two in zip(rows[::2], rows[1::2], strict=True)])
    else:
        data = Dataset.from_dict({"input_ids": [r["ids"] for r in rows], "completion_mask": [r["mask"] for r in rows]})
    common = {
        **training(folder, work, options),
        "gradient_checkpointing": options["recompute"] == "1",
        "train_sampling_strategy": "sequential",
        "use_liger_kernel": options["liger"] == "1",
    }
    watch = stopwatch()
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options["base"]]
    make = _dpo if work["data"] == "dpo" else _plain if options["trainer"] == "plain" else _trl
    lora = _lora(work["rank"]) if work["method"] == "lora" else None
    trainer = make(folder, common, options, data, lora, dtype, watch)
    if work["method"] == "lora":
        _take_our_adapter(trainer.model, folder / "adapter")
    return trainer, watch, record_batches(trainer)


def _lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear"
    )  # fmt: skip


def read_steps(folder: Path, *, sort: bool, pairs: bool = False) -> list[list[dict[str, list[int]]]]:
    """The rows of each step, by length where that is asked; of pairs two by two, by the longer answer's."""
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    if not sort:
        return steps
    size = 2 if pairs else 1
    return [
        [row for group in sorted(_groups(step, size), key=lambda group: max(len(row["ids"]) for row in group))
         for row in group]
        for step in steps
    ]  # fmt: skip


def _groups(rows: list[Any], size: int) -> list[list[Any]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def _pair(chosen: dict[str, list[int]], rejected: dict[str, list[int]]) -> dict[str, Any]:
    """What DPOTrainer's own preparation makes of a pair; the texts are looked at and not used."""
    begin = chosen["mask"].index(1)
    ids = {"prompt_ids": chosen["ids"][:begin], "chosen_ids": chosen["ids"][begin:],
           "rejected_ids": rejected["ids"][begin:]}  # fmt: skip
    return {"prompt": "", "chosen": "", "rejected": "", **ids}


def stopwatch() -> Any:
    """A callback that notes when each step ended, its loss, and the memory peak so far."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []
            self.peaks: list[float] = []

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.time())
            self.peaks.append(peak_mb())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                self.losses.append(logs["loss"])

    return Stopwatch()


def write(out: Path, watch: Any, batches: list[dict[str, Any]], a_step: int) -> None:
    """What a side leaves; `a_step` device batches make a step."""
    groups = [batches[at : at + a_step] for at in range(0, len(batches), a_step)][: len(watch.ends)]
    out.write_text(
        json.dumps({"ends": watch.ends, "losses": watch.losses, "peaks": watch.peaks,
                    "hashes": [_hash(group) for group in groups],
                    "computed": [sum(batch["input_ids"].numel() for batch in group) for group in groups]})
    )  # fmt: skip


def _trl(folder: Path, common: Any, options: Any, data: Any, lora: Any, dtype: str, watch: Any) -> Any:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    length = max(map(len, data["input_ids"]))  # nothing is cut
    return SFTTrainer(
        model=str(folder / "base"),
        args=SFTConfig(
            **common,
            padding_free=options["free"] == "1",
            max_length=None if options["free"] == "1" else length,
            completion_only_loss=True,
            model_init_kwargs={"dtype": dtype},
        ),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder / "base"),
        peft_config=lora,
        callbacks=[watch],
    )


def _dpo(folder: Path, common: Any, options: Any, data: Any, lora: Any, dtype: str, watch: Any) -> Any:
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    class AsTrained(DataCollatorForPreference):
        """What the template writes after the end of a turn is not trained here."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().torch_call(examples)
            for mask in batch["completion_mask"]:
                end = int(mask.nonzero().max()) + 1
                mask[end - options["after"] : end] = 0
            return batch

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")

    class Prepared(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return Prepared(
        model=str(folder / "base"),
        args=DPOConfig(
            **common,
            beta=0.1,
            max_length=None,
            precompute_ref_log_probs=options["ref"] == "1",
            model_init_kwargs={"dtype": dtype},
        ),
        train_dataset=data,
        data_collator=AsTrained(pad_token_id=tokenizer.pad_token_id),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[watch],
    )


def _plain(folder: Path, common: Any, options: Any, data: Any, lora: Any, dtype: str, watch: Any) -> Any:
    """What one writes without TRL: labels by hand, padded to the longest of the device batch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        masks = [torch.tensor(row["completion_mask"]) == 1 for row in rows]
        labels = [torch.where(mask, one, -100) for one, mask in zip(ids, masks, strict=True)]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        }

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=getattr(torch, dtype))
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
        if options["recompute"] == "1":
            model.enable_input_require_grads()
    arguments = TrainingArguments(**common, remove_unused_columns=False)
    return Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate, callbacks=[watch])


def _take_our_adapter(model: Any, folder: Path) -> None:
    """The same initial LoRA weights on both sides; every trained tensor must be among them."""
    import torch
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    trained = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    assert saved.keys() == trained.keys(), sorted(saved.keys() ^ trained.keys())[:4]
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])


def record_batches(trainer: Any) -> list[dict[str, Any]]:
    """Keeps the very batches that the trainer's collator makes, to hash them afterwards."""
    seen: list[dict[str, Any]] = []
    original = trainer.data_collator

    def collate(examples: Any) -> dict[str, Any]:
        batch = original(examples)
        kept = ("input_ids", "labels", "completion_mask", "attention_mask", "position_ids")
        seen.append({k: batch[k] for k in kept if k in batch})
        return batch

    trainer.data_collator = collate
    return seen


def _hash(batches: list[dict[str, Any]]) -> str:
    rows = []
    for batch in batches:
        ids = batch["input_ids"]
        labels = batch["labels"] if "labels" in batch else batch["completion_mask"] * 101 - 100  # of DPO
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(1).tolist()
            pairs = [(i[:n], la[:n]) for i, la, n in zip(ids, labels, lengths, strict=True)]
        else:
            starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
            ends = [*starts[1:], ids.shape[1]]
            pairs = [(ids[0, a:b], labels[0, a:b]) for a, b in zip(starts, ends, strict=True)]
        rows += [(tuple(i.tolist()), (False, *(la[1:] != -100).tolist())) for i, la in pairs]
    return hash_step(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
