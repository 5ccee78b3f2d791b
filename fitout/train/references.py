"""The log-probabilities that the model gave the answers as training began, for objectives that refer to them.

Computed once, before the first step, and kept in the run directory: a run that goes on has other weights by then. Its
checkpoints name them by their digest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from ..data.store import Part
from ..errors import CheckError, FitoutError
from ..files import atomic_open

References = dict[str, np.ndarray]  # by part: (rows,) float64, NaN where it was not computed


def digest(found: References) -> str:
    return hashlib.sha256(save(found)).hexdigest()


def save_references(path: Path, found: References) -> None:
    with atomic_open(path) as file:
        file.write(save(found))


def load_references(path: Path, expected: str) -> References:
    """What `save_references` wrote. Raises CheckError where it is not there, or has another digest: it cannot be
    computed any more."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _lost(path, f"the reference log-probabilities cannot be read: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise _lost(path, "the reference log-probabilities are not those that this run began with")
    return load(data)


def require_finite(values: np.ndarray, part: Part, rows: np.ndarray) -> None:
    """Raises FitoutError where some of the computed ones, of some rows of a part, are no numbers."""
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise FitoutError(
            f"the model gives {len(bad):,} of {len(values):,} answers no finite log-probability, before any step",
            where=", ".join(str(part.origin(int(rows[at]))) for at in bad[:4]),
            harm="Every loss that refers to them would be NaN.",
            hint="Look at these rows, set train.precision: fp32, or check the weights of the base.",
        )


def require_known(path: Path, values: np.ndarray) -> None:
    """Raises CheckError where some were not computed when the run began."""
    if unknown := int(np.isnan(values).sum()):
        raise CheckError(
            f"{unknown:,} answers have no reference log-probability: the run began with fewer steps, without them",
            where=str(path),
            harm="It is that of the model as training began, which is no longer there.",
            hint="Ask for the steps that the run began with, or train anew under another name or --out.",
        )


def _lost(path: Path, what: str) -> CheckError:
    return CheckError(
        what,
        where=str(path),
        harm="They are those of the model as training began; with others this would be another training.",
        hint="Put the file back, or train anew under another name or --out.",
    )
