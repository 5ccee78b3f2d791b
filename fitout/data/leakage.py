"""What of the held-out parts, or of a benchmark, stands in the training rows: looked for exactly, not by chance.

A text can only be alike to another by t if they share one of its rarest shingles: all but a rest that weighs less than
t of it (prefix filtering; Chaudhuri, Ganti, Kaushik 2006; Xiao et al. 2008). An index of those finds every pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from .shingles import Weighed, Weights, likeness, shingles

BATCH = 256
REST = 0.4  # of a text's weight that the index leaves out: its commonest shingles
BLOOM = 1 << 24


class Index:
    """Texts to be found again, by their rare shingles."""

    def __init__(self, texts: Sequence[str], weights: Weights):
        self.weights = weights
        self.texts = [weights.weighed(text) for text in texts]
        hashes, owner, weight = [], [], []
        for at, one in enumerate(self.texts):
            rare = np.argsort(-one.weights, kind="stable")
            enough = int(np.searchsorted(np.cumsum(one.weights[rare]), (1 - REST) * one.total)) + 1
            hashes.append(one.hashes[rare[:enough]])
            owner.append(np.full(min(enough, len(rare)), at, np.int32))
            weight.append(one.weights[rare[:enough]])
        flat = np.concatenate(hashes) if hashes else np.zeros(0, np.uint64)
        order = np.argsort(flat, kind="stable")
        self._hashes = flat[order]
        self._owner = (np.concatenate(owner) if owner else np.zeros(0, np.int32))[order]
        self._weight = (np.concatenate(weight) if weight else np.zeros(0, np.float32))[order]
        self._bloom = np.zeros(BLOOM, bool)
        self._bloom[(flat % np.uint64(BLOOM)).astype(np.int64)] = True
        self._total = np.array([one.total for one in self.texts])

    def shared(self, batch: Sequence[str], least: float) -> Iterator[tuple[int, int]]:
        """(number in the batch, number of an indexed text) of all that can have `least` (above REST) of the indexed
        text's weight in common; a few have less."""
        flat, offsets = shingles(batch)
        row = np.repeat(np.arange(len(batch)), np.diff(offsets))
        there = self._bloom[(flat % np.uint64(BLOOM)).astype(np.int64)]
        flat, row = flat[there], row[there]
        start, stop = np.searchsorted(self._hashes, flat), np.searchsorted(self._hashes, flat, "right")
        many = stop - start
        if not many.sum():
            return
        inside = np.repeat(start - np.concatenate([[0], np.cumsum(many)[:-1]]), many) + np.arange(many.sum())
        row = np.repeat(row, many)
        _, once = np.unique(row * len(self._hashes) + inside, return_index=True)  # a shingle may repeat in a text
        inside, row = inside[once], row[once]
        pair, place = np.unique(row * len(self.texts) + self._owner[inside], return_inverse=True)
        common = np.bincount(place, self._weight[inside])
        for code in pair[common + 1e-6 >= (least - REST) * self._total[pair % len(self.texts)]]:
            yield int(code // len(self.texts)), int(code % len(self.texts))


@dataclass
class Certificate:
    """How near the held-out samples are to training. `nearest` has for each of them (training sample, likeness), and
    (-1, 0.0) where no training sample is as near as `least`."""

    held_out: list[int]
    least: float
    nearest: list[tuple[int, float]] = field(default_factory=list)
    too_near: list[tuple[int, int, float]] = field(default_factory=list)  # (training, held out, likeness)


def certify(
    training: Sequence[int] | np.ndarray,
    held_out: Sequence[int] | np.ndarray,
    text: Callable[[int], str],
    weights: Weights,
    *,
    least: float,
    limit: float,
) -> Certificate:
    """Compares each of `training` with each of `held_out` (numbers that `text` reads): the nearest of all pairs that
    are alike by `least`, and every pair that is alike by `limit` or more."""
    found = Certificate([int(at) for at in held_out], least)
    index = Index([text(at) for at in found.held_out], weights)
    best: list[tuple[int, float]] = [(-1, 0.0)] * len(found.held_out)
    for number, weighed, at in _candidates(training, text, index, weights, least):
        value = likeness(weighed, index.texts[at])
        if value >= least and value > best[at][1]:
            best[at] = (number, value)
        if value >= limit:
            found.too_near.append((number, found.held_out[at], value))
    found.nearest = best
    return found


def contained(
    numbers: Sequence[int] | np.ndarray,
    text: Callable[[int], str],
    items: Sequence[str],
    weights: Weights,
    *,
    overlap: float,
) -> Iterator[tuple[int, int, float]]:
    """(sample, item, share) of every item of which a sample holds at least `overlap` (by weight, above REST)."""
    index = Index(items, weights)
    for number, weighed, at in _candidates(numbers, text, index, weights, overlap):
        item = index.texts[at]
        common, count = item.common(weighed)
        share = common / item.total if item.total > 1e-6 else count / max(1, len(item.hashes))
        if share >= overlap:
            yield number, at, share


def _candidates(
    numbers: Sequence[int] | np.ndarray, text: Callable[[int], str], index: Index, weights: Weights, least: float
) -> Iterator[tuple[int, Weighed, int]]:
    """(sample, the sample weighed, place in the index) of all that may share at least `least`; each sample is read and
    weighed once."""
    for start in range(0, len(numbers), BATCH):
        some = [int(at) for at in numbers[start : start + BATCH]]
        batch = [text(at) for at in some]
        known: dict[int, Weighed] = {}
        for row, at in index.shared(batch, least):
            if row not in known:
                known[row] = weights.weighed(batch[row])
            yield some[row], known[row], at
