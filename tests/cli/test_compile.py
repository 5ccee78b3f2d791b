"""`train.compile`: when it is taken, that a run keeps it, and what is said where it does not work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fitout.model import between
from fitout.rundir import RunDir
from tests.cli.command import fitout, recipe, rows


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A small training, with compiling replaced by nothing; `compiled` counts how often it was asked for."""
    rows(tmp_path / "rows.jsonl")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    made = between.compiled()
    asked = []
    monkeypatch.setattr(between, "compiled", lambda: asked.append(1) or made)

    def train(*more):
        done = fitout("train", recipe(tmp_path), *more, cwd=tmp_path)
        return done, RunDir(tmp_path / "runs" / "tiny").read_status().get("compiled"), len(asked)

    return train


def test_auto_is_for_a_gpu(run):
    done, compiled, asked = run()
    assert done.code == 0 and compiled is False and asked == 0


def test_asked_for_it_is_tried_used_and_kept(run, monkeypatch):
    used = []
    monkeypatch.setattr(between, "using", lambda form, using=between.using: used.append(form) or using(form))
    done, compiled, asked = run("--set", "train.compile=true")
    assert done.code == 0 and compiled is True and asked == 1
    assert "compiled what lies between products" in done.out + done.err
    assert used[-1] is not between.WRITTEN


def test_where_it_fails_the_run_says_so_and_goes_on_without(run, monkeypatch):
    def broken():
        def fails(*_):
            raise RuntimeError("no C compiler here")

        return dataclasses.replace(between.WRITTEN, norm=fails)

    monkeypatch.setattr(between, "compiled", broken)
    done, compiled, _ = run("--set", "train.compile=true")
    assert done.code == 0 and compiled is False
    assert "not compiled: RuntimeError: no C compiler here" in done.out + done.err


def test_a_run_that_began_with_it_does_not_go_on_without(run, monkeypatch):
    stopped, compiled, _ = run("--set", "train.compile=true", "--set", "train.max_steps=2")
    assert stopped.code == 0 and compiled is True

    def broken():
        return dataclasses.replace(between.WRITTEN, norm=lambda x, w, eps: (x, x))

    monkeypatch.setattr(between, "compiled", broken)
    done, compiled, _ = run("--set", "train.compile=true", "--set", "train.max_steps=4", "--resume")
    assert done.code == 1 and compiled is True
    assert "this run began with train.compile" in done.err and "results of norm differ" in done.err


def test_an_attempt_that_trained_nothing_binds_nothing(run, monkeypatch):
    def dies(*_, **__):
        raise RuntimeError("before the first step")

    with monkeypatch.context() as patch:
        patch.setattr("fitout.train.loop.fit", dies)
        done, compiled, asked = run("--set", "train.compile=true")
    assert done.code != 0 and compiled is True and asked == 1
    done, compiled, asked = run("--set", "train.compile=false")
    assert done.code == 0 and compiled is False and asked == 1, done.err
