"""What watches a run: the log, TensorBoard, W&B, MLflow. They observe; the loop decides. (The screen's is in cli.)"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from ..errors import FitoutError, RequestError
from ..files import read_json, read_jsonl, write_json, write_jsonl
from ..rundir import RunDir


class Listener(Protocol):
    def start(self, info: dict[str, Any]) -> None:
        """Before the first step: run name, total steps, step to go on from."""

    def row(self, row: dict[str, Any]) -> None:
        """A step's row, or an event's (it then has the key `event`)."""

    def close(self) -> None:
        """The run has ended, well or not."""


class JsonLog:
    """log.jsonl: one object a step. Going on from step N first drops rows of later steps, which will be made again."""

    def __init__(self, path: Path):
        self.path = path

    def start(self, info: dict[str, Any]) -> None:
        if self.path.exists():
            before = [row for row in read_jsonl(self.path) if row["step"] <= info["from_step"]]
            write_jsonl(self.path, before if info["from_step"] else [])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def row(self, row: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Aside:
    """A listener that works in a thread of its own, so that no step waits for it.

    What it raises is raised once, with the next row or at the end, and it is left alone from then on. A start is waited
    for, since it may say that the run must not begin, unless `later`: then its imports are not waited for either.
    """

    def __init__(self, inner: Listener, *, later: bool = False):
        self.inner, self.later = inner, later
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"fitout-{type(inner).__name__}", daemon=True)
        self._failed = False
        self._error: BaseException | None = None

    def start(self, info: dict[str, Any]) -> None:
        begun = threading.Event()

        def begin() -> None:
            try:
                self.inner.start(info)
            finally:
                begun.set()

        self._jobs.put(begin)
        self._thread.start()
        if not self.later:
            begun.wait()
            self._raise()

    def row(self, row: dict[str, Any]) -> None:
        self._raise()
        self._jobs.put(lambda: self.inner.row(row))

    def close(self) -> None:
        """Waits until all is written."""
        if self._thread.ident is None:  # never started: another listener could not be
            return
        self._jobs.put(self.inner.close)
        self._jobs.put(None)
        self._thread.join()
        self._raise()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._failed:
                try:
                    job()
                except BaseException as error:
                    self._failed, self._error = True, error

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error


class TensorBoard:
    """Event files. What its writing thread raises comes again with the next row, so the thread itself says nothing."""

    name = "tensorboard"

    def __init__(self, folder: Path):
        self.folder = folder
        self._say_of_threads = threading.excepthook

    def start(self, info: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = self._not_of_its_own  # before its thread writes a first line
        self._writer = SummaryWriter(str(self.folder), purge_step=info["from_step"] + 1 if info["from_step"] else None)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._say_of_threads

    def _not_of_its_own(self, told: threading.ExceptHookArgs) -> None:
        if not type(told.thread).__module__.startswith("tensorboard."):
            self._say_of_threads(told)


class WandB:
    """Weights & Biases; its files are in the run directory, and a run that goes on is the same one there."""

    name = "wandb"

    def __init__(self, run: RunDir):
        self.run = run

    def start(self, info: dict[str, Any]) -> None:
        import wandb

        known = _known(self.run, self.name, info)
        self._run = wandb.init(
            project="fitout", name=info["name"], config=info["recipe"], dir=self.run.path, id=known, resume="allow"
        )
        _remember(self.run, self.name, self._run.id)

    def row(self, row: dict[str, Any]) -> None:
        if numbers := _numbers(row):
            self._run.log(numbers, step=row["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow: the server that it is set up for (MLFLOW_TRACKING_URI), else a folder in the run directory."""

    name = "mlflow"

    def __init__(self, run: RunDir):
        self.run = run

    def start(self, info: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # else it asks for a database
            mlflow.set_tracking_uri((self.run.path / "mlflow").absolute().as_uri())
        mlflow.set_experiment("fitout")
        known = _known(self.run, self.name, info)
        begun = mlflow.start_run(run_id=known) if known else mlflow.start_run(run_name=info["name"])
        if not known:
            mlflow.log_params(dict(_flat(info["recipe"])))
        _remember(self.run, self.name, begun.info.run_id)

    def row(self, row: dict[str, Any]) -> None:
        if numbers := _numbers(row):
            self._mlflow.log_metrics(numbers, step=row["step"])

    def close(self) -> None:
        self._mlflow.end_run()


class Watched:
    """A listener that the training does not depend on: one that fails is told of once and left alone. One that must
    start (a service outside, that somebody relies on) ends the run before its first step when it cannot."""

    def __init__(self, inner: TensorBoard | WandB | MLflow, say: Callable[[str], None], *, must_start: bool):
        self.inner, self.say, self.must_start = inner, say, must_start
        self.lost = False

    def start(self, info: dict[str, Any]) -> None:
        name = self.inner.name
        if not self.must_start:
            self._unless_lost(lambda: self.inner.start(info))
            return
        try:
            self.inner.start(info)
        except ModuleNotFoundError as error:
            raise RequestError(
                f"the package {error.name} is not installed",
                where="train.listeners",
                hint=f"Install it with: pip install 'fitout[{name}]', or take it out of train.listeners.",
            ) from error
        except Exception as error:  # a service raises anything of its own, of the network and of the file system
            raise FitoutError(
                f"{name} cannot be started: {_first_line(error)}",
                where="train.listeners",
                harm="The run would go unwatched.",
                hint=f"Set {name} up, or take it out of train.listeners; log.jsonl and tensorboard/ need no service.",
            ) from error

    def row(self, row: dict[str, Any]) -> None:
        self._unless_lost(lambda: self.inner.row(row))

    def close(self) -> None:
        self._unless_lost(self.inner.close)

    def _unless_lost(self, act: Callable[[], None]) -> None:
        if self.lost:
            return
        try:
            act()
        except Exception as error:  # as above
            self.lost = True
            if not self.must_start:
                with suppress(Exception):
                    self.inner.close()
            self.say(f"{self.inner.name} gets nothing more: {_first_line(error)}; the training goes on, see log.jsonl")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _known(run: RunDir, name: str, info: dict[str, Any]) -> str | None:
    """The id under which a service knows this run, when the run goes on."""
    return read_json(run.services).get(name) if info["from_step"] and run.services.exists() else None


def _remember(run: RunDir, name: str, identity: str) -> None:
    before = read_json(run.services) if run.services.exists() else {}
    write_json(run.services, {**before, name: identity})


def _flat(values: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """`train.lr` and so on; lists as JSON, cut to what MLflow takes."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", json.dumps(value, ensure_ascii=False)[:500]


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What can be drawn: `train/loss` and so on for steps, `validation/loss` for evaluations; by task the share of a
    step's tokens and the validation loss; the objective's figures under both."""
    if row.get("event") == "evaluated":
        by_task = {f"validation loss/{name}": task["loss"] for name, task in row.get("by_task", {}).items()}
        figures = {f"validation/{name}": value for name, value in row.get("figures", {}).items()}
        return {"validation/loss": row["validation_loss"], **figures, **by_task}
    if "event" in row:
        return {}
    names = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_mb", "epoch")
    by_task = row.get("tasks", {})
    tasks = {f"share of tokens/{name}": count / sum(by_task.values()) for name, count in by_task.items()}
    figures = {f"train/{name}": value for name, value in row.get("figures", {}).items()}
    return {**{f"train/{name}": row[name] for name in names}, **figures, **tasks}


def make_listeners(names: Sequence[str], run: RunDir, say: Callable[[str], None]) -> list[Listener]:
    """log.jsonl, and what the recipe names; `say` tells people of one that is lost on the way."""
    made: dict[str, Listener] = {
        "tensorboard": Aside(Watched(TensorBoard(run.tensorboard), say, must_start=False), later=True),
        "wandb": Aside(Watched(WandB(run), say, must_start=True)),
        "mlflow": Aside(Watched(MLflow(run), say, must_start=True)),
    }
    return [JsonLog(run.log), *(made[name] for name in names)]
