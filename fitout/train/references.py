"""The log-probabilities that the model gave the answers as training began, for objectives that refer to them.

Computed once, before the first step, and kept in the run directory: a run that goes on has other weights by then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from ..errors import CheckError
from ..files import atomic_open


def save_references(path: Path, found: dict[str, np.ndarray]) -> None:
    with atomic_open(path) as file:
        file.write(save(found))


def load_references(path: Path, rows: dict[str, int]) -> dict[str, np.ndarray]:
    """What `save_references` wrote, for so many rows of each part. Raises CheckError where it is not there or does not
    fit: it cannot be computed any more."""
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise _lost(path, f"the reference log-probabilities cannot be read: {error}") from error
    if {name: len(values) for name, values in found.items()} != rows:
        raise _lost(path, "the reference log-probabilities are of other data")
    return found


def require_known(path: Path, references: np.ndarray) -> None:
    """Raises CheckError where some are NaN."""
    if np.isnan(references).any():
        raise _lost(path, "the reference log-probabilities of some rows were never computed")


def _lost(path: Path, what: str) -> CheckError:
    return CheckError(
        what,
        where=str(path),
        harm="They are those of the model as training began; with others this would be another training.",
        hint="Put the file back, or train anew under another name or --out.",
    )
