"""One process at a time in a folder: a second one is refused, a dead one's lock is no lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fitout import lock
from fitout.errors import FitoutError, RunExistsError
from fitout.rundir import RunDir

HOLD = """
import pathlib, sys, time
from fitout import lock
{without}
with lock.Lock(pathlib.Path(sys.argv[1])):
    {inside}
    print("held", flush=True)
    time.sleep(60)
"""
WITHOUT = "import fcntl, errno\ndef flock(*_): raise OSError(errno.ENOLCK, 'no locks available')\nfcntl.flock = flock"


def holder(path: Path, *, without: bool = False, inside: str = "pass") -> subprocess.Popen:
    """A process that holds the lock, on a file system with or `without` locks."""
    program = HOLD.format(without=WITHOUT if without else "", inside=inside)
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": root}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=[False, True], ids=["flock", "no locks"])
def without(request, monkeypatch):
    if request.param:

        def flock(*_):
            raise OSError(errno.ENOLCK, "no locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def test_a_second_one_is_refused_and_a_killed_one_forgotten(tmp_path, without):
    path = tmp_path / ".lock"
    assert not lock.is_held(path)
    process = holder(path, without=without)
    try:
        assert lock.is_held(path)
        with pytest.raises(RunExistsError, match=f"process {process.pid} on .*, since 20") as error, lock.Lock(path):
            pass
        assert error.value.harm and "Wait for it" in error.value.hint
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not lock.is_held(path)
    with lock.Lock(path):
        assert lock.is_held(path)
    assert not lock.is_held(path)
    with lock.Lock(path):
        pass


def test_the_lock_goes_when_the_work_fails(tmp_path, without):
    with pytest.raises(ZeroDivisionError), lock.Lock(tmp_path / ".lock"):
        raise ZeroDivisionError
    with lock.Lock(tmp_path / ".lock"):
        pass


def test_what_a_dead_holder_started_is_told_apart(tmp_path):
    """A child that was forked keeps the open file, and with it the lock, when its parent is killed."""
    process = holder(tmp_path / ".lock", inside="import os\n    if os.fork() == 0: time.sleep(60); os._exit(0)")
    process.send_signal(signal.SIGKILL)
    process.wait()
    try:
        gone = pytest.raises(RunExistsError, match="it is gone, but a process that it started")
        with gone as error, lock.Lock(tmp_path / ".lock"):
            pass
        assert "fuser" in error.value.hint
    finally:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("changes", "stale"),
    [
        ({}, False),  # this very process
        ({"boot": "an earlier start of this machine"}, True),
        ({"started": "1"}, True),  # the pid is another process by now
        ({"pid": 2**22 + 1}, True),
        ({"host": "another-machine"}, False),
        ({"host": "another-machine", "pid": 2**22 + 1}, False),
        ({"pid": "no number"}, False),
    ],
)
def test_stale_or_not_where_there_are_no_locks(tmp_path, monkeypatch, changes, stale):
    def flock(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / ".lock"
    path.touch()
    (tmp_path / ".lock.claim").write_text(json.dumps({**lock._me(), **changes}))
    assert lock.is_held(path) is not stale
    if stale:
        with lock.Lock(path):
            told = json.loads((tmp_path / ".lock.claim").read_text())
            assert told == lock._me() | {"since": told["since"]}
        assert not (tmp_path / ".lock.claim").exists()
    else:
        with pytest.raises(RunExistsError) as error, lock.Lock(path):
            pass
        assert ("remove" in error.value.hint) == ("another-machine" in str(changes))
        assert (tmp_path / ".lock.claim").exists()


def test_other_errors_of_the_file_system_are_told(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(FitoutError, match="Input/output error") as error, RunDir(tmp_path / "run").owned():
        pass
    assert str(tmp_path / "run") in error.value.where
