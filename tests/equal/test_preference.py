"""Preference objectives: loss and gradients equal the papers' formulas over separate, unpacked, padded forwards; whole
trainings equal TRL's, an interrupted one, and one of other micro-batches."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fitout.data.batches import Batches, layouts_of
from fitout.errors import CheckError, FitoutError
from fitout.files import read_jsonl
from fitout.model import methods
from fitout.model.methods import FullSettings, sparse
from fitout.objectives import DpoSettings, OrpoSettings, SimpoSettings, create
from fitout.train import loop
from fitout.train.backend import Backend
from fitout.train.listeners import JsonLog
from fitout.train.loop import fit
from tests.conftest import tiny_llama

from .small import CPU, METHODS_UNDER_TEST, adapted, call, events, job_of, losses, pair_part, train, trained_tensors

OBJECTIVES = {
    "orpo": OrpoSettings(beta=0.3),
    "dpo": DpoSettings(beta=0.5),
    "simpo": SimpoSettings(beta=2.0, gamma=0.7),
}


def answer(model, part, row):
    """(log p of each trained token) of one sample, by a forward of its own and log_softmax."""
    ids = torch.from_numpy(part.ids(row).astype(np.int64))
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
    each = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return each[torch.from_numpy(part.train_on(row)[1:].astype(bool))]


def by_the_paper(kind, settings, chosen, rejected, references):
    """The loss of one pair from its answers' token log-probabilities, written with probabilities and odds."""
    if kind == "orpo":
        p, q = chosen.mean().exp(), rejected.mean().exp()
        odds = (p / (1 - p)) / (q / (1 - q))
        return -chosen.mean() - settings.beta * torch.log(odds / (1 + odds))
    if kind == "simpo":
        reward = settings.beta * (chosen.mean() - rejected.mean())
        return -torch.log(1 / (1 + torch.exp(settings.gamma - reward)))
    before = references
    ratio = (chosen.sum() - before[0].sum()) - (rejected.sum() - before[1].sum())
    return -torch.log(1 / (1 + torch.exp(-settings.beta * ratio)))


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("packing", ["shared", "packed", "apart", "unpacked model"])
def test_loss_and_gradients_are_the_papers(tmp_path, kind, packing):
    settings, part = OBJECTIVES[kind], pair_part(tmp_path, 14)
    plain, before = tiny_llama(packed=False), tiny_llama(packed=False, seed=3)
    with torch.no_grad():
        references = [answer(before, part, row) for row in range(len(part))]
    pairs = [(row, row + 1) for row in range(0, len(part), 2)]
    want = sum(
        by_the_paper(kind, settings, answer(plain, part, c), answer(plain, part, r), (references[c], references[r]))
        for c, r in pairs
    ) / len(pairs)  # fmt: skip
    want.backward()

    part.references = np.array([float(one.double().sum()) for one in references])
    model = tiny_llama(packed=packing != "unpacked model")
    how = {"packing": packing in ("shared", "packed"), "share": packing == "shared"}
    layouts = layouts_of(part, np.arange(len(part)), 90, **how)
    assert len(layouts) > 1
    twice = sum(x.supervised - len(set(zip(x.target_at, x.target_token, strict=True))) for x in layouts)
    assert (twice > 0) == (packing == "shared")  # an answer of two pairs is computed once
    assert sorted(map(tuple, np.concatenate([x.preferences for x in layouts]).tolist())) == pairs
    objective = create(settings)
    total = objective.units(layouts)
    assert total == len(pairs)
    got = sum(objective.loss(model, layout, total) for layout in layouts)
    got.backward()
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=2e-6, rtol=1e-4, msg=name)

    figures = dict(zip(objective.figures, np.array(objective.noted()) / total, strict=True))
    with torch.no_grad():
        mean = [float(answer(plain, part, row).mean()) for row in range(len(part))]
    assert figures["chosen_loss"] == pytest.approx(-np.mean(mean[::2]), rel=1e-5)
    assert figures["reward_margin"] == pytest.approx(figures["reward_chosen"] - figures["reward_rejected"], abs=1e-9)
    assert objective.noted() == [0.0] * len(objective.figures)


