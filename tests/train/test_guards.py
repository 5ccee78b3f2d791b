"""What may go wrong while training, and the decisions of the loop: memory, numbers, schedule, patience, best."""

from __future__ import annotations

import pytest
import torch

from fitout.errors import FitoutError
from fitout.files import read_jsonl
from fitout.train import TrainSettings, loop
from fitout.train.guard import is_out_of_memory
from fitout.train.optim import learning_rate, make_optimizer
from tests.conftest import tiny_llama
from tests.equal.small import events, job_of, losses, random_part, train, trained_tensors


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


def test_out_of_memory_to_the_end(tmp_path, monkeypatch):
    """Halved, then activations recomputed, then given up with advice; the log tells each."""
    monkeypatch.setattr(loop, "train_step", fails_once(torch.OutOfMemoryError("no"), times=100, at_call=1))
    job = make_job(tmp_path)
    with pytest.raises(FitoutError, match="memory ran out on a single sample") as error:
        train(job)
    assert "data.max_length" in error.value.hint
    told = events(job.run.log, "oom")
    budgets = [row["micro_batch_tokens"] for row in told if "micro_batch_tokens" in row]
    assert budgets == sorted(budgets, reverse=True) and len(budgets) == len(set(budgets)) >= 2
    assert told[-1]["gradient_checkpointing"] is True
    assert job.model.is_gradient_checkpointing


def test_other_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and not is_out_of_memory(ValueError("memory"))
    monkeypatch.setattr(loop, "train_step", fails_once(RuntimeError("shape mismatch")))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(make_job(tmp_path))


def test_recomputed_activations_give_the_same_training(tmp_path):
    ran = []
    for name, on in (("kept", False), ("recomputed", True)):
        job = make_job(tmp_path / name, gradient_checkpointing=on)
        train(job)
        assert job.model.is_gradient_checkpointing is on
        ran.append([x for _, x in losses(job.run.log)])
    assert ran[0] == pytest.approx(ran[1], abs=1e-6)


class Spoiled:
    """An objective whose loss is not finite at some calls."""

    def __init__(self, objective, calls, value):
        self.objective, self.calls, self.value, self.seen = objective, calls, value, 0

    def units(self, layouts):
        return self.objective.units(layouts)

    def loss(self, model, layout, total):
        self.seen += 1
        loss = self.objective.loss(model, layout, total)
        return loss * self.value if self.seen in self.calls else loss


def spoil(job, calls, value):
    object.__setattr__(job, "objective", Spoiled(job.objective, calls, value))
    return job


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_finite_gradients_is_skipped(tmp_path, value):
    job = spoil(make_job(tmp_path, total=3), {2}, value)
    seen = []

    class Weights:
        def start(self, info):
            pass

        def row(self, row):
            if "event" not in row:
                seen.append(trained_tensors(job.model))

        def close(self):
            pass

    progress = train(job, Weights())
    assert progress.skipped == 1 and progress.step == 3
    [skipped] = events(job.run.log, "skipped")
    assert skipped["step"] == 2 and skipped["rows"]
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert not all(torch.equal(seen[1][name], seen[2][name]) for name in seen[0])
    assert all(torch.isfinite(t).all() for t in seen[2].values())
    assert [row["loss"] is None for row in read_jsonl(job.run.log) if "event" not in row] == [False, True, False]


def test_ten_such_steps_in_a_row_end_the_run(tmp_path):
    job = spoil(make_job(tmp_path, total=40), set(range(12, 100)), float("nan"))
    with pytest.raises(FitoutError, match="10 steps in a row") as error:
        train(job)
    assert error.value.exit_code == 1 and "train.lr" in error.value.hint and "rows:" in error.value.hint
    assert len(losses(job.run.log)) == 11 + 9


def test_nine_in_a_row_do_not(tmp_path):
    job = spoil(make_job(tmp_path, total=25), set(range(2, 11)) | set(range(12, 21)), float("nan"))
    assert train(job).skipped == 18


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
    monkeypatch.setattr(loop, "mean_loss", lambda *_: next(values))


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
