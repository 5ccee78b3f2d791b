"""Stopped, crashed or killed, and resumed = uninterrupted, bit for bit (CPU, fp32), dropout included."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fitout.errors import CheckError, RequestError, Stopped
from fitout.files import read_json, read_jsonl
from fitout.model.methods import LoraSettings
from fitout.objectives import OBJECTIVES, create

from .small import (
    METHODS_UNDER_TEST,
    Around,
    adapted,
    call,
    command,
    environment,
    events,
    job_of,
    losses,
    pair_part,
    random_part,
    train,
    trained_tensors,
)

TOTAL = 14
KINDS = {
    **METHODS_UNDER_TEST,
    "8 bit": LoraSettings(rank=128),
    "paged": LoraSettings(rank=128),
}  # wide enough for 8-bit moments
OPTIMIZERS = {"8 bit": "adamw_8bit", "paged": "paged_adamw_8bit"}


class AtStep:
    """Does something after the row of a step is written."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def start(self, info):
        pass

    def row(self, row):
        if row.get("step") == self.step and "event" not in row:
            self.act()

    def close(self):
        pass


class Crash(Exception):
    pass


def crash():
    raise Crash


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """What a power loss takes is tested elsewhere; here a thousand checkpoints are written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def make_job(folder, kind, *, objective=None, **more):
    """Two epochs of 7 steps: shuffled, dropout on, packed with shared prefixes, in micro-batches of about a third of a
    step, with a schedule, validations and moments."""
    settings = KINDS[kind]
    if "dropout" in type(settings).model_fields:
        settings = settings.model_copy(update={"dropout": 0.1})
    model, method = adapted(settings, **({"dropout": 0.1} if kind == "full" else {}))
    if kind in OPTIMIZERS:
        more = {"optimizer": OPTIMIZERS[kind], **more}
    settings = {
        "save_every": 4, "evaluate_every": 3, "schedule": "cosine", "warmup": 3, "weight_decay": 0.01,
        "micro_batch_tokens": 64,
    }  # fmt: skip
    pairs = objective is not None and objective.wants == "preference pair"
    job = job_of(
        folder,
        model,
        pair_part(folder, 26) if pairs else random_part(folder, 26, prefix=20),
        total=TOTAL,
        lr=more.pop("lr", 3e-3),
        method=method,
        validation=(pair_part if pairs else random_part)(folder, 6, seed=9, name="validation"),
        **{**settings, **more},
    )
    if objective:
        object.__setattr__(job, "objective", create(objective))
    return job


def test_the_job_is_what_it_says(tmp_path):
    job = make_job(tmp_path, "lora")
    steps = [job.batches.layouts(step, budget=64) for step in range(TOTAL)]
    assert sum(len(layouts) >= 3 for layouts in steps) >= TOTAL - 4  # the last of an epoch has two samples
    assert sum(any(s.parent >= 0 for x in layouts for s in x.segments) for layouts in steps) >= TOTAL // 2
    assert job.batches.epoch_of(TOTAL) == (2, 0)
    assert not np.array_equal(job.batches.rows(0), job.batches.rows(7))


class Seen(Around):
    """An objective that notes which samples each step trained; of steps made again after a crash only the last time."""

    def __init__(self, notes):
        self.notes, self.step = notes, 1

    def over(self, job):
        self.objective = job.objective
        object.__setattr__(job, "objective", self)
        return self

    def loss(self, model, layout, total):
        if model.training:
            self.notes.setdefault(self.step, []).extend(np.unique(layout.target_sample).tolist())
        return self.objective.loss(model, layout, total)

    def start(self, info):
        self.step = info["from_step"] + 1
        for step in [step for step in self.notes if step > info["from_step"]]:
            del self.notes[step]

    def row(self, row):
        if "event" not in row:
            self.step = row["step"] + 1

    def close(self):
        self.notes.pop(self.step, None)  # of a step that was given up nothing is kept


def assert_each_once_an_epoch(notes, rows=26, steps=7):
    for epoch in range(TOTAL // steps):
        seen = [row for step in range(epoch * steps, (epoch + 1) * steps) for row in notes[step + 1]]
        seen = seen if len(seen) == rows else [row // 2 for row in seen if row % 2]  # the rejected answers of pairs
        assert sorted(seen) == list(range(rows)), epoch


def outcome(job, progress):
    told = {k: v for k, v in vars(progress).items() if k not in ("seconds", "waited")}
    return losses(job.run.log), told, trained_tensors(job.model) | job.method.state(job.model)


def assert_same(got, want):
    assert got[0] == want[0]
    assert got[1] == want[1]
    assert got[2].keys() == want[2].keys()
    assert all(torch.equal(got[2][name], want[2][name]) for name in want[2])


def assert_resumes_everywhere(tmp_path, kind, **how):
    """Stopped after every single step, and crashed at odd ones: each time the run that nobody disturbed."""
    job = make_job(tmp_path / "whole", kind, **how)
    want = outcome(job, train(job))
    steps = want[1]["step"]
    assert [step for step, _ in want[0]] == list(range(1, steps + 1))

    notes = {}
    for step in range(1, steps):
        job = make_job(tmp_path / "stopped", kind, **how)
        seen = Seen(notes).over(job)
        with pytest.raises(Stopped, match=f"SIGTERM after step {step} of 14"):
            train(job, seen, AtStep(step, terminate), resume=step > 1)
        assert read_json(job.run.checkpoints / f"step-{step}" / "state.json")["progress"]["step"] == step
    job = make_job(tmp_path / "stopped", kind, **how)
    seen = Seen(notes).over(job)
    assert_same(outcome(job, train(job, seen, resume=True)), want)
    assert [e["step"] for e in events(job.run.log, "resumed")] == list(range(1, steps))
    if steps == TOTAL:
        assert_each_once_an_epoch(notes)
    job = make_job(tmp_path / "stopped", kind, **how)
    assert_same(outcome(job, train(job, resume=True)), want)  # interrupted after the end: nothing is trained on

    notes = {}
    for step in (2, 7, 7, 11):  # the newest checkpoint is an older one: later rows of the log are made again
        job = make_job(tmp_path / "crashed", kind, **how)
        seen = Seen(notes).over(job)
        if step < steps:
            with pytest.raises(Crash):
                train(job, seen, AtStep(step, crash), resume=True)
            assert losses(job.run.log)[-1][0] == step
    job = make_job(tmp_path / "crashed", kind, **how)
    seen = Seen(notes).over(job)
    assert_same(outcome(job, train(job, seen, resume=True)), want)
    if steps == TOTAL:
        assert_each_once_an_epoch(notes)
    return want


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_at_every_step_equals_uninterrupted(tmp_path, kind):
    want = assert_resumes_everywhere(tmp_path, kind, keep="last")
    assert [step for step, _ in want[1]["validation"]] == [0, 3, 6, 9, 12, 14]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda settings: settings.model_fields["kind"].default)
def test_and_for_every_objective(tmp_path, objective):
    assert_resumes_everywhere(tmp_path, "lora", keep="best", objective=objective())


@pytest.mark.parametrize("kind", ["full", "sparse"])
def test_and_with_early_stopping_and_the_best_kept(tmp_path, kind):
    """Random targets: the validation loss soon rises."""
    want = assert_resumes_everywhere(tmp_path, kind, keep="best", patience=2, lr=3e-2, evaluate_every=2)
    assert want[1]["stopped_early"] and 4 < want[1]["step"] < TOTAL and want[1]["best_step"] < want[1]["step"]


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    train(make_job(tmp_path, "lora"))
    job = make_job(tmp_path, "lora")
    object.__setattr__(job, "total_steps", 5)
    with pytest.raises(RequestError, match="14 steps are done, and the recipe asks for 5"):
        train(job, resume=True)


class Asks(Around):
    """An objective in whose call number `at` the process is asked to stop."""

    def __init__(self, objective, at, *, training):
        self.objective, self.at, self.training, self.calls = objective, at, training, 0

    def loss(self, model, layout, total):
        if model.training == self.training:
            self.calls += 1
            if self.calls == self.at:
                terminate()
        return self.objective.loss(model, layout, total)


@pytest.mark.parametrize(
    ("training", "calls", "done"),
    [
        (True, [1, 5, 9, 11, 3], None),  # in the first, second, ... micro-batch of steps here and there
        (False, [1, 2, 7, 3], [0, 0, 9, 12]),  # in the validation before step 1, again there, after 9, after 12
    ],
)
def test_stopped_within_a_step_or_a_validation(tmp_path, training, calls, done):
    """What was being computed is given up; the checkpoint is of the last whole step, and a validation is done again."""
    job = make_job(tmp_path / "whole", "lora", keep="best")
    want = outcome(job, train(job))
    saved = []
    for at in calls:
        job = make_job(tmp_path / "stopped", "lora", keep="best")
        object.__setattr__(job, "objective", Asks(job.objective, at, training=training))
        with pytest.raises(Stopped, match="a checkpoint is saved"):
            train(job, resume=True)
        saved.append(int((job.run.checkpoints / "LATEST").read_text().removeprefix("step-")))
        assert saved[-1] == (losses(job.run.log) or [(0, 0)])[-1][0]
    assert saved == sorted(saved) and (done is None or saved == done)
    job = make_job(tmp_path / "stopped", "lora", keep="best")
    assert_same(outcome(job, train(job, resume=True)), want)


@pytest.mark.parametrize("calls", [[1, 2], [5, 3], [8, 9]])
def test_stopped_while_the_reference_is_computed(tmp_path, calls):
    """Of 26 and 6 pairs, in micro-batches of 64 tokens: all of these calls come before the first step."""
    objective = OBJECTIVES[3]()
    assert create(objective).refers
    job = make_job(tmp_path / "whole", "lora", objective=objective)
    want = outcome(job, train(job))
    for at in calls:
        job = make_job(tmp_path / "stopped", "lora", objective=objective)
        object.__setattr__(job, "objective", Asks(job.objective, at, training=False))
        with pytest.raises(Stopped, match="after step 0 of"):
            train(job, resume=True)
        assert not job.run.references.exists()
    job = make_job(tmp_path / "stopped", "lora", objective=objective)
    assert_same(outcome(job, train(job, resume=True)), want)


def test_stopped_after_the_last_step_does_not_go_on(tmp_path):
    """Asked while the last checkpoint is written: it is finished, and nothing after it begins."""
    job = make_job(tmp_path, "lora", keep="last", evaluate_every=100)
    with pytest.raises(Stopped, match="after step 14 of 14"):
        train(job, AtStep(TOTAL, terminate))
    job = make_job(tmp_path, "lora", keep="last", evaluate_every=100)
    assert train(job, resume=True).step == TOTAL


def test_dropout_is_really_there(tmp_path):
    """Another seed changes the first loss, or the equality above would say nothing about random streams."""
    first = []
    for seed in (0, 0, 1):
        job = make_job(tmp_path / f"{len(first)}", "lora", batch_size=26, seed=seed)
        job.settings.seed = seed
        object.__setattr__(job, "total_steps", 1)
        train(job)
        first.append(losses(job.run.log)[0][1])
    assert first[0] == first[1] != first[2]


@pytest.mark.parametrize("damage", ["byte", "torn", "manifest", "missing"])
def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, damage):
    job = make_job(tmp_path / "whole", "lora", keep="last", evaluate_every=100)
    want = outcome(job, train(job))
    folder = tmp_path / "hurt"
    job = make_job(folder, "lora", keep="last", evaluate_every=100)
    with pytest.raises(Crash):
        train(job, AtStep(10, crash))
    newest = job.run.checkpoints / "step-8"
    for named_by_hand in ("step-8-copy", "step-notes"):
        (job.run.checkpoints / named_by_hand).mkdir()
    file = newest / "weights.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "byte":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "torn":
        file.write_bytes(content[:-7])
    elif damage == "manifest":
        (newest / "manifest.json").write_text('{"format": 1, "files"')
    else:
        (newest / "optimizer.safetensors").unlink()
    job = make_job(folder, "lora", keep="last", evaluate_every=100)
    assert_same(outcome(job, train(job, resume=True)), want)
    [resumed] = events(job.run.log, "resumed")
    assert resumed["step"] == 4
    assert len(resumed["passed_over"]) == 1 and resumed["passed_over"][0].startswith("step-8: ")


def test_all_checkpoints_damaged_is_not_silent(tmp_path):
    """Beginning again from step 0 over a run's checkpoints must be told."""
    job = make_job(tmp_path, "lora", keep="last", evaluate_every=100)
    with pytest.raises(Crash):
        train(job, AtStep(10, crash))
    for file in job.run.checkpoints.glob("step-*/weights.safetensors"):
        file.write_bytes(b"")
    job = make_job(tmp_path, "lora", keep="last", evaluate_every=100)
    try:
        train(job, resume=True)
    except CheckError as error:
        assert "damaged" in error.message
    else:
        told = [row for row in read_jsonl(job.run.log) if row.get("passed_over")]
        assert told and len(told[0]["passed_over"]) == 2


