"""What an interrupted preparation had done: the same command goes on after its last whole stage.

    data/.unfinished/rows.jsonl          the samples on their way
                     quarantine.jsonl    and what was taken out so far
                     removed.jsonl
                     made_of.json        the fingerprint of all that the preparation is made of
                     STAGE/              what is known when that stage is done: values.json, and an array a file

A stage's folder is written whole or not at all, with hashes of all that it needs. Going on cuts the files above back to
what that stage had written. It all goes when the data are prepared, when the preparation ends in an error, and when one
of other inputs begins.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ..files import fingerprint, read_json, sha256_file, staged_folder, write_json

STAGES = ("render", "split", "clean")  # after which one can go on, the last first


class Halfway:
    """The folder of one preparation. `made_of` is its fingerprint; another's leftovers are removed."""

    def __init__(self, folder: Path, made_of: str):
        from .. import __version__

        self.folder = folder
        made_by = fingerprint(made_of, __version__)  # another version may do a stage otherwise
        if _read(self._made_of) != made_by:
            self.remove()
            folder.mkdir(parents=True)
            write_json(self._made_of, made_by)

    @property
    def _made_of(self) -> Path:
        return self.folder / "made_of.json"

    def save(self, stage: str, values: dict[str, Any], arrays: dict[str, np.ndarray], files: list[Path]) -> None:
        """What is known after `stage`. It counts as long as `files` (of data/) begin with what they hold now."""
        with staged_folder(self.folder / stage) as staging:
            for name, array in arrays.items():
                np.save(staging / f"{name}.npy", array, allow_pickle=False)
            (staging / "values.json").write_text(json.dumps(values))  # in ASCII: texts may hold lone surrogates
            own = {path.name: _held(path) for path in staging.iterdir()}
            beside = {str(path.relative_to(self.folder.parent)): _held(path) for path in files}
            write_json(staging / "files.json", {"own": own, "beside": beside})

    def load(self) -> tuple[str, dict[str, Any], dict[str, np.ndarray]] | None:
        """The last stage that was done, its values and its arrays; None where there is none that is whole."""
        for stage in STAGES:
            folder = self.folder / stage
            if self._whole(folder):
                arrays = {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}
                return stage, read_json(folder / "values.json"), arrays
        return None

    def _whole(self, folder: Path) -> bool:
        held = _read(folder / "files.json")
        if not isinstance(held, dict) or held.keys() != {"own", "beside"}:
            return False
        homes = ((folder, held["own"]), (self.folder.parent, held["beside"]))
        return all(_held(home / name, one[0]) == one for home, files in homes for name, one in files.items())

    def remove(self) -> None:
        self._made_of.unlink(missing_ok=True)  # first: without it the rest counts for nothing
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path) -> Any:
    """What a JSON file holds; None where it is not there or is damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _held(path: Path, size: int | None = None) -> list[int | str] | None:
    """Size and SHA-256 of a file, or of its first `size` bytes; None where there are not so many."""
    if not path.exists() or path.stat().st_size < (size or 0):
        return None
    size = path.stat().st_size if size is None else size
    return [size, sha256_file(path, size)]
