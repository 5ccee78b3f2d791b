"""Checkpoints that survive a kill at any moment and resume bit-exactly.

    checkpoints/step-N/   weights.safetensors    what is trained, by parameter name
                          optimizer.safetensors  its moments, NAME|exp_avg and so on
                          state.json             where the loop stands
                          manifest.json          size and SHA-256 of each file, written last
    checkpoints/LATEST    the name of the newest complete one

A checkpoint is filled in a staging folder, synced, renamed into place, and only then named by LATEST. safetensors and
JSON only: nothing here can run code when it is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckError
from ..files import read_json, sha256_file, staged_folder, write_json, write_text
from ..model.load import Pending, write_tensors

WEIGHTS, OPTIMIZER, STATE, MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, open for reading."""

    folder: Path
    state: dict[str, Any]

    def weights(self) -> dict[str, torch.Tensor]:
        return self._tensors(WEIGHTS)

    def optimizer(self) -> dict[str, torch.Tensor]:
        return self._tensors(OPTIMIZER)

    def _tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Of a file whose hash is that of the manifest; Fitout never wrote one that raises here."""
        try:
            return load_file(self.folder / name)
        except SafetensorError as error:
            raise CheckError(
                f"{name} of this checkpoint is no safetensors file: {error}",
                where=str(self.folder),
                harm="Its manifest agrees with it, so it was made so by something else than Fitout.",
                hint="Remove the folder: the run goes on from the checkpoint before it.",
            ) from error


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def save(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor | Pending],
        optimizer: Mapping[str, torch.Tensor | Pending],
        state: dict[str, Any],
    ) -> Path:
        """Writes the checkpoint of `step` completely or not at all, then names it in LATEST."""
        path = self.path(step)
        with staged_folder(path) as staging:
            write_tensors(staging / WEIGHTS, weights)
            write_tensors(staging / OPTIMIZER, optimizer)
            write_json(staging / STATE, state)
            files = {
                name: {"size": (staging / name).stat().st_size, "sha256": sha256_file(staging / name)}
                for name in (WEIGHTS, OPTIMIZER, STATE)
            }
            write_json(staging / MANIFEST, {"format": 1, "step": step, "files": files})
        write_text(self.folder / "LATEST", path.name + "\n")
        return path

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of `step`; raises CheckError when it is damaged."""
        path = self.path(step)
        problem = verify(path)
        if problem:
            raise CheckError(
                f"the best checkpoint is damaged: {problem}",
                where=str(path),
                harm="The run would end with weights nobody trained.",
                hint="Set train.keep: last and run again with --resume.",
            )
        return Checkpoint(path, read_json(path / STATE))

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that verifies, and what was wrong with those newer than it."""
        passed_over: list[str] = []
        for path in self._newest_first():
            problem = verify(path)
            if problem is None:
                return Checkpoint(path, read_json(path / STATE)), passed_over
            passed_over.append(f"{path.name}: {problem}")
        return None, passed_over

    def prune(self, keep_last: int, best_step: int | None) -> None:
        """Removes all but the newest `keep_last` and the best ones; only after the newest verifies.

        Each kept checkpoint may become the newest again when a later one is damaged, so the best one that it knew of is
        kept with it.
        """
        paths = self._newest_first()
        if not paths or verify(paths[0]) is not None:
            return
        kept: set[int | None] = {_step(path) for path in paths[:keep_last]}
        kept |= {_best_known_to(path) for path in paths[:keep_last]} | {best_step}
        for path in paths[keep_last:]:
            if _step(path) not in kept:
                shutil.rmtree(path)

    def _newest_first(self) -> list[Path]:
        """Only what we write: a folder that somebody named otherwise (step-10-copy) is left alone."""
        ours = [path for path in self.folder.glob("step-*") if path.name[len("step-") :].isdecimal()]
        return sorted(ours, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _best_known_to(path: Path) -> int | None:
    """None also for a damaged one, which is never gone on from."""
    try:
        return read_json(path / STATE)["progress"]["best_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint (a missing file, a size, a hash), or None."""
    try:
        files = read_json(path / MANIFEST)["files"]
        for name in (WEIGHTS, OPTIMIZER, STATE):
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != files[name]["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {files[name]['size']}"
            if sha256_file(file) != files[name]["sha256"]:
                return f"{name} does not have the content that was saved"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None