@pytest.mark.parametrize("what", ["data", "recipe"])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, what):
    job = make_job(tmp_path, "lora", identity={"data": "a", "recipe": {"train.lr": 1}})
    with pytest.raises(Crash):
        train(job, AtStep(10, crash))
    before = job.run.log.read_bytes()
    other = {"data": "a", "recipe": {"train.lr": 1}, what: {"train.lr": 2}}
    job = make_job(tmp_path, "lora", identity=other)
    told = {"data": "another data$", "recipe": r"another recipe \(train.lr: 1 -> 2\)$"}[what]
    with pytest.raises(CheckError) as error:
        train(job, resume=True)
    assert re.search(told, error.value.message)
    assert error.value.harm and error.value.hint
    assert job.run.log.read_bytes() == before


def test_killed_at_a_random_moment_and_run_again(tmp_path, whole_run):
    """The real command line: kill -9, the same command again; then every file that holds numbers is the same."""
    recipe, whole = whole_run
    killed = tmp_path / "killed"
    moment = random.randint(2, 28)
    arguments = ("run", recipe, "--out", killed, "--set", "export.merge=false")
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        log = killed / "log.jsonl"
        if log.exists() and log.read_text().count('"lr"') >= moment:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert json.loads((killed / "run.json").read_text())["status"] == "running"
    call(*arguments)
    assert json.loads((killed / "run.json").read_text())["status"] == "done"
    assert losses(killed / "log.jsonl") == losses(whole / "log.jsonl"), f"killed after row {moment}"
    want, got = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (whole, killed))
    assert want.keys() == got.keys() and all(torch.equal(got[name], want[name]) for name in want), moment
    assert (killed / "evaluation" / "predictions.jsonl").read_bytes() == (
        whole / "evaluation" / "predictions.jsonl"
    ).read_bytes()
    again = call("run", recipe, "--out", killed, "--set", "train.lr=0.5", code=2)
    assert "another recipe" in again.stderr and "train.lr" in again.stderr
