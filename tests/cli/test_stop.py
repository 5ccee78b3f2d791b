"""SIGTERM and SIGINT at any time: exit code 3 at once, and the same command goes on."""

from __future__ import annotations

import os
import signal
import time

import pytest

import fitout.export.merge  # noqa: F401 - it takes names of other modules over, which must not be the patched ones
from fitout.rundir import RunDir
from tests.cli.command import fitout, half_written, recipe, rows

MOMENTS = {  # something that is called while the verb does it
    "preparing": "fitout.data.prepare.split",
    "writing the data": "fitout.data.prepare.write_page",
    "loading the model": "fitout.model.attention.settle",
    "writing the adapter": "fitout.export.write.save_chat",
    "answering": "fitout.engine.Engine.generate",
    "merging": "fitout.export.merge.logits",
}


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts the tests in the background has them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_doing_each_thing_and_run_again(tmp_path, monkeypatch, number):
    """One run, stopped in each of its phases in turn; the last call finds everything else done and ends well."""
    rows(tmp_path / "rows.jsonl")
    run = RunDir(tmp_path / "runs" / "tiny")
    for what, where in MOMENTS.items():
        came = []

        def stop(*_, came=came, **__):
            came.append(time.monotonic())
            os.kill(os.getpid(), number)
            time.sleep(20)

        with monkeypatch.context() as patch:
            patch.setattr(where, stop)
            done = fitout("run", recipe(tmp_path), cwd=tmp_path)
        assert came, what
        assert time.monotonic() - came[0] < 10
        assert done.code == 3 and done.err.startswith("error ") and "Traceback" not in done.err, (what, done.err)
        assert "go on with the same command" in done.err
        assert run.read_status()["status"] == "stopped" and half_written(tmp_path) == [], what
    done = fitout("run", recipe(tmp_path), cwd=tmp_path)
    assert done.code == 0, done.err
    assert run.read_status()["status"] == "done" and run.evaluation_report.exists() and run.merged.exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
