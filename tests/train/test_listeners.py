"""What watches a run: services get the numbers under one id, and never end a training that has begun."""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from fitout.errors import FitoutError, RequestError
from fitout.files import read_json, read_jsonl
from fitout.rundir import RunDir
from fitout.train.listeners import Aside, make_listeners

INFO = {"name": "mine", "recipe": {"train": {"lr": 0.1}, "data": {"sources": [{"path": "a"}]}}, "from_step": 0}
STEP = {"step": 1, "loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0, "memory_mb": 3, "epoch": 0.5}


class Wandb(SimpleNamespace):
    """Stands in for the package: `init` gives a run that notes what it is told."""

    def __init__(self, fails: bool = False):
        super().__init__(asked=[], logged=[], finished=0, fails=fails)

    def init(self, **asked):
        self.asked.append(asked)
        return SimpleNamespace(id=asked["id"] or "new-id", log=self.log, finish=self.finish)

    def log(self, numbers, step):
        if self.fails:
            raise ConnectionError("no route\nand a long story")
        self.logged.append((step, numbers))

    def finish(self):
        self.finished += 1


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path)


def watched(run, name, said, from_step=0):
    """One step and one validation under the listeners, as the loop calls them."""
    listeners = make_listeners([name], run, said.append)
    for listener in listeners:
        listener.start({**INFO, "from_step": from_step})
    for row in (STEP, {"step": 1, "event": "evaluated", "validation_loss": 1.5}, {"step": 1, "event": "saved"}):
        for listener in listeners:
            listener.row(row)
    for listener in listeners:
        listener.close()


def test_wandb_gets_every_number_and_goes_on_as_the_same_run(run, monkeypatch):
    wandb, said = Wandb(), []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    watched(run, "wandb", said)
    assert [step for step, _ in wandb.logged] == [1, 1] and wandb.finished == 1 and not said
    assert wandb.logged[0][1]["train/loss"] == 2.0 and wandb.logged[1][1] == {"validation/loss": 1.5}
    assert wandb.asked[0]["dir"] == run.path and wandb.asked[0]["id"] is None
    watched(run, "wandb", said, from_step=1)
    assert wandb.asked[1]["id"] == "new-id" == read_json(run.services)["wandb"]
    watched(run, "wandb", said)  # anew: another run
    assert wandb.asked[2]["id"] is None


def test_a_service_that_fails_on_the_way_does_not_end_the_training(run, monkeypatch):
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", Wandb(fails=True))
    watched(run, "wandb", said)
    assert said == ["wandb gets nothing more: no route; the training goes on, see log.jsonl"]
    assert len(read_jsonl(run.log)) == 3


