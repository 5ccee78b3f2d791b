"""What may go wrong while training, and the decisions of the loop: memory, numbers, schedule, patience, best."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig

from fitout.errors import FitoutError
from fitout.files import read_jsonl
from fitout.layout import Segment
from fitout.model import methods
from fitout.model.memory import is_out_of_memory, recompute_activations
from fitout.model.methods import DoraSettings, FullSettings, LoraSettings
from fitout.train import TrainSettings, checkpoint, loop
from fitout.train.optim import learning_rate, make_optimizer
from tests.conftest import tiny_llama
from tests.equal.small import Around, events, job_of, losses, random_part, train, trained_tensors


def make_job(folder, *, total=8, samples=24, **settings):
    return job_of(
        folder, tiny_llama(), random_part(folder, samples), total=total, **{"batch_size": 8, "schedule": "constant",
                                                                            "warmup": 0, **settings}
    )  # fmt: skip


def fails_once(error, *, times=1, at_call=3):
    """train_step that raises on its calls from `at_call` on, `times` times, after the gradients were begun."""
    real, calls = loop.train_step, []

    def step(model, *rest):
        calls.append(rest)
        if at_call <= len(calls) < at_call + times:
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)  # what a failed backward leaves behind
            raise error
        return real(model, *rest)

    return step


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_out_of_memory_halves_the_budget_and_changes_nothing(tmp_path, monkeypatch, error):
    job = make_job(tmp_path / "calm", samples=40)
    train(job)
    want, want_weights = losses(job.run.log), trained_tensors(job.model)
    monkeypatch.setattr(loop, "train_step", fails_once(error))
    job = make_job(tmp_path / "short", samples=40)
    progress = train(job)
    [told] = events(job.run.log, "oom")
    assert told["step"] == 2 and told["micro_batch_tokens"] == progress.budget < 4096
    assert progress.budget >= int(job.batches.part.lengths.max())
    assert len(job.batches.layouts(2, budget=progress.budget)) > 1
    got = losses(job.run.log)
    assert [step for step, _ in got] == list(range(1, 9))
    assert [x for _, x in got] == pytest.approx([x for _, x in want], abs=1e-5)
    for name, tensor in trained_tensors(job.model).items():
        torch.testing.assert_close(tensor, want_weights[name], rtol=1e-4, atol=1e-4, msg=name)


def test_resumed_with_another_micro_batch_and_with_the_one_that_memory_made_smaller(tmp_path, monkeypatch):
    """The last save before a kill: with the same recipe what fitted is gone on with, with another what it asks for."""
    monkeypatch.setattr(loop, "train_step", fails_once(torch.OutOfMemoryError("no")))
    job = make_job(tmp_path, total=4, micro_batch_tokens=512)
    smaller = train(job).budget
    assert smaller < 512
    for steps, asked, ran in ((5, 512, smaller), (6, 300, 300), (7, 300, 300), (8, 512, 512)):
        job = make_job(tmp_path, total=steps, micro_batch_tokens=asked)
        assert train(job, resume=True).budget == ran


def test_a_model_that_changes_in_place_what_a_method_keeps_is_told(tmp_path):
    """Falcon adds to what its layers give; DoRA's gradients need that as it was."""
    config = FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    method = methods.create(DoraSettings(rank=2))
    method.apply(model)
    job = job_of(tmp_path, model, random_part(tmp_path, 8), total=1, method=method, packing=False)
    with pytest.raises(FitoutError, match="changes in place what one of its layers gives") as error:
        train(job)
    assert "kind: lora" in error.value.hint


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    """A rate at which the first step overflows: its gradients were finite, so that it was not skipped."""
    job = make_job(tmp_path, total=4, lr=1e38, save_every=1)
    with pytest.raises(FitoutError, match="weights are no longer finite after step") as error:
        train(job)
    assert "train.lr" in error.value.hint
    assert not [path for path in job.run.checkpoints.glob("step-*")]


def test_out_of_memory_to_the_end(tmp_path, monkeypatch):
    """Halved, then activations recomputed in more and more layers, then given up with advice; the log tells each."""
    monkeypatch.setattr(loop, "train_step", fails_once(torch.OutOfMemoryError("no"), times=100, at_call=1))
    job = make_job(tmp_path)
    with pytest.raises(FitoutError, match="memory ran out on a single sample") as error:
        train(job)
    assert "data.max_length" in error.value.hint
    told = events(job.run.log, "oom")
    budgets = [row["micro_batch_tokens"] for row in told if "micro_batch_tokens" in row]
    assert budgets == sorted(budgets, reverse=True) and len(budgets) == len(set(budgets)) >= 2
    assert [row["gradient_checkpointing"] for row in told[len(budgets) :]] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("fails", [{4}, {4, 6}], ids=["once", "twice"])
