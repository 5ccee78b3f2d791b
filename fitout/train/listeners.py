"""What watches a run: the log, TensorBoard, W&B, MLflow. They observe; the loop decides. (The screen's is in cli.)"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import RequestError
from ..files import read_jsonl, write_jsonl
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


class TensorBoard:
    def __init__(self, folder: Path):
        self.folder = folder

    def start(self, info: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=info["from_step"] + 1 if info["from_step"] else None)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    def start(self, info: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise _missing("wandb") from None
        self._run = wandb.init(project="fitout", name=info["name"], config=info["recipe"], resume="allow")

    def row(self, row: dict[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class MLflow:
    def start(self, info: dict[str, Any]) -> None:
        try:
            import mlflow
        except ImportError:
            raise _missing("mlflow") from None
        self._mlflow = mlflow
        mlflow.set_experiment("fitout")
        mlflow.start_run(run_name=info["name"])

    def row(self, row: dict[str, Any]) -> None:
        self._mlflow.log_metrics(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._mlflow.end_run()


def _missing(package: str) -> RequestError:
    return RequestError(
        f"the package {package} is not installed",
        where="train.listeners",
        hint=f"Install it with: pip install 'fitout[{package}]', or take it out of train.listeners.",
    )


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    """What can be drawn: `train/loss` and so on for steps, `validation/loss` for evaluations."""
    if row.get("event") == "evaluated":
        return {"validation/loss": row["validation_loss"]}
    if "event" in row:
        return {}
    names = ("loss", "lr", "grad_norm", "tokens_per_second", "memory_mb", "epoch")
    return {f"train/{name}": row[name] for name in names}


def make_listeners(names: Sequence[str], run: RunDir) -> list[Listener]:
    made: dict[str, Listener] = {"tensorboard": TensorBoard(run.tensorboard), "wandb": WandB(), "mlflow": MLflow()}
    return [JsonLog(run.log), *(made[name] for name in names)]
