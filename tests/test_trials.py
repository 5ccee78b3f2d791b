"""The plan of a comparison's runs, with trainings that are only told about."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fitout.errors import RequestError, RunExistsError
from fitout.files import write_json, write_jsonl
from fitout.rundir import RunDir
from fitout.trials import (
    Entry,
    Trial,
    TrialFailed,
    Trials,
    _reason,
    climb,
    parse_budget,
    parse_rates,
    rate_at,
    settle,
    sweep,
    validation_loss,
)


def bowl(best: float):
    """Losses that are lowest at a rate, and the rates that were asked."""
    asked = []

    def loss_of(rate: float) -> float:
        asked.append(rate)
        return (math.log10(rate) - math.log10(best)) ** 2

    return loss_of, asked


@pytest.mark.parametrize("best", [2e-4, 6e-4, 2e-5, 2e-2, 2e-6])
def test_climbing_finds_the_lowest_loss(best):
    loss_of, asked = bowl(best)
    found = climb(2e-4, loss_of)
    assert asked[0] == 2e-4 and len(set(asked)) == len(asked)
    assert found.chosen == min(found.tried, key=lambda rate: found.tried[rate])
    assert abs(math.log10(found.chosen / best)) <= 0.3
    assert not found.at_edge and list(found.tried) == sorted(asked)


def test_climbing_stops_and_says_that_the_best_is_at_the_edge():
    found = climb(2e-5, bowl(1e3)[0])
    assert found.chosen == rate_at(2e-5, 5) == 6e-3 and found.at_edge
    down = climb(2e-5, bowl(1e-12)[0])
    assert down.chosen == rate_at(2e-5, -5) and down.at_edge


def test_a_diverged_rate_is_never_chosen_and_all_diverged_is_a_failure():
    losses = {1e-4: 2.0, 1e-3: 1.0, 1e-2: math.inf}
    assert sweep(list(losses), losses.__getitem__).chosen == 1e-3
    assert climb(1e-2, lambda rate: math.inf if rate > 1e-3 else rate).chosen < 1e-3
    with pytest.raises(TrialFailed, match="diverged at every learning rate"):
        sweep([1e-2], lambda rate: math.inf)


def test_all_steps_may_take_a_lower_rate_than_a_part_of_them_did():
    found = sweep([1e-4, 1e-3, 1e-2, 1e-1], {1e-4: 3.0, 1e-3: 2.0, 1e-2: 1.0, 1e-1: math.inf}.__getitem__)
    whole, asked = {1e-2: 0.5, 1e-3: 0.3, 1e-4: 0.4}, []

    def loss_of(rate: float) -> float:
        asked.append(rate)
        return whole[rate]

    settled = settle(found, loss_of)
    assert settled.chosen == 1e-3 and asked == [1e-2, 1e-3, 1e-4]
    assert settled.whole == whole and settled.tried == found.tried and not settled.at_edge
    asked.clear()
    whole |= {1e-2: 0.2}
    assert settle(found, loss_of).chosen == 1e-2 and asked == [1e-2, 1e-3]  # lower ones would be worse still
    whole |= {1e-2: math.inf, 1e-3: math.inf}
    lowest = settle(found, loss_of)
    assert lowest.chosen == 1e-4 and lowest.at_edge
    with pytest.raises(TrialFailed, match="diverged at every learning rate"):
        settle(found, lambda rate: math.inf)


def test_rates_are_round():
    assert [rate_at(2e-5, step) for step in (-2, -1, 0, 1, 2, 3)] == [2e-6, 6e-6, 2e-5, 6e-5, 2e-4, 6e-4]


def test_budgets_and_rates_are_read():
    assert str(parse_budget("steps=200")) == "200 steps"
    assert parse_budget("tokens=1e6").amount == 1_000_000
    assert parse_budget("minutes=0.5").amount == 0.5
    for wrong in ("steps", "steps=", "steps=0", "steps=1.5", "hours=2", "minutes=nan", "tokens=-1", "minutes=inf"):
        with pytest.raises(RequestError, match="--budget"):
            parse_budget(wrong)
    assert parse_rates(["3e-4,1e-4", "lora=1e-3"], ["full", "lora"]) == {"": [1e-4, 3e-4], "lora": [1e-3]}
    for wrong in ("lora=", "fast", "lora=-1", "nope=1e-4", "lora=nan"):
        with pytest.raises(RequestError, match="--lrs"):
            parse_rates([wrong], ["lora"])


# a method's race, with `do` replaced: no process is started


class Told(Trials):
    """Runs that are only written down: `losses` by learning rate (of all steps: by ("whole", rate), where that is
    given), `broken` trials fail."""

    def __init__(self, folder: Path, losses=None, broken=lambda trial: ""):
        self.lines: list[str] = []
        super().__init__(folder, lambda trial: "", self.lines.append, lambda *_: None)
        self.losses, self.broken, self.done = losses or {}, broken, []

    def do(self, trial: Trial) -> RunDir:
        self.done.append(trial)
        if reason := self.broken(trial):
            raise TrialFailed(reason, where="log.txt")
        run = self.run_of(trial)
        loss = self.losses.get((trial.stage, trial.lr), self.losses.get(trial.lr, 1.0))
        training = {"validation": [[0, 9.0], [trial.steps, loss]], "best_step": trial.steps, "steps": trial.steps,
                    "step_seconds": 2.0, "tokens": 5, "trained_parameters": 1, "parameters": 2,
                    "skipped_steps": 0}  # fmt: skip
        run.update_status(training=training, device="cpu", precision="fp32", status="done", trained_steps=trial.steps)
        run.recipe.write_text("train: {keep: best}")
        write_jsonl(
            run.log, [{"step": n, "tokens": 100, "tokens_per_second": 50.0, "memory_mb": 400 + n} for n in (1, 2, 3)]
        )
        write_json(run.evaluation_report, {"counts": {"tuned": {"seconds": 1.0}}})
        return run


def entry(rates=None) -> Entry:
    return Entry("lora", {"kind": "lora"}, 2e-4, rates)


def test_the_validation_best_rate_trains_the_seeds(tmp_path):
    trials = Told(tmp_path, {1e-4: 0.9, 3e-4: 0.4, 1e-3: 0.6})
    told = trials.race(entry([1e-4, 3e-4, 1e-3]), [5, 6], 10, 0)
    assert told["lr"] == 3e-4 and told["rates"] == {"0.0001": 0.9, "0.0003": 0.4, "0.001": 0.6}
    swept = [one for one in trials.done if one.stage == "sweep"]
    assert {one.steps for one in swept} == {4} and {one.seed for one in swept} == {5}
    assert [(one.seed, one.lr, one.steps) for one in trials.done if one.stage == "runs"] == [
        (5, 3e-4, 10),
        (6, 3e-4, 10),
    ]
    assert list(told["runs"]) == ["5", "6"] and told["runs"]["5"]["memory_mb"] == 403 and not told["failed"]


def test_the_rate_that_all_steps_prefer_trains_the_seeds(tmp_path):
    trials = Told(tmp_path, {1e-4: 0.9, 3e-4: 0.5, 1e-3: 0.4, ("whole", 1e-3): 0.3, ("whole", 3e-4): 0.2})
    told = trials.race(entry([1e-4, 3e-4, 1e-3]), [5, 6], 10, 0)
    whole = [(one.lr, one.steps, one.seed) for one in trials.done if one.stage == "whole"]
    assert whole == [(1e-3, 10, 5), (3e-4, 10, 5), (1e-4, 10, 5)]
    assert told["lr"] == 3e-4 and told["whole"] == {"0.001": 0.3, "0.0003": 0.2, "0.0001": 0.9}
    assert {one.lr for one in trials.done if one.stage == "runs"} == {3e-4}


def test_one_given_rate_needs_no_sweep(tmp_path):
    trials = Told(tmp_path)
    assert trials.race(entry([7e-4]), [0], 10, 0)["lr"] == 7e-4
    assert [one.stage for one in trials.done] == ["runs"]


def test_minutes_become_steps_by_the_measured_speed(tmp_path):
    trials = Told(tmp_path)  # 100 tokens at 50 a second: two seconds a step
    assert trials.race(entry([1e-4]), [0], None, 3.0)["steps"] == 90
    assert any("2 s a step, so 90 steps in 3 minutes" in line for line in trials.lines)


def test_a_method_that_cannot_run_says_why_after_one_try(tmp_path):
    trials = Told(tmp_path, broken=lambda trial: "the package bitsandbytes is not installed")
    told = trials.race(entry(), [0, 1], 10, 0)
    assert told["failed"] == {"all": {"reason": "the package bitsandbytes is not installed", "log": "log.txt"}}
    assert len(trials.done) == 1 and told["runs"] == {}


def test_one_seed_that_fails_leaves_the_others(tmp_path):
    trials = Told(tmp_path, broken=lambda trial: "out of memory" if trial.stage == "runs" and trial.seed == 1 else "")
    told = trials.race(entry([1e-4]), [0, 1, 2], 10, 0)
    assert list(told["runs"]) == ["0", "2"] and told["failed"]["1"]["reason"] == "out of memory"


def test_a_rate_whose_gradients_broke_is_passed_over(tmp_path):
    """A failure whose last step has no finite gradient is a rate too high, not a method that cannot run."""
    trials = Told(tmp_path, {1e-4: 0.5}, broken=lambda trial: "no finite gradients" if trial.lr == 1e-2 else "")
    high = trials.run_of(Trial("sweep", "lora", 4, 0, 1e-2))
    high.path.mkdir(parents=True)
    write_jsonl(high.log, [{"step": 1, "grad_norm": None}])
    told = trials.race(entry([1e-4, 1e-2]), [0], 10, 0)
    assert told["lr"] == 1e-4 and told["rates"]["0.01"] == math.inf and not told["failed"]


@pytest.mark.parametrize(("keep", "loss"), [("best", 0.3), ("last", 0.5)])
def test_the_loss_is_of_the_weights_that_were_kept(tmp_path, keep, loss):
    run = RunDir(tmp_path)
    run.update_status(training={"validation": [[0, 2.0], [5, 0.3], [10, 0.5]], "best_step": 5})
    run.recipe.write_text(f"train: {{keep: {keep}}}")
    assert validation_loss(run) == loss


# the folder


def test_a_run_with_another_rate_is_not_taken_for_done(tmp_path):
    """An earlier version may have chosen another."""
    trials, trial = Told(tmp_path), Trial("runs", "lora", 10, 5, 3e-4)
    run = trials.do(trial)
    run.recipe.write_text("train: {keep: best, lr: 3.0e-4}")
    assert trials.finished(trial)
    assert not trials.finished(Trial("runs", "lora", 10, 5, 1e-3))
    assert not trials.finished(Trial("runs", "lora", 11, 5, 3e-4))


def test_another_request_is_refused_and_more_methods_are_not(tmp_path):
    trials = Told(tmp_path)
    request = {"recipe": {"a": 1}, "budget": "steps=5", "learning rates": {"": [1e-4]}}
    for _ in range(2):
        with trials.owned(request):
            pass
    with pytest.raises(RunExistsError, match="another budget"), trials.owned({**request, "budget": "steps=6"}):
        pass


def test_two_comparisons_in_one_folder_are_refused(tmp_path):
    trials = Told(tmp_path)
    with trials.owned({}), pytest.raises(RunExistsError, match="another process"), trials.owned({}):
        pass


def test_a_run_that_an_orphan_works_on_is_waited_for(tmp_path):
    trials, trial = Told(tmp_path), Trial("runs", "lora", 4, 0, 1e-3)
    run = trials.run_of(trial)
    code = (
        "import sys, time, pathlib; from fitout.rundir import RunDir\n"
        "with RunDir(pathlib.Path(sys.argv[1])).owned(): print('held', flush=True); time.sleep(1)"
    )
    root = str(Path(__file__).parents[1])
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert holder.stdout and holder.stdout.readline() == b"held\n"
    began = time.monotonic()
    trials._wait_until_free(run, trial)
    assert time.monotonic() - began > 0.5 and holder.wait() == 0
    assert len(trials.lines) == 1 and "still works on it" in trials.lines[0]


def test_a_reason_is_told_in_the_processs_own_words():
    assert _reason("loading\nerror there is no such file\n      Nothing was done.\n", 2) == (
        "there is no such file. Nothing was done."
    )
    assert _reason("Traceback\n  x\nRuntimeError: broken\n", 1) == "RuntimeError: broken"
    assert "memory ran out" in _reason("loading\n", -9)
    assert "SIGSEGV" in _reason("", -11)
    assert "exit code 7" in _reason("", 7)
