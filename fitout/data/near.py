"""Near-duplicates: pairs of texts that are almost the same, found without comparing all with all.

MinHash signatures (rensa, in Rust) are cut into bands; texts that agree in a band are compared exactly. At a likeness
of 0.8 a pair is missed with a probability of 5e-5 (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, 3.4).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from .content import digest
from .shingles import SAMPLED, Weights, likeness, shingles

BANDS, IN_BAND = 25, 5  # of the signature's 125 values
BATCH = 256
ALL_PAIRS = 24  # texts that agree in a band and are all compared with each other; of more, each with two
LINES = 50  # at the beginning and at the end of a text that are compared by themselves
SHORT = 20  # shingles
IN_LINE = 0.6  # of a line's weight that must be found in the other text
Text = Callable[[int], str]


class Near:
    """Likeness among `count` texts that are read by number when they are needed."""

    def __init__(self, count: int, text: Text, *, by_line: bool = False):
        self.count, self.text, self.by_line = count, text, by_line
        step = max(1, count // SAMPLED)
        self.weights = Weights(text(at) for at in range(0, count, step))
        self.weighed = lru_cache(maxsize=2048)(lambda at: self.weights.weighed(text(at)))

    def likeness(self, one: int, other: int) -> float:
        """Weighted Jaccard index. With `by_line` it is 0 where a line of one has too little in the other (two questions
        about the same long passage are not twins, alike as they are in all), and where texts are so short that a single
        other character may be what it is about."""
        first, second = self.weighed(one), self.weighed(other)
        value = likeness(first, second)
        if self.by_line and value < 1 and min(len(first.hashes), len(second.hashes)) < SHORT:
            return 0.0
        if self.by_line and value >= 0.5 and not (self._lines_in(one, other) and self._lines_in(other, one)):
            return 0.0
        return value

    def _lines_in(self, one: int, other: int) -> bool:
        there = self.weighed(other)
        lines = [line for line in self.text(one).split("\n") if line.strip()]
        for line in lines[:LINES] + lines[LINES:][-LINES:]:
            mine = self.weights.weighed(line)
            if mine.total > 1e-6 and mine.common(there)[0] < IN_LINE * mine.total:
                return False
        return True

    def pairs(self, threshold: float) -> Iterator[tuple[int, int, float]]:
        """Pairs of at least `threshold` likeness, enough of them to connect every cluster."""
        groups = Groups(self.count)
        for one, other in self._candidates():
            if groups.of(one) == groups.of(other):
                continue
            value = self.likeness(one, other)
            if value >= threshold:
                groups.join(one, other)
                yield one, other, value

    def _candidates(self) -> Iterator[tuple[int, int]]:
        bands, told = self._bands()
        codes = []
        for band in range(BANDS):
            order = np.argsort(bands[:, band], kind="stable")
            values = bands[order, band]
            starts = np.flatnonzero(np.diff(values, prepend=values[:1] ^ np.uint32(1))) if len(values) else values
            ends = np.append(starts[1:], len(values))
            for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
                same = np.sort(order[start:end])
                same = same[told[same]]
                if len(same) <= ALL_PAIRS:
                    one, other = np.triu_indices(len(same), 1)
                    codes.append(same[one] * self.count + same[other])
                else:
                    codes.append(same[0] * self.count + same[1:])
                    codes.append(same[:-1] * self.count + same[1:])
        for code in np.unique(np.concatenate(codes)) if codes else ():
            yield int(code // self.count), int(code % self.count)

    def _bands(self) -> tuple[np.ndarray, np.ndarray]:
        """((n, BANDS) uint32, (n,) whether the text has shingles at all). What most rows have is left out of the
        signature, where something remains: it would put all rows into one band."""
        from rensa import RMinHash

        bands = np.zeros((self.count, BANDS), np.uint32)
        told = np.zeros(self.count, bool)
        mix = np.uint64(0x9E3779B97F4A7C15) * (2 * np.arange(IN_BAND, dtype=np.uint64) + 1)
        for start in range(0, self.count, BATCH):
            stop = min(start + BATCH, self.count)
            hashed, offsets = shingles([self.text(at) for at in range(start, stop)])
            row = np.repeat(np.arange(stop - start), np.diff(offsets))
            says = self.weights.of(hashed) >= 0.5
            empty = np.bincount(row[says], minlength=stop - start) == 0
            says |= empty[row]
            hashed, row = hashed[says], row[says]
            counts = np.bincount(row, minlength=stop - start)
            told[start:stop] = counts > 0
            ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint64)
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashed, ends, BANDS * IN_BAND, 1)
            signature = np.array(matrix.to_rows(), np.uint64).reshape(stop - start, BANDS, IN_BAND)
            folded = (signature * mix).sum(axis=2)
            bands[start:stop] = (folded ^ (folded >> np.uint64(32))).astype(np.uint32)
        return bands, told


class Groups:
    """Numbers joined into groups (union-find with path halving)."""

    def __init__(self, count: int):
        self.parent = np.arange(count)

    def of(self, at: int) -> int:
        parent = self.parent
        while parent[at] != at:
            parent[at] = parent[parent[at]]
            at = parent[at]
        return int(at)

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.of(one), self.of(other)))
        self.parent[second] = first

    def join_equal(self, keys: Sequence | np.ndarray) -> None:
        """Joins all numbers whose keys are equal."""
        _, first, twin = np.unique(np.asarray(keys), return_index=True, return_inverse=True)
        for at, other in enumerate(first[twin]):
            if at != other:
                self.join(int(other), at)

    def members(self) -> list[list[int]]:
        """The groups of more than one, the largest first."""
        found: dict[int, list[int]] = defaultdict(list)
        for at in np.flatnonzero(self.parent != np.arange(len(self.parent))):
            found[self.of(int(at))].append(int(at))
        return sorted(([root, *rest] for root, rest in found.items()), key=lambda group: (-len(group), group))

    def names(self, keys: np.ndarray) -> list[bytes]:
        """(n,) a name for each number's group that depends on what is in it and not on its place: of several keys the
        one whose digest is smallest."""
        names = [bytes(key) for key in keys]
        for group in self.members():
            name = min({names[at] for at in group}, key=lambda key: digest(key.hex()))
            for at in group:
                names[at] = name
        return names


def keep_best(
    group: Sequence[int], rank: Callable[[int], tuple], likeness: Callable[[int, int], float], threshold: float
) -> dict[int, tuple[int, float]]:
    """{row that goes: (row that stays, their likeness)} of one cluster. The best stays (the lowest `rank`), and so does
    every other that is not itself close enough to one that stays: a chain of small steps is no reason to go."""
    kept: list[int] = []
    gone: dict[int, tuple[int, float]] = {}
    for at in sorted(group, key=rank):
        close = next(((stays, value) for stays in kept if (value := likeness(at, stays)) >= threshold), None)
        if close:
            gone[at] = close
        else:
            kept.append(at)
    return gone