def test_out_of_memory_in_a_save(tmp_path, monkeypatch, fails):
    """Once: written again, the same run. Twice: told with advice, the checkpoint before it whole, no half-written one,
    and going on from it is the same run too."""
    want = make_job(tmp_path / "calm", save_every=3)
    train(want)
    real, calls = checkpoint.write_tensors, []

    def short(path, tensors):
        calls.append(path.name)  # two files a save: the fourth is the optimizer's of step 6
        if len(calls) in fails:
            path.write_bytes(b"half")
            raise MemoryError
        return real(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", short)
    job = make_job(tmp_path / "short", save_every=3)
    if len(fails) == 1:
        train(job)
        assert [told["step"] for told in events(job.run.log, "oom")] == [6]
    else:
        with pytest.raises(FitoutError, match="memory ran out while the checkpoint of step 6 was written") as error:
            train(job)
        assert "adamw_8bit" in error.value.hint
        assert [path.name for path in job.run.checkpoints.iterdir() if path.is_dir()] == ["step-3"]
        job = make_job(tmp_path / "short", save_every=3)
        train(job, resume=True)
    assert losses(job.run.log) == losses(want.run.log)
    for name, tensor in trained_tensors(job.model).items():
        assert tensor.equal(trained_tensors(want.model)[name])


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("memory"))
    monkeypatch.setattr(loop, "train_step", fails_once(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(make_job(tmp_path))


def test_recomputed_activations_give_the_same_training(tmp_path):
    ran = {}
    for asked in (False, 0.5, True):
        job = make_job(tmp_path / str(asked), gradient_checkpointing=asked)
        progress = train(job)
        assert progress.recomputed == float(asked) * progress.tokens
        ran[asked] = [x for _, x in losses(job.run.log)]
    assert ran[0.5] == ran[False] and ran[True] == ran[False]


@pytest.mark.parametrize(
    ("settings", "share", "recomputed"),
    [(LoraSettings(), 0.5, [True, False]), (LoraSettings(), 1.0, [True, True]),
     (FullSettings(last_layers=1), 1.0, [True, True]), (FullSettings(last_layers=1), 0.5, [True, True])],
)  # fmt: skip
def test_recomputing_goes_from_the_lowest_layer_up_and_asks_for_no_more_gradients(settings, share, recomputed):
    model = tiny_llama()
    methods.create(settings).apply(model)
    found = recompute_activations(model, share)
    assert [layer.gradient_checkpointing for layer in model.model.layers] == recomputed
    assert found == (0.5 if isinstance(settings, FullSettings) or share == 0.5 else 1.0)
    asked = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, given: asked.append(given[0].requires_grad))
    model.train()
    model(input_ids=torch.arange(9)[None], segments=(Segment(0, 9),), use_cache=False)
    assert asked == [False, not isinstance(settings, FullSettings)]


def test_nothing_is_recomputed_where_no_layer_is_trained():
    """A head alone: the backward pass ends before the layers."""
    model = tiny_llama()
    methods.create(LoraSettings(rank=4, targets=["lm_head"])).apply(model)
    assert recompute_activations(model) == 0


class Spoiled(Around):
    """An objective whose loss is not finite for some layouts."""

    def __init__(self, objective, when, value):
        self.objective, self.when, self.value = objective, when, value

    def loss(self, model, layout, total):
        loss = self.objective.loss(model, layout, total)
        return loss * self.value if self.when(layout) else loss


class Clock:
    """The number of the step that is being computed; and what the weights were after each."""

    def __init__(self, job):
        self.step, self.weights, self.job = 1, {}, job

    def start(self, info):
        self.step = info["from_step"] + 1

    def row(self, row):
        if "event" not in row:
            self.step = row["step"] + 1
            self.weights[row["step"]] = trained_tensors(self.job.model)

    def close(self):
        pass


def spoil(job, steps, value=float("nan")):
    """Has the loss not be finite in some steps; returns the clock that must listen."""
    clock = Clock(job)
    object.__setattr__(job, "objective", Spoiled(job.objective, lambda layout: clock.step in steps, value))
    return clock


def spoil_rows(job, rows, value=float("nan")):
    when = lambda layout: bool(np.isin(layout.target_sample, rows).any())  # noqa: E731
    object.__setattr__(job, "objective", Spoiled(job.objective, when, value))
    return job


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_finite_gradients_is_skipped(tmp_path, value):
    job = make_job(tmp_path, total=3)
    clock = spoil(job, {2}, value)
    progress = train(job, clock)
    seen = clock.weights
    assert progress.skipped == 1 and progress.step == 3
    [skipped] = events(job.run.log, "skipped")
    assert skipped["step"] == 2 and len(skipped["rows"]) == 8
    assert all(torch.equal(seen[1][name], seen[2][name]) for name in seen[1])
    assert not all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert all(torch.isfinite(t).all() for t in seen[3].values())
    assert [row["loss"] is None for row in read_jsonl(job.run.log) if "event" not in row] == [False, True, False]


@pytest.mark.parametrize("packing", [True, False])
def test_the_rows_that_are_not_finite_are_named_and_no_others(tmp_path, packing):
    """Two bad rows among the eight of a step, packed with good ones; the log names these two by file and line."""
    job = make_job(tmp_path, total=6, packing=packing)
    bad = job.batches.rows(1)[[2, 5]]
    train(spoil_rows(job, bad))
    told = events(job.run.log, "skipped")
    assert [row["step"] for row in told] == [2, *(row["step"] for row in told[1:])] and len(told) >= 2  # once an epoch
    assert told[0]["rows"] == [str(job.batches.part.origin(int(row))) for row in bad]
    named = {row for event in told for row in event["rows"]}
    assert named == set(told[0]["rows"])


def test_looking_for_the_rows_changes_no_later_step(tmp_path):
    """Dropout on: the same losses whether the rows of a skipped step were looked for or not."""
    ran = []
    for name, looked in (("looked", True), ("not", False)):
        job = make_job(tmp_path / name, total=4)
        clock = spoil(job, {2})
        with pytest.MonkeyPatch.context() as patch:
            if not looked:
                patch.setattr(loop._Run, "_culprits", lambda *_: [])
            train(job, clock)
        ran.append((losses(job.run.log)[2:], trained_tensors(job.model)))
    assert ran[0][0] == ran[1][0]
    assert all(torch.equal(ran[0][1][name], ran[1][1][name]) for name in ran[0][1])


def test_ten_such_steps_in_a_row_end_the_run(tmp_path):
    job = make_job(tmp_path, total=40)
    clock = spoil(job, range(12, 100))
    with pytest.raises(FitoutError, match="10 steps in a row") as error:
        train(job, clock)
    assert error.value.exit_code == 1 and "train.lr" in error.value.hint and "rows:" in error.value.hint
    assert len(losses(job.run.log)) == 11 + 9


def test_nine_in_a_row_do_not(tmp_path):
    job = make_job(tmp_path, total=25)
    assert train(job, spoil(job, {*range(2, 11), *range(12, 21)})).skipped == 18


def test_stop_at_the_first_such_step_by_policy(tmp_path):
    """on_nonfinite: stop. What was before it is in a checkpoint; mended, the run goes on to what it would have been."""
    job = make_job(tmp_path / "well", total=3)
    train(job)
    want = losses(job.run.log), trained_tensors(job.model)
    job = make_job(tmp_path / "bad", total=3, on_nonfinite="stop")
    bad = job.batches.rows(2)[:1]
    with pytest.raises(FitoutError, match="step 3 has no finite gradients, and train.on_nonfinite is stop") as error:
        train(spoil_rows(job, bad))
    assert error.value.exit_code == 1 and error.value.hint.endswith(f"rows: {job.batches.part.origin(int(bad[0]))}")
    assert [row["path"] for row in events(job.run.log, "saved")] == ["step-2"]
    job = make_job(tmp_path / "bad", total=3)
    train(job, resume=True)
    assert losses(job.run.log) == want[0]
    assert all(torch.equal(t, want[1][name]) for name, t in trained_tensors(job.model).items())


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path, monkeypatch):
    scripted(monkeypatch, [3.0, float("nan"), 2.0, float("inf"), 1.5, 1.6])
    job = make_job(tmp_path, total=10, evaluate_every=2)
    object.__setattr__(job, "validation", job.batches.part)
    progress = train(job)
    assert (progress.best_loss, progress.best_step) == (1.5, 8)
    assert progress.validation == [[0, 3.0], [2, None], [4, 2.0], [6, None], [8, 1.5], [10, 1.6]]


