"""Removal of rows that say what another row says already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..chat.types import Sample
from .content import content_key


def repeats(keys: np.ndarray, turn: np.ndarray | None = None) -> np.ndarray:
    """(n,) for each row the number of the row it repeats, its own where it repeats none.

    `keys` are equal for rows that say the same. The row of the lowest `turn` (n,) stays, the earliest of these: of
    twins in a test file and in training the training one repeats.
    """
    count = len(keys)
    order = np.arange(count) if turn is None else np.lexsort((np.arange(count), turn))
    _, earliest, twin = np.unique(keys[order], return_index=True, return_inverse=True)
    result = np.empty(count, np.int64)
    result[order] = order[earliest[twin]]
    return result


def exact(samples: Sequence[Sample]) -> tuple[list[Sample], list[tuple[Sample, str]]]:
    """(kept, dropped with the reason): of samples with equal content (roles, texts up to white space, tools) the first
    is kept. Order is kept."""
    keys = np.array([content_key(sample) for sample in samples], "S16")
    stays = repeats(keys)
    kept = [sample for at, sample in enumerate(samples) if stays[at] == at]
    dropped = [(sample, f"repeats {samples[stays[at]].origin}") for at, sample in enumerate(samples) if stays[at] != at]
    return kept, dropped
