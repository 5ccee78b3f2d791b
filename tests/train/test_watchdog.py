"""A step that hangs: the process is ended, where it stood is written down, the run goes on afterwards."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from tests.equal.small import environment, events, losses
from tests.train.test_guards import make_job, train

HANG = """
import sys, time, threading
from pathlib import Path
from fitout.train.backend import Backend
from fitout.train.listeners import JsonLog
from fitout.train.loop import fit
from tests.equal.small import CPU
from tests.train.test_guards import make_job, train

class Hang:
    def start(self, info): pass
    def close(self): pass
    def row(self, row):
        if row.get("step") == 5 and "event" not in row:
            HANG

job = make_job(Path(sys.argv[1]), total=8, save_every=2)
backend = Backend(CPU)
with backend.watched(job.run.stacks, float(sys.argv[2])):
    fit(job, backend, [JsonLog(job.run.log), Hang()])
"""


def hang(folder, how: str, seconds: float = 10.0, **more) -> subprocess.Popen:
    program = HANG.replace("HANG\n", how + "\n")
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder), str(seconds)], env=environment(), stderr=subprocess.PIPE,
        text=True, **more,
    )  # fmt: skip


def test_a_hang_ends_with_stacks_and_goes_on(tmp_path):
    want = make_job(tmp_path / "whole", total=8, save_every=2)
    train(want)
    process = hang(tmp_path / "hung", "threading.Event().wait()")
    assert process.wait(120) == 1
    assert process.stderr is not None
    told = process.stderr.read()
    assert "computed nothing for 10 s" in told and "goes on from the last checkpoint" in told
    stacks = (tmp_path / "hung" / "stacks" / "rank-0.txt").read_text()
    assert "in row" in stacks and "in _look" in stacks
    job = make_job(tmp_path / "hung", total=8, save_every=2)
    train(job, resume=True)
    assert losses(job.run.log) == losses(want.run.log)
    assert [e["step"] for e in events(job.run.log, "resumed")] == [4]


def test_a_hang_that_holds_the_interpreter(tmp_path):
    """A call into C that does not let go of the lock: no Python thread runs, faulthandler's does."""
    process = hang(tmp_path, "import ctypes; ctypes.PyDLL(None).sleep(60)")
    began = time.monotonic()
    assert process.wait(120) == 1
    assert time.monotonic() - began < 55
    assert "in row" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_a_process_that_was_stopped_for_a_while_has_not_hung(tmp_path):
    process = hang(tmp_path, "open(sys.argv[1] + '/here', 'w'); time.sleep(0.5)", seconds=3)
    while not (tmp_path / "here").exists():
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    assert process.wait(120) == 0
    assert not (tmp_path / "stacks").exists()
