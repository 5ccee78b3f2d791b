"""LLaMA-Factory's side, one process: `PYTHON -m benchmarks.side_llama_factory FOLDER OUT OPTIONS`, with options as in
side_trl (per, recompute, sort). PYTHON is that of an environment of its own: its requirements are not ours.

The rows come in by `tokenized_path` and the initial adapter by `adapter_name_or_path`, as its users would give them.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

from .side_trl import asked, read_steps, record_batches, stopwatch, training, write


def main(folder: Path, out: Path, text: str) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", DISABLE_VERSION_CHECK="1")
    work, options = asked(folder, text)
    _save_rows(folder, options["sort"] == "1")
    stand_in_for_sound()
    from llamafactory.train import sft
    from llamafactory.train.tuner import run_exp

    batches: list[list[dict[str, Any]]] = []

    class Recorded(sft.workflow.CustomSeq2SeqTrainer):
        def __init__(self, **more: Any):
            super().__init__(**more)
            batches.append(record_batches(self))

    sft.workflow.CustomSeq2SeqTrainer = Recorded
    watch = stopwatch()
    run_exp(_arguments(folder, work, options), callbacks=[watch])
    write(out, watch, batches[0], work["batch"] // int(options["per"]))


def stand_in_for_sound() -> None:
    """LLaMA-Factory imports torchaudio, which is not used here and may not be there for a CPU."""
    if importlib.util.find_spec("torchaudio") is None:
        import peft  # noqa: F401  (it and transformers look first what there is)

        sys.modules["torchaudio"] = types.ModuleType("torchaudio")


def _arguments(folder: Path, work: dict[str, Any], options: dict[str, str]) -> dict[str, Any]:
    lora = {"finetuning_type": "lora", "lora_target": "all", "adapter_name_or_path": str(folder / "adapter")}
    return {
        **training(folder, work, options),
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": str(folder / "base"),
        "template": "empty",
        "dataset": "rows",  # asked for, and not looked at beside `tokenized_path`
        "tokenized_path": str(folder / "tokenized"),
        "cutoff_len": work["max_length"],
        "overwrite_output_dir": True,
        **(lora if work["method"] == "lora" else {"finetuning_type": "full"}),
        "disable_gradient_checkpointing": options["recompute"] == "0",
        "disable_shuffling": True,
    }


def _save_rows(folder: Path, sort: bool) -> None:
    from datasets import Dataset, DatasetDict

    rows = [row for step in read_steps(folder, sort=sort) for row in step]
    labels = [[i if on else -100 for i, on in zip(row["ids"], row["mask"], strict=True)] for row in rows]
    columns = {"input_ids": [row["ids"] for row in rows], "attention_mask": [[1] * len(row["ids"]) for row in rows]}
    DatasetDict({"train": Dataset.from_dict({**columns, "labels": labels})}).save_to_disk(folder / "tokenized")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
