"""The first 20 losses equal those of TRL's SFTTrainer on the same ids, masks, order and hyper-parameters."""

from __future__ import annotations

import pytest

from fitout.model import methods
from fitout.model.methods import FullSettings
from tests.conftest import tiny_llama

from .small import job_of, losses, random_part, train

pytest.importorskip("trl")
STEPS, BATCH, LR = 20, 4, 1e-3


def tiny_tokenizer():
    """TRL insists on one; the rows are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(97)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )


def trl_losses(folder, rows, accumulation):
    """The unrounded loss of each optimizer step, and its gradient norm."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, fp16=False, max_steps=STEPS, packing=False, max_length=None,
        per_device_train_batch_size=BATCH // accumulation, gradient_accumulation_steps=accumulation,
        learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0,
        train_sampling_strategy="sequential", logging_steps=1, report_to=[], save_strategy="no", seed=0,
        completion_only_loss=True, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=tiny_llama(packed=False),
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_first_twenty_losses(tmp_path, accumulation):
    model = tiny_llama()
    methods.create(FullSettings()).apply(model)
    part = random_part(tmp_path, 40)
    job = job_of(tmp_path / "ours", model, part, total=STEPS, lr=LR, batch_size=BATCH, schedule="constant", warmup=0)
    train(job)
    ours = [x for _, x in losses(job.run.log)]
    rows = [
        {"input_ids": part.ids(row).tolist(), "completion_mask": part.train_on(row).tolist()}
        for step in range(STEPS)
        for row in job.batches.rows(step)
    ]
    assert len(rows) == STEPS * BATCH
    theirs = trl_losses(tmp_path / "trl", rows, accumulation)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert max(ours) - min(ours) > 0.1
