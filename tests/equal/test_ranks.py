"""Two gloo ranks = one process, through the command line that a user types."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fitout import verbs
from fitout.config import build, load
from fitout.files import read_json, read_jsonl
from fitout.rundir import RunDir

from .ranks_worker import outcome
from .small import METHODS_UNDER_TEST, SHELL_RECIPE, call, environment, losses, write_shell_recipe


def test_two_ranks_equal_one_process(tmp_path, whole_run):
    recipe, one = whole_run
    two = tmp_path / "two"
    call("run", recipe, "--out", two, "--set", "export.merge=false", ranks=2)
    assert read_json(two / "run.json")["ranks"] == 2
    want, got = losses(one / "log.jsonl"), losses(two / "log.jsonl")
    assert [step for step, _ in got] == list(range(1, 31))  # one writer: each step stands there once
    assert [x for _, x in got] == pytest.approx([x for _, x in want], abs=1e-5)
    rows = [[r for r in read_jsonl(d / "log.jsonl") if "event" not in r] for d in (one, two)]
    for key in ("supervised_tokens", "lr"):  # not tokens: a shared prefix that two ranks need is computed by both
        assert [r[key] for r in rows[0]] == [r[key] for r in rows[1]]
    validation = [[r["validation_loss"] for r in read_jsonl(d / "log.jsonl") if r.get("event") == "evaluated"]
                  for d in (one, two)]  # fmt: skip
    assert len(validation[0]) == 4 and validation[0] == pytest.approx(validation[1], abs=1e-5)
    first, second = (load_file(d / "adapter" / "adapter_model.safetensors") for d in (one, two))
    assert first.keys() == second.keys() and len(first) == 2 * 7 * 6
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_two_ranks_equal_one_process_over_a_4_bit_base(tmp_path):
    """DoRA over NF4, begun as a part of the weight, with a module trained whole: all that ranks must agree on."""
    recipe = write_shell_recipe(tmp_path)
    changes = ["method={kind: qlora, dora: true, init: olora, rank: 4, alpha: 8, train_also: [lm_head]}"]
    changes += ["train.max_steps=6", "train.evaluate_every=100"]
    verbs.train(load(recipe, changes), out=tmp_path / "1")
    call("train", recipe, "--out", tmp_path / "2", *(x for change in changes for x in ("--set", change)), ranks=2)
    want, got = (losses(tmp_path / ranks / "log.jsonl") for ranks in "12")
    assert len(want) == 6 and [x for _, x in got] == pytest.approx([x for _, x in want], abs=1e-5)
    first, second = (load_file(tmp_path / ranks / "adapter" / "adapter_model.safetensors") for ranks in "12")
    assert first.keys() == second.keys() and len(first) == 3 * 7 * 6 + 2
    for name, tensor in first.items():  # AdamW makes a good part of a step of a gradient that is next to nothing
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-4, msg=name)
        assert ((second[name] - tensor).abs() > 1e-5).float().mean() < 2e-3, name


def test_a_later_rank_is_not_refused_by_the_first_ones_directory(tmp_path, monkeypatch):
    """`train` on two ranks: rank 1 comes to look when rank 0 has made the directory."""
    RunDir(tmp_path / "run").path.mkdir()
    RunDir(tmp_path / "run").update_status(status="running")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(verbs, "train_model", lambda *_, **__: None)
    verbs.train(build(yaml.safe_load(SHELL_RECIPE)), out=tmp_path / "run")


def test_every_method_trains_on_two_ranks_as_on_one(tmp_path):
    """Trained tensors and, where entries are chosen, the choice: the same on both ranks, and in one process."""
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *arguments, "-m", "tests.equal.ranks_worker", str(tmp_path)],
        env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in METHODS_UNDER_TEST:
        first, second = (load_file(tmp_path / f"{kind}-{rank}.safetensors") for rank in (0, 1))
        want = outcome(tmp_path / "one" / kind, kind)
        assert first.keys() == second.keys() == want.keys()
        for name, tensor in want.items():
            assert torch.equal(first[name], second[name]), (kind, name)
            torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5, msg=f"{kind}: {name}")
