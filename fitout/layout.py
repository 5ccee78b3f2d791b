"""Layout: what one forward pass computes. Shared by data (which makes them), model and objectives (which read them).

A layout is one row of T tokens that holds several documents, each a *segment*. A segment attends causally to itself
and fully to its ancestors (`parent`), so samples with a common beginning can share it as a tree. There is no padding
and no label tensor: what is trained is a list of *targets*, each (position, token, weight, sample), never shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of a layout; `parent` is the index of the segment it continues, or -1."""

    start: int
    end: int
    parent: int = -1

    @property
    def length(self) -> int:
        return self.end - self.start


def reaches(segments: Sequence[Segment]) -> list[int]:
    """Tokens of each segment and of all that it continues."""
    found: list[int] = []
    for segment in segments:
        found.append(segment.length + (found[segment.parent] if segment.parent >= 0 else 0))
    return found


def ends(segments: Sequence[Segment]) -> list[int]:
    """Where the last of all that continues each segment ends."""
    found = [segment.end for segment in segments]
    for index in reversed(range(len(segments))):
        parent = segments[index].parent
        if parent >= 0:
            found[parent] = max(found[parent], found[index])
    return found


def seen(segments: Sequence[Segment], window: int | None = None) -> np.ndarray:
    """(T, T) bool, the slow obvious way: whether the token of the row may look at that of the column. With `window` w
    it sees no more than w tokens of its own document, itself included."""
    place, owner = np.zeros((2, segments[-1].end), np.int64)
    family = np.eye(len(segments), dtype=bool)  # the row's segment and what it continues
    for index, one in enumerate(segments):
        begin = 0
        if one.parent >= 0:
            family[index] |= family[one.parent]
            begin = place[segments[one.parent].end - 1] + 1
        place[one.start : one.end] = np.arange(begin, begin + one.length)
        owner[one.start : one.end] = index
    allowed = family[owner][:, owner] & (place <= place[:, None])
    return allowed if window is None else allowed & (place > place[:, None] - window)


@dataclass(frozen=True)
class Layout:
    """One forward's worth of tokens.

    ids            (T,) int64    token ids
    positions      (T,) int64    position of each token in its own document (restarts; continues in a branch)
    segments       tuple of Segment covering [0, T), each parent right before all that continues it (preorder)
    target_at      (N,) int64    the position whose logits predict ...
    target_token   (N,) int64    ... this token ...
    target_weight  (N,) float32  ... with this weight in the loss ...
    target_sample  (N,) int64    ... on behalf of this sample (its row in the prepared store)
    preferences    (P, 2) int64  pairs of those samples, the chosen one first (objectives of preference)
    references     (P, 2) float64  log-probability of each of them under the model as training began; NaN before it did
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: tuple[Segment, ...]
    target_at: np.ndarray
    target_token: np.ndarray
    target_weight: np.ndarray
    target_sample: np.ndarray
    preferences: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    references: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.float64))

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        return len(self.target_at)

    @cached_property
    def pairs(self) -> int:
        """How often a token looks at a token, itself included, in one attention layer without a window."""
        whole = 0
        for segment, reach in zip(self.segments, reaches(self.segments), strict=True):
            whole += segment.length * (reach - segment.length) + segment.length * (segment.length + 1) // 2
        return whole
