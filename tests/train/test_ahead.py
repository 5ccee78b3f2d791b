"""Layouts made ahead are those that would be made when asked; the thread's errors and its end."""

from __future__ import annotations

import threading
import time
import traceback

import pytest

from fitout.data.batches import Batches
from fitout.model.methods import LoraSettings
from fitout.train import loop
from fitout.train.ahead import DEPTH, Ahead
from tests.equal.small import adapted, job_of, losses, random_part, train


class Noted:
    """Makes strings for layouts, and notes what was asked."""

    def __init__(self):
        self.asked: list[tuple[int, int]] = []
        self.threads: set[str] = set()

    def __call__(self, step, budget):
        self.asked.append((step, budget))
        self.threads.add(threading.current_thread().name)
        return [f"{step} under {budget}"]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fitout")]


def settled(ahead):
    for future in list(ahead._coming.values()):
        future.result()


def test_the_next_steps_are_made_before_they_are_asked_for():
    make = Noted()
    ahead = Ahead(make, end=5)
    assert ahead.get(0, 64) == ["0 under 64"]
    settled(ahead)
    assert make.asked == [(step, 64) for step in range(1 + DEPTH)]
    for step in range(1, 5):
        assert ahead.get(step, 64) == [f"{step} under 64"]
    assert sorted(make.asked) == [(step, 64) for step in range(5)]  # each once, and none beyond the end
    assert threading.current_thread().name not in make.threads
    ahead.close()
    assert not threads()


def test_another_budget_throws_away_what_was_made():
    make = Noted()
    ahead = Ahead(make, end=9)
    ahead.get(3, 64)
    settled(ahead)
    assert ahead.get(3, 32) == ["3 under 32"]  # the same step again, in smaller micro-batches
    assert ahead.get(4, 32) == ["4 under 32"]
    assert ahead.get(7, 32) == ["7 under 32"]  # and a jump
    assert ahead.get(7, 64) == ["7 under 64"]
    ahead.close()


def test_an_error_belongs_to_its_step_and_keeps_its_traceback():
    def make(step, budget):
        if step == 2:
            raise ValueError("row 17 is torn")
        return [step]

    ahead = Ahead(make, end=9)
    assert ahead.get(0, 1) == [0] and ahead.get(1, 1) == [1]
    with pytest.raises(ValueError, match="row 17 is torn") as error:
        ahead.get(2, 1)
    assert "in make" in "".join(traceback.format_tb(error.value.__traceback__))
    ahead.close()
    assert not threads()


def test_several_threads_may_ask_batches(tmp_path):
    """The order of many short epochs, asked by two threads at once, is the one that a single one finds."""
    part = random_part(tmp_path, 7)
    want = [Batches(part, batch_size=3, seed=1).epoch_of(step) for step in range(300)]
    for _ in range(5):
        batches = Batches(part, batch_size=3, seed=1)
        found: list[list[tuple[int, int]]] = [[], []]

        def ask(one, batches=batches):
            one.extend(batches.epoch_of(step) for step in range(300))

        racers = [threading.Thread(target=ask, args=(one,)) for one in found]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert found == [want, want]


def test_a_training_is_the_same_and_leaves_no_thread(tmp_path, monkeypatch):
    """Against a loop that makes each step's layouts when it needs them, over three epochs and a halved budget."""
    outcomes = []
    for name in ("ahead", "when asked"):
        model, method = adapted(LoraSettings(rank=4, dropout=0.1))
        job = job_of(tmp_path / name, model, random_part(tmp_path / name, 22), total=14, method=method,
                     evaluate_every=100, micro_batch_tokens=200)  # fmt: skip
        original, failed = loop.train_step, []

        def train_step(model, objective, layouts, *rest, original=original, failed=failed, **more):
            if not failed and len(layouts) == 1 and layouts[0].tokens > 60:
                failed.append(1)
                raise MemoryError
            time.sleep(0.005)  # long enough for the thread to be ahead
            return original(model, objective, layouts, *rest, **more)

        monkeypatch.setattr(loop, "train_step", train_step)
        if name == "when asked":
            monkeypatch.setattr(loop.Ahead, "get", lambda self, step, budget: self._make(step, budget))
        train(job)
        assert failed
        outcomes.append(losses(job.run.log))
        monkeypatch.undo()
        assert not threads()
    assert outcomes[0] == outcomes[1] and len(outcomes[0]) == 14


def test_an_error_in_the_data_ends_the_run_and_the_thread(tmp_path, monkeypatch):
    model, method = adapted(LoraSettings(rank=4))
    job = job_of(tmp_path, model, random_part(tmp_path, 22), total=9, method=method)
    layouts = job.batches.layouts

    def torn(step, **more):
        if step == 3:
            raise OSError("the file is gone")
        return layouts(step, **more)

    monkeypatch.setattr(job.batches, "layouts", torn)
    with pytest.raises(OSError, match="the file is gone"):
        train(job)
    assert [step for step, _ in losses(job.run.log)] == [1, 2, 3]
    assert not threads()