def test_a_service_that_cannot_be_started_ends_the_run_before_its_first_step(run, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key\n...")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(FitoutError, match="wandb cannot be started: no API key") as caught:
        watched(run, "wandb", [])
    assert "train.listeners" in str(caught.value)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(run, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RequestError, match=f"{name} is not installed") as caught:
        watched(run, name, [])
    assert f"fitout[{name}]" in caught.value.hint


def test_mlflow_keeps_to_the_run_directory_without_a_server(run, monkeypatch):
    """The package itself where it is installed, else what would be asked of it."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    calls: list[tuple] = []
    fake = SimpleNamespace(
        set_tracking_uri=lambda uri: calls.append(("uri", uri)),
        set_experiment=lambda name: None,
        start_run=lambda **asked: calls.append(("run", asked)) or SimpleNamespace(info=SimpleNamespace(run_id="r1")),
        log_params=lambda params: calls.append(("params", params)),
        log_metrics=lambda numbers, step: calls.append(("metrics", step, numbers)),
        end_run=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    watched(run, "mlflow", [])
    watched(run, "mlflow", [], from_step=1)
    assert calls[0] == ("uri", (run.path / "mlflow").as_uri())
    assert [call[1] for call in calls if call[0] == "run"] == [{"run_name": "mine"}, {"run_id": "r1"}]
    assert [call[1] for call in calls if call[0] == "params"] == [
        {"train.lr": "0.1", "data.sources": '[{"path": "a"}]'}
    ]
    assert [call[1:] for call in calls if call[0] == "metrics"][1] == (1, {"validation/loss": 1.5})


class Slow:
    """A listener that takes its time, and fails at a step."""

    def __init__(self, fails_at=None):
        self.seen: list[tuple[str, str]] = []
        self.fails_at = fails_at
        self.held = threading.Event()

    def start(self, info):
        self.note("start")

    def row(self, row):
        self.held.wait(5)
        if row["step"] == self.fails_at:
            raise OSError("no space left")
        self.note(f"row {row['step']}")

    def close(self):
        self.note("close")

    def note(self, what):
        self.seen.append((what, threading.current_thread().name))


@pytest.mark.parametrize("later", [False, True])
def test_nothing_waits_for_a_listener_aside_and_all_is_written_in_order_by_one_thread(later):
    slow = Slow()
    aside = Aside(slow, later=later)
    aside.start(INFO)
    began = time.perf_counter()
    for step in range(1, 40):
        aside.row({"step": step})
    assert time.perf_counter() - began < 4  # the first row alone would have taken 5
    slow.held.set()
    aside.close()
    assert [what for what, _ in slow.seen] == ["start", *(f"row {step}" for step in range(1, 40)), "close"]
    assert {name for _, name in slow.seen} == {"fitout-Slow"}
    assert "fitout-Slow" not in {thread.name for thread in threading.enumerate()}


def test_what_a_listener_aside_raises_comes_up_once():
    slow = Slow(fails_at=2)
    slow.held.set()
    aside = Aside(slow)
    aside.start(INFO)
    for step in (1, 2, 3):
        with contextlib.suppress(OSError):
            aside.row({"step": step})
    with contextlib.suppress(OSError):
        aside.close()
    assert [what for what, _ in slow.seen] == ["start", "row 1"]

    slow = Slow(fails_at=1)
    slow.held.set()
    aside = Aside(slow)
    aside.start(INFO)
    aside.row({"step": 1})
    with pytest.raises(OSError, match="no space left"):
        aside.close()
    aside.close()


def test_tensorboard_has_every_number(run):
    """Read back by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched(run, "tensorboard", [])
    read = EventAccumulator(str(run.tensorboard))
    read.Reload()
    assert [(one.step, one.value) for one in read.Scalars("train/loss")] == [(1, 2.0)]
    assert [(one.step, one.value) for one in read.Scalars("validation/loss")] == [(1, 1.5)]


@pytest.mark.parametrize("fails_at", [1, 3])
def test_tensorboard_on_a_full_disk_is_told_once_and_the_training_goes_on(run, monkeypatch, fails_at):
    """Its thread fails at some write: no traceback, one line, the log whole."""
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    real, writes = LocalFileSystem._write, []

    def full(self, filename, content, mode, *rest):
        writes.append(filename)
        if len(writes) >= fails_at:
            raise OSError(errno.ENOSPC, "No space left on device", filename)
        return real(self, filename, content, mode, *rest)

    monkeypatch.setattr(LocalFileSystem, "_write", full)
    raised, said = [], []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    hook = threading.excepthook
    watched(run, "tensorboard", said)
    [line] = said
    assert "tensorboard gets nothing more" in line and "No space left on device" in line
    assert not raised and threading.excepthook is hook
    assert len(read_jsonl(run.log)) == 3


def test_what_other_threads_raise_is_still_told(run, monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", lambda told: raised.append(told.exc_type))
    listeners = make_listeners(["tensorboard"], run, print)
    for listener in listeners:
        listener.start(INFO)
        listener.row(STEP)
    while threading.excepthook.__qualname__.startswith("test_"):
        time.sleep(0.01)  # until TensorBoard's has been put before it
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    for listener in listeners:
        listener.close()
    assert raised == [ZeroDivisionError]
