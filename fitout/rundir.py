"""The names of everything in a run directory. This file is the only place that spells them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import explain_os_errors, make_folder, read_json, write_json
from .lock import Lock


@dataclass(frozen=True)
class RunDir:
    path: Path

    # what was asked and what came of it
    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def status(self) -> Path:
        return self.path / "run.json"

    @property
    def repairs(self) -> Path:
        return self.path / "repairs.jsonl"

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    # data
    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def quarantine(self) -> Path:
        return self.data / "quarantine.jsonl"

    @property
    def removed(self) -> Path:
        return self.data / "removed.jsonl"

    @property
    def test_rows(self) -> Path:
        return self.data / "test.jsonl"

    @property
    def data_report(self) -> Path:
        return self.data / "report.json"

    @property
    def data_details(self) -> Path:
        return self.data / "details.json"

    @property
    def data_page(self) -> Path:
        return self.data / "report.html"

    # training
    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def profile(self) -> Path:
        """Of --profile."""
        return self.path / "profile"

    @property
    def profile_trace(self) -> Path:
        """For https://ui.perfetto.dev or chrome://tracing."""
        return self.profile / "trace.json.gz"

    @property
    def profile_parts(self) -> Path:
        return self.profile / "parts.json"

    @property
    def services(self) -> Path:
        """The ids under which W&B and MLflow know the run."""
        return self.path / "services.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def references(self) -> Path:
        """Log-probabilities of the answers as training began, where the objective refers to them."""
        return self.path / "references.safetensors"

    @property
    def stacks(self) -> Path:
        return self.path / "stacks"

    # results
    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def evaluation_report(self) -> Path:
        return self.evaluation / "report.json"

    @property
    def evaluation_page(self) -> Path:
        return self.evaluation / "report.html"

    @property
    def predictions(self) -> Path:
        return self.evaluation / "predictions.jsonl"

    @property
    def retention(self) -> Path:
        return self.evaluation / "retention.jsonl"

    def exists(self) -> bool:
        return self.status.exists()

    def has_training(self) -> bool:
        """Whether anything trained is in it: a checkpoint, or what a run ends with. Prepared data alone are not."""
        return any(self.checkpoints.glob("step-*")) or self.adapter.exists() or self.model.exists()

    def read_status(self) -> dict[str, Any]:
        return read_json(self.status) if self.status.exists() else {}

    def update_status(self, **changes: Any) -> dict[str, Any]:
        """Merges `changes` into run.json, atomically."""
        status = {**self.read_status(), **changes, "updated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_json(self.status, status)
        return status

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Holds the run directory for this process; a second one is refused. The lock dies with its holder."""
        with explain_os_errors(self.path, "lock the run directory"):
            make_folder(self.path)
            lock = Lock(self.lock_file)
        with lock:
            yield