SCHEDULES = [
    # kind, warmup, total, rates by hand (peak 1)
    ("constant", 0, 4, [1, 1, 1, 1]),
    ("constant", 3, 5, [0.25, 0.5, 0.75, 1, 1]),
    ("linear", 0, 4, [1, 0.75, 0.5, 0.25]),
    ("linear", 1, 5, [0.5, 1, 0.75, 0.5, 0.25]),
    ("linear", 0.2, 10, [1 / 3, 2 / 3, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ("cosine", 0, 4, [1, 0.853553, 0.5, 0.146447]),
    ("cosine", 2, 6, [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
    ("cosine", 0.03, 3, [0.5, 1, 0.5]),
]


@pytest.mark.parametrize(("kind", "warmup", "total", "want"), SCHEDULES)
def test_schedule(kind, warmup, total, want):
    settings = TrainSettings(schedule=kind, warmup=warmup)
    rates = [learning_rate(step, total, 2e-4, settings) / 2e-4 for step in range(total)]
    assert rates == pytest.approx(want, abs=1e-6)
    assert learning_rate(total, total, 1.0, settings) == (1 if kind == "constant" else pytest.approx(0, abs=1e-12))


def test_the_rate_is_the_one_that_is_logged(tmp_path):
    job = make_job(tmp_path, total=4, schedule="linear")
    train(job)
    assert [row["lr"] for row in read_jsonl(job.run.log) if "event" not in row] == pytest.approx(
        [1e-3, 7.5e-4, 5e-4, 2.5e-4]
    )


def test_vectors_do_not_decay():
    model = tiny_llama()
    named = dict(model.named_parameters())
    groups = make_optimizer(named, TrainSettings(weight_decay=0.1), {}).param_groups
    assert [(g["weight_decay"], {p.ndim for p in g["params"]}) for g in groups] == [(0.1, {2}), (0.0, {1})]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def scripted(monkeypatch, values):
    values = iter(values)
    monkeypatch.setattr(loop, "mean_loss", lambda *_: (next(values), {}))


@pytest.mark.parametrize(
    ("patience", "steps", "stopped"), [(1, 6, True), (2, 8, True), (3, 12, False), (None, 12, False)]
)
@pytest.mark.parametrize("keep", ["best", "last"])
def test_early_stopping_and_best(tmp_path, monkeypatch, patience, steps, stopped, keep):
    """Validation every second step: base 3.0, then the best at step 4, worse at 6 and 8, a little better at 10."""
    scripted(monkeypatch, [3.0, 2.0, 1.0, 1.5, 1.6, 1.0, 1.2])
    job = make_job(tmp_path, total=12, evaluate_every=2, keep=keep, patience=patience, keep_last=1)
    object.__setattr__(job, "validation", job.batches.part)
    at_step = {}

    class Weights:
        def start(self, info):
            pass

        def row(self, row):
            if "event" not in row:
                at_step[row["step"]] = trained_tensors(job.model)

        def close(self):
            pass

    if patience == 3:  # equal is not better: 1.5, 1.6, 1.0 are three without improvement
        steps, stopped = 10, True
    progress = train(job, Weights())
    assert (progress.step, progress.stopped_early) == (steps, stopped)
    assert (progress.base_loss, progress.best_loss, progress.best_step) == (3.0, 1.0, 4)
    final = trained_tensors(job.model)
    assert all(torch.equal(final[name], at_step[4 if keep == "best" else steps][name]) for name in final)
    assert {p.name for p in job.run.checkpoints.glob("step-*")} == {"step-4", f"step-{steps}"}


def test_no_better_than_the_base_is_visible(tmp_path, monkeypatch):
    """Training that only makes it worse: best is the best of the trained, and the base's loss stands beside it."""
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    job = make_job(tmp_path, total=4, evaluate_every=2)
    object.__setattr__(job, "validation", job.batches.part)
    progress = train(job)
    assert (progress.base_loss, progress.best_loss, progress.best_step) == (1.0, 2.0, 2)


def test_checkpoints_kept(tmp_path):
    job = make_job(tmp_path, total=10, save_every=2, keep_last=2)
    train(job)
    assert {p.name for p in job.run.checkpoints.iterdir()} == {"step-8", "step-10", "LATEST"}
    assert (job.run.checkpoints / "LATEST").read_text().strip() == "step-10"


def test_a_damaged_older_checkpoint_ends_nothing(tmp_path):
    job = make_job(tmp_path, total=4, save_every=2, keep_last=3)
    train(job)
    (job.run.checkpoints / "step-2" / "state.json").write_text("{")
    job = make_job(tmp_path, total=10, save_every=2, keep_last=3)
    assert train(job, resume=True).step == 10
    assert {p.name for p in job.run.checkpoints.glob("step-*")} == {"step-6", "step-8", "step-10"}


def test_more_steps_for_a_finished_run(tmp_path):
    """Raising the number of steps of a finished constant-rate run gives the run that had them from the start."""
    job = make_job(tmp_path / "long", total=8)
    train(job)
    want = losses(job.run.log), trained_tensors(job.model)
    train(make_job(tmp_path / "grown", total=5))
    job = make_job(tmp_path / "grown", total=8)
    train(job, resume=True)
    assert losses(job.run.log) == want[0]
    assert all(torch.equal(t, want[1][name]) for name, t in trained_tensors(job.model).items())
