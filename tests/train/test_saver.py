"""Checkpoints written while the training goes on: the same bytes as those that it stands for."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from fitout.errors import FitoutError, Stopped
from fitout.files import read_jsonl, sha256_file
from fitout.model.load import Pending
from fitout.train import saver
from fitout.train.backend import Backend
from fitout.train.checkpoint import Checkpoints, verify
from tests.conftest import tiny_llama
from tests.equal.small import events, job_of, losses, random_part, train, trained_tensors

SETTINGS = {"batch_size": 4, "save_every": 2, "keep_last": 10}


@pytest.fixture
def aside(monkeypatch):
    monkeypatch.setattr(Backend, "saves_aside", property(lambda self: True))


def make_job(folder, total=8, **settings):
    return job_of(folder, tiny_llama(), random_part(folder, 24), total=total, **{**SETTINGS, **settings})


def held(monkeypatch):
    """Saving waits, once it has begun, until the event that is returned is set."""
    go, real = threading.Event(), Checkpoints.save

    def save(self, step, *rest):
        assert go.wait(60)
        return real(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", save)
    return go


class At:
    """A listener that does something after a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def start(self, info): ...

    def row(self, row):
        if row.get("step") == self.step and "event" not in row:
            self.do()

    def close(self): ...


def hashes(run):
    return {
        file.relative_to(run.checkpoints).as_posix(): sha256_file(file)
        for file in sorted(run.checkpoints.rglob("*.safetensors"))
    }


def test_the_same_checkpoints_as_when_the_training_stands(tmp_path, monkeypatch):
    """The first write is held until three steps later, so what it writes would be seen if it were not a copy."""
    job = make_job(tmp_path / "stands")
    train(job)
    want, want_losses, want_weights = hashes(job.run), losses(job.run.log), trained_tensors(job.model)
    assert len(want) == 8 and all(row["seconds"] > 0 for row in events(job.run.log, "saved"))

    monkeypatch.setattr(Backend, "saves_aside", property(lambda self: True))
    go = held(monkeypatch)
    job = make_job(tmp_path / "aside")
    train(job, At(3, go.set))  # the next save, of step 4, waits for the first
    assert hashes(job.run) == want and losses(job.run.log) == want_losses
    assert all(torch.equal(tensor, want_weights[name]) for name, tensor in trained_tensors(job.model).items())
    told = [(row.get("event"), row["step"]) for row in read_jsonl(job.run.log)]
    assert told.index((None, 3)) < told.index(("saved", 2))
    assert [row["path"] for row in events(job.run.log, "saved")] == ["step-2", "step-4", "step-6", "step-8"]


def test_what_goes_wrong_in_the_thread_ends_the_run(tmp_path, monkeypatch, aside):
    real = Checkpoints.save

    def save(self, step, *rest):
        if step == 4:
            raise FitoutError("cannot write: No space left on device", where="here")
        return real(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", save)
    job = make_job(tmp_path)
    with pytest.raises(FitoutError, match="No space left"):
        train(job)
    assert [row["path"] for row in events(job.run.log, "saved")] == ["step-2"]
    newest, passed_over = Checkpoints(job.run.checkpoints).newest()
    assert newest.folder.name == "step-2" and not passed_over
    assert losses(job.run.log)[-1][0] <= 6  # and that at the latest when the next one is due


def test_a_stop_waits_for_what_is_being_written(tmp_path, monkeypatch, aside):
    go = held(monkeypatch)
    job = make_job(tmp_path, save_every=3)

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.2, go.set).start()

    with pytest.raises(Stopped):
        train(job, At(5, stop))
    assert verify(job.run.checkpoints / "step-3") is None and verify(job.run.checkpoints / "step-5") is None
    assert (job.run.checkpoints / "LATEST").read_text() == "step-5\n"


def test_without_the_room_for_a_copy_the_training_stands(tmp_path, monkeypatch, aside):
    monkeypatch.setattr(saver, "available_memory", lambda: 1000)
    threads = set()
    real = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints, "save", lambda self, *rest: threads.add(threading.current_thread().name) or real(self, *rest)
    )
    job = make_job(tmp_path, total=2)
    train(job)
    assert threads == {threading.main_thread().name} and len(hashes(job.run)) == 2


def test_memory_that_runs_out_in_the_thread(tmp_path, monkeypatch, aside):
    """It is written again, while the training stands; in vain once more, and the run ends with advice."""
    job = make_job(tmp_path / "calm")
    train(job)
    want, real = hashes(job.run), Checkpoints.save

    def failing(times):
        calls = []

        def save(self, step, *rest):
            calls.append(threading.current_thread().name)
            if step == 4 and len(calls) <= 1 + times:
                raise MemoryError
            return real(self, step, *rest)

        monkeypatch.setattr(Checkpoints, "save", save)
        return calls

    calls = failing(1)
    job = make_job(tmp_path / "once")
    train(job)
    assert hashes(job.run) == want and calls[2] == threading.main_thread().name != calls[1]
    assert [row["path"] for row in events(job.run.log, "saved")] == ["step-2", "step-4", "step-6", "step-8"]
    failing(2)
    with pytest.raises(FitoutError, match="memory ran out while the checkpoint of step 4 was written"):
        train(make_job(tmp_path / "twice"))


def test_no_rank_goes_on_before_the_last_checkpoint_is_written(tmp_path, monkeypatch, aside):
    """What ends one rank may end the others: the barrier of an end comes after the writing."""
    seen, real = [], Checkpoints.save

    def save(self, step, *rest):
        time.sleep(0.2)
        seen.append(f"written {step}")
        return real(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(Backend, "barrier", lambda self: seen.append("barrier"))
    with pytest.raises(Stopped):
        train(make_job(tmp_path / "stopped"), At(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert seen[-2:] == ["written 3", "barrier"]
    seen.clear()
    train(make_job(tmp_path / "finished", total=2))
    assert seen[-2:] == ["written 2", "barrier"]


def test_another_error_does_not_lose_what_was_being_written(tmp_path, monkeypatch, aside):
    go = held(monkeypatch)
    job = make_job(tmp_path)

    def fail():
        go.set()
        raise ValueError("of something else")

    with pytest.raises(ValueError, match="something else"):
        train(job, At(3, fail))
    assert [row["path"] for row in events(job.run.log, "saved")] == ["step-2"]
    assert verify(job.run.checkpoints / "step-2") is None


def test_what_is_brought_together_is_copied_too():
    """Over one rank a divided tensor's whole may be the part itself."""
    live = torch.zeros(3)
    copy = saver._copied({"x": Pending(live.shape, live.dtype, lambda: live)})
    live += 1
    assert copy["x"].tolist() == [0, 0, 0]