def test_the_formulas_are_trls():
    trl_orpo = pytest.importorskip("trl.experimental.orpo")
    trl_cpo = pytest.importorskip("trl.experimental.cpo")
    noise = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40, (50, 2), generator=noise).double()
    log_probs = -tokens * torch.rand(50, 2, generator=noise).double() * 4
    mean, unknown = log_probs / tokens, torch.full((50, 2), float("nan"))

    orpo = create(OrpoSettings(beta=0.3))
    itself = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device=CPU))
    theirs, chosen, rejected, *_ = trl_orpo.ORPOTrainer.odds_ratio_loss(itself, *mean.unbind(1))
    ours, rewards = orpo.judge(log_probs, tokens, unknown)
    torch.testing.assert_close(ours, (-mean[:, 0] - theirs.double()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rewards.float(), torch.stack([chosen, rejected], 1))

    simpo = create(SimpoSettings(beta=2.5, gamma=1.4))
    itself = SimpleNamespace(
        beta=2.5, simpo_gamma=1.4, loss_type="simpo", label_smoothing=0.0, alpha=0.0,
        accelerator=SimpleNamespace(device=CPU),
    )  # fmt: skip
    theirs, *_ = trl_cpo.CPOTrainer.cpo_loss(itself, *mean.unbind(1))
    ours, _ = simpo.judge(log_probs, tokens, unknown)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_an_answer_as_good_as_certain_has_finite_odds():
    log_probs = torch.tensor([[0.0, -3.0], [-1e-12, -1e-12]], dtype=torch.float64, requires_grad=True)
    each, _ = create(OrpoSettings()).judge(log_probs, torch.ones(2, 2), torch.zeros(2, 2))
    each.sum().backward()
    assert each.isfinite().all()
    assert log_probs.grad.isfinite().all()


def words_by_number():
    """A tokenizer whose words are "w5", "w17" and so on; the token 1 is the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<end>" if i == 1 else f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="<end>")


def preference_job(folder, kind, model, part, **how):
    return replace(job_of(folder, model, part, **how), objective=create(OBJECTIVES[kind]))


def test_twenty_losses_of_dpo_are_trls(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    steps, lr, beta = 20, 1e-3, 0.5
    model, part = tiny_llama(), pair_part(tmp_path, 80, end=1)
    methods.create(FullSettings()).apply(model)
    job = preference_job(tmp_path / "ours", "dpo", model, part, total=steps, lr=lr, batch_size=4, schedule="constant",
                         warmup=0)  # fmt: skip
    train(job)
    ours = [loss for _, loss in losses(job.run.log)]

    def said(ids):
        return " ".join(f"w{i}" for i in ids)

    rows = []
    for step in range(steps):
        for row in job.batches.rows(step)[::2]:
            begin = int(part.train_on(row).argmax())
            chosen, rejected = part.ids(row), part.ids(row + 1)
            rows.append({"prompt": said(chosen[:begin]), "chosen": " " + said(chosen[begin:-1]),
                         "rejected": " " + said(rejected[begin:-1])})  # fmt: skip
    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, fp16=False, max_steps=steps, beta=beta,
        max_length=None, per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=lr,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        report_to=[], save_strategy="no", seed=0, gradient_checkpointing=False, disable_tqdm=True,
        train_sampling_strategy="sequential", disable_dropout=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=tiny_llama(packed=False), ref_model=tiny_llama(packed=False), args=settings,
        train_dataset=Dataset.from_list(rows), processing_class=words_by_number(),
    )  # fmt: skip
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert ours == pytest.approx([row["loss"] for row in history], abs=1e-4)
    assert max(ours) - min(ours) > 0.1
    told = [row["figures"] for row in read_jsonl(job.run.log) if "event" not in row]
    for name, theirs in (("reward_accuracy", "accuracies"), ("reward_margin", "margins"), ("reward_chosen", "chosen")):
        assert [row[name] for row in told] == pytest.approx([row[f"rewards/{theirs}"] for row in history], abs=1e-3)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("how", [{"micro_batch_tokens": 64}, {"packing": False}, {"recompute": 1.0}])
def test_micro_batches_and_packing_change_no_training(tmp_path, kind, how):
    ends = []
    for name, other in (("plain", {"micro_batch_tokens": 4096}), ("other", how)):
        other = dict(other)
        if other.pop("recompute", None):
            other["gradient_checkpointing"] = True
        model, method = adapted(METHODS_UNDER_TEST["lora"])
        part = pair_part(tmp_path / name, 12)
        validation = pair_part(tmp_path / name, 4, seed=9, name="validation")
        job = preference_job(tmp_path / name, kind, model, part, total=6, validation=validation, method=method, **other)
        train(job)
        validated = [(row["validation_loss"], *row["figures"].values()) for row in events(job.run.log, "evaluated")]
        ends.append(([x for _, x in losses(job.run.log)], validated, trained_tensors(model)))
    (one, seen, weights), (two, also_seen, others) = ends
    assert one == pytest.approx(two, rel=1e-5)
    for mine, theirs in zip(seen, also_seen, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], atol=1e-4, rtol=1e-3)


class Stop:
    """Asks a run to end after a step, as SIGTERM would."""

    def __init__(self, at):
        self.at = at

    def start(self, info):
        pass

    def row(self, row):
        if row.get("step") == self.at and "event" not in row:
            raise KeyboardInterrupt

    def close(self):
        pass


@pytest.mark.parametrize("at", [1, 4])
def test_dpo_goes_on_with_the_reference_it_began_with(tmp_path, at):
    def job(folder):
        model, method = adapted(METHODS_UNDER_TEST["lora"])
        part, validation = pair_part(folder, 10), pair_part(folder, 4, seed=9, name="validation")
        return preference_job(folder, "dpo", model, part, total=6, validation=validation, method=method, save_every=1)

    whole = job(tmp_path / "whole")
    train(whole)
    first = job(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        fit(first, Backend(CPU), [JsonLog(first.run.log), Stop(at + 1)])
    again = job(tmp_path / "cut")
    train(again, resume=True)
    assert len(events(again.run.log, "referred")) == 1
    for name, tensor in trained_tensors(whole.model).items():
        assert torch.equal(tensor, trained_tensors(again.model)[name]), name

    kept = bytearray(again.run.references.read_bytes())
    kept[-3] ^= 1
    again.run.references.write_bytes(kept)
    with pytest.raises(CheckError, match="not those that this run began with"):
        train(job(tmp_path / "cut"), resume=True)
    again.run.references.unlink()
    with pytest.raises(CheckError, match="cannot be read"):
        train(job(tmp_path / "cut"), resume=True)


def test_a_run_of_less_than_an_epoch_has_the_references_of_its_rows(tmp_path):
    def job(total):
        model, method = adapted(METHODS_UNDER_TEST["lora"])
        return preference_job(tmp_path, "dpo", model, pair_part(tmp_path, 20), total=total, method=method)

    short = job(2)
    train(short)
    assert np.isnan(short.batches.part.references).sum() == 40 - 16
    with pytest.raises(CheckError, match="8 answers have no reference log-probability: the run began with fewer"):
        train(job(3), resume=True)


def test_a_base_that_gives_no_numbers_is_told_before_it_is_trained(tmp_path):
    model, method = adapted(METHODS_UNDER_TEST["lora"])
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    job = preference_job(tmp_path, "dpo", model, pair_part(tmp_path, 4), total=2, method=method)
    with pytest.raises(FitoutError, match="8 of 8 answers no finite log-probability"):
        train(job)
    assert not job.run.references.exists()


def test_what_was_laid_out_before_the_reference_was_known_is_laid_out_again(tmp_path, monkeypatch):
    """A method that begins by the gradients of the first steps asks for their layouts."""
    monkeypatch.setattr(sparse, "FIRST_STEPS", 1)
    model, method = adapted(METHODS_UNDER_TEST["sparse"])
    job = preference_job(tmp_path, "dpo", model, pair_part(tmp_path, 12), total=3, method=method)
    seen, original = [], loop.train_step

    def train_step(model, objective, layouts, *rest):
        seen.extend(np.isnan(layout.references).any() for layout in layouts)
        return original(model, objective, layouts, *rest)

    monkeypatch.setattr(loop, "train_step", train_step)
    train(job)
    assert seen and not any(seen)


def test_a_pair_is_never_parted(tmp_path):
    part = pair_part(tmp_path, 30)
    for budget in (1, 40, 100, 4096):
        for ranks in (1, 3):
            for packing in (True, False):
                batches = Batches(part, batch_size=8, packing=packing, share=packing)
                for step in range(batches.steps_in_epoch(0)):
                    every = [x for r in range(ranks) for x in batches.layouts(step, budget=budget, rank=r, ranks=ranks)]
                    for layout in every:
                        here = {int(row) for row in layout.target_sample}
                        assert {int(row) for row in layout.preferences.ravel()} == here
                    pairs = sum(len(layout.preferences) for layout in every)
                    assert pairs == len(batches.rows(step)) // 2
                    assert len(batches.rows(step)) // 2 == (8 if step < 3 else 6)


PAIRS = """\
name: pairs
model: {base: "embedded:shell"}
data: {sources: [{path: pairs.jsonl}], max_length: 64}
method: {kind: lora, rank: 4, alpha: 8}
objective: {kind: dpo, beta: 0.3}
train: {max_steps: 4, batch_size: 6, lr: 1.0e-4, precision: fp32, evaluate_every: 2, listeners: []}
"""


def test_two_ranks_and_a_divided_model_train_as_one_process(tmp_path):
    """The reference too is computed by all ranks; a rank may have no pair in a step."""
    with open(tmp_path / "pairs.jsonl", "w") as file:
        for i in range(60):
            pair = {"prompt": f"What is {i} plus {i % 7}?", "chosen": str(i + i % 7), "rejected": "I cannot say."}
            file.write(json.dumps(pair) + "\n")
    (tmp_path / "recipe.yaml").write_text(PAIRS)
    told = {}
    for name, ranks, how in (("one", 1, "auto"), ("two", 2, "ddp"), ("divided", 2, "fsdp")):
        more = [
            "--set",
            f"train.parallel={how}",
            "--set",
            "train.micro_batch_tokens=" + ("4096" if ranks == 1 else "64"),
        ]
        call("train", tmp_path / "recipe.yaml", "--out", tmp_path / name, *more, ranks=ranks)
        rows = [row for row in read_jsonl(tmp_path / name / "log.jsonl") if "figures" in row]
        told[name] = [[row.get("loss", row.get("validation_loss")), *row["figures"].values()] for row in rows]
    assert len(told["one"]) == 4 + 3 and told["one"][0][0] == pytest.approx(np.log(2))
    assert told["one"][-1][0] < 0.68
    for name in ("two", "divided"):
        for mine, theirs in zip(told[name], told["one"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
