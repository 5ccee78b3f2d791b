"""`fitout plan`, the plan inside a run, and `method: auto`, through the real command line."""

from __future__ import annotations

import json

import pytest
import yaml

from fitout.plan import machine
from fitout.verbs.planning import Pace
from tests.cli.command import fitout, recipe, rows


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FITOUT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_plan_from_the_sources(tmp_path, home):
    rows(tmp_path / "rows.jsonl", 40)
    done = fitout("plan", recipe(tmp_path), "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    assert plan["model"]["parameters"] > 1e6 and plan["work"]["samples"] == 32
    assert {row["kind"] for row in plan["rows"]} >= {"full", "lora"}
    chosen = plan["chosen"]
    assert chosen["kind"] == "lora" and chosen["fits"] and chosen["step_seconds"] > 0
    assert sum(chosen["memory"]["terms_mb"].values()) == pytest.approx(chosen["memory"]["peak_mb"], abs=1)
    assert not (tmp_path / "runs").exists()  # a plan leaves nothing behind but what it learned of the machine


def test_a_plan_is_drawn(tmp_path, home):
    rows(tmp_path / "rows.jsonl")
    done = fitout("plan", recipe(tmp_path), "--device", "rtx4090-24g", "--devices", "2", "--length", "100",
                  "--samples", "5000", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    for words in ("activations", "ZeRO", "3 / FSDP", "not measured here", "it fits", "5,000 training samples"):
        assert words in done.out, words


def test_an_unknown_device_is_a_wrong_request(tmp_path, home):
    rows(tmp_path / "rows.jsonl")
    done = fitout("plan", recipe(tmp_path), "--device", "gtx1", "--length", "50", cwd=tmp_path)
    assert done.code == 2 and "rtx3090-24g" in done.err


@pytest.mark.parametrize("long", [False, True])
def test_a_run_is_planned_and_compared(tmp_path, home, monkeypatch, long):
    """Predicted and measured in run.json, one line at the end, and the history shown with the next plan. A short run's
    time is not predicted on a machine that was never measured: that would delay its first step."""
    if long:
        monkeypatch.setattr("fitout.verbs.planning.LONG", 0)
    rows(tmp_path / "rows.jsonl")
    done = fitout("train", recipe(tmp_path), "--set", "train.max_steps=6", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "plan: " in done.out and "predicted" in done.out and "measured" in done.out
    plan = json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())["plan"]
    assert plan["predicted"]["peak_mb"] > 0
    assert plan["predicted"]["step_seconds"] > 0 if long else plan["predicted"]["step_seconds"] is None
    assert long != ("a step takes" in done.out)
    assert (" a step, " in done.out) == long
    assert plan["measured"]["step_seconds"] > 0
    assert len((home / "plans.jsonl").read_text().splitlines()) == 1
    again = json.loads(fitout("plan", recipe(tmp_path), "--json", cwd=tmp_path).out)
    assert ("time by" in (again["past"] or "")) == long


def test_what_a_step_takes_is_said_once():
    said: list[str] = []
    pace = Pace(said.append)
    pace.start({"total_steps": 100, "from_step": 40})
    pace.row({"event": "evaluated", "step": 40})
    for step, seconds in enumerate((9.0, 1.0, 3.0, 2.0, 9.0), 41):
        pace.row({"step": step, "tokens": 500, "tokens_per_second": 500 / seconds})
    assert said == ["a step takes 2 s: 2 min for the other 56, without validation"]


def test_auto_is_resolved_and_kept(tmp_path, home):
    rows(tmp_path / "rows.jsonl")
    path = recipe(tmp_path)
    path.write_text(path.read_text().replace("{kind: lora, rank: 2, alpha: 4, targets: [q_proj]}", "{kind: auto}"))
    done = fitout("train", path, cwd=tmp_path)
    assert done.code == 0, done.err
    assert "method: auto takes lora" in done.out and "not full: with" in done.out
    resolved = yaml.safe_load((tmp_path / "runs" / "tiny" / "recipe.yaml").read_text())["method"]
    assert resolved["kind"] == "lora" and resolved["rank"] == 8
    again = fitout("train", path, "--resume", "--set", "train.max_steps=3", cwd=tmp_path)
    assert again.code == 0, again.err
    assert "auto takes" not in again.out  # it goes on with what it began with


def test_weights_that_cannot_fit_are_refused_before_loading(tmp_path, home, monkeypatch):
    rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(machine, "free_memory", lambda: 100 * 2**20)
    done = fitout("train", recipe(tmp_path), cwd=tmp_path)
    assert done.code == 2 and "the weights alone need" in done.err


def test_a_run_that_may_not_fit_is_warned(tmp_path, home, monkeypatch):
    rows(tmp_path / "rows.jsonl")
    path = recipe(tmp_path)
    monkeypatch.setattr(machine, "resident", lambda: 400 * 2**20)
    need = json.loads(fitout("plan", path, "--json", cwd=tmp_path).out)["chosen"]["memory"]
    little = need["terms_mb"]["framework"] + need["terms_mb"]["weights"] + 1
    monkeypatch.setattr(machine, "free_memory", lambda: int(little * 2**20))
    done = fitout("train", path, cwd=tmp_path)
    assert done.code == 0 and "warning: lora in fp32 needs" in done.out and "the largest term is" in done.out


def test_a_family_the_planner_does_not_know_trains_without_a_plan(tmp_path, home, monkeypatch):
    from fitout.model import shape

    rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(shape, "FAMILIES", {"other": shape.Family()})
    done = fitout("train", recipe(tmp_path), cwd=tmp_path)
    assert done.code == 0 and "no plan: the planner does not know" in done.out
    assert "plan" not in json.loads((tmp_path / "runs" / "tiny" / "run.json").read_text())


def test_auto_plans_the_method_that_it_takes(tmp_path, home):
    """Whatever methods the door lists last: by the stated order, and what does not fit is passed over."""
    from fitout import verbs
    from fitout.config import load
    from tests.equal.small import write_shell_recipe

    recipe = load(write_shell_recipe(tmp_path), ["method={kind: auto}"])
    found = verbs.plan(recipe, out=tmp_path / "run")
    assert found.chosen.kind == "lora"  # sixty samples
    assert found.advice[0] == "method: auto takes lora" and found.advice[1].startswith("not full: with")
    assert found.advice[2].startswith("lora: needs")
