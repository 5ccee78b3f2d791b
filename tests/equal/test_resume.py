"""Stopped, crashed or killed, and resumed = uninterrupted, bit for bit (CPU, fp32), dropout included."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from fitout.errors import CheckError, Stopped
from fitout.files import read_json, read_jsonl
from fitout.model.methods import LoraSettings

from .small import (
    METHODS_UNDER_TEST,
    adapted,
    call,
    command,
    environment,
    events,
    job_of,
    losses,
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


def make_job(folder, kind, **more):
    settings = KINDS[kind]
    if "dropout" in type(settings).model_fields:
        settings = settings.model_copy(update={"dropout": 0.1})
    model, method = adapted(settings, **({"dropout": 0.1} if kind == "full" else {}))
    if kind in OPTIMIZERS:
        more = {"optimizer": OPTIMIZERS[kind], **more}
    settings = {"save_every": 4, "evaluate_every": 3, "schedule": "cosine", "warmup": 3, "weight_decay": 0.01}
    return job_of(
        folder,
        model,
        random_part(folder, 26),
        total=TOTAL,
        lr=3e-3,
        method=method,
        validation=random_part(folder, 6, seed=9, name="validation"),
        **{**settings, **more},
    )


def outcome(job, progress):
    told = {k: v for k, v in vars(progress).items() if k not in ("seconds", "waited")}
    return losses(job.run.log), told, trained_tensors(job.model) | job.method.state(job.model)


def assert_same(got, want):
    assert got[0] == want[0]
    assert got[1] == want[1]
    assert got[2].keys() == want[2].keys()
    assert all(torch.equal(got[2][name], want[2][name]) for name in want[2])


@pytest.mark.parametrize(
    ("kind", "keep"), [*((kind, "best") for kind in ("lora", "full", "sparse")), *((kind, "last") for kind in KINDS)]
)
def test_stopped_or_crashed_and_resumed_equals_uninterrupted(tmp_path, kind, keep):
    job = make_job(tmp_path / "whole", kind, keep=keep)
    want = outcome(job, train(job))
    assert [step for step, _ in want[0]] == list(range(1, TOTAL + 1))
    assert [step for step, _ in want[1]["validation"]] == [0, 3, 6, 9, 12, 14]

    folder = tmp_path / "stopped"
    job = make_job(folder, kind, keep=keep)
    with pytest.raises(Stopped, match="SIGTERM after step 5 of 14"):
        train(job, AtStep(5, terminate))
    assert read_json(job.run.checkpoints / "step-5" / "state.json")["progress"]["step"] == 5
    job = make_job(folder, kind, keep=keep)
    with pytest.raises(Crash):  # the newest checkpoint is of step 8 or a best one: later rows of the log are made again
        train(job, AtStep(11, crash), resume=True)
    assert losses(job.run.log)[-1][0] == 11
    job = make_job(folder, kind, keep=keep)
    assert_same(outcome(job, train(job, resume=True)), want)
    assert [e["step"] for e in events(job.run.log, "resumed")] == [5, events(job.run.log, "resumed")[1]["step"]]


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
    with pytest.raises(CheckError, match=f"another {what}") as error:
        train(job, resume=True)
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
