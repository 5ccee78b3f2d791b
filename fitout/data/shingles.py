"""Texts as sets of overlapping character sequences, and how alike two of them are.

What nearly every row contains (a long system prompt, "What is the capital of") says nothing about likeness, so a
shingle weighs less the more rows have it: two questions that share their template and differ in the one word that
matters are not alike. Likeness is the weighted Jaccard index: weight in common / weight of both together, from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .scripts import mostly_cjk

LONG, SHORT = 5, 3  # characters of a shingle; the short one for Chinese, Japanese and Korean
TABLE = 1 << 20  # places in which rows that have a shingle are counted
FEW = 0.005  # of the rows: what no more than these have weighs 1
SAMPLED = 20_000  # rows that are counted
CAP = 20_000  # characters of a text that are looked at

Sets = tuple[np.ndarray, np.ndarray]


def shingles(texts: Sequence[str]) -> Sets:
    """((m,) uint64 hashes with repetitions, (n + 1,) where each text's begin). Case and white space do not count."""
    plain = [" ".join(text[:CAP].casefold().split()) for text in texts]
    result: list[np.ndarray] = [np.zeros(0, np.uint64)] * len(texts)
    short = [mostly_cjk(text[:400]) for text in plain]
    for width in (LONG, SHORT):
        chosen = [at for at, is_short in enumerate(short) if is_short == (width == SHORT) and plain[at]]
        if not chosen:
            continue
        coded = [np.frombuffer(plain[at].ljust(width).encode("utf-32-le", "surrogatepass"), "<u4") for at in chosen]
        flat = np.concatenate(coded).astype(np.uint64)
        hashed = np.full(len(flat) - width + 1, width, np.uint64)
        for step in range(width):
            hashed *= np.uint64(0x100000001B3)  # FNV's prime; overflow is meant
            hashed += flat[step : len(flat) - width + 1 + step]
        hashed ^= hashed >> np.uint64(31)
        hashed *= np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
        end = 0
        for at, code in zip(chosen, coded, strict=True):
            result[at] = hashed[end : end + len(code) - width + 1]
            end += len(code)
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(one) for one in result], out=offsets[1:])
    return np.concatenate(result) if result else np.zeros(0, np.uint64), offsets


def distinct(values: np.ndarray) -> np.ndarray:
    """The different values, sorted; several times as fast as np.unique on arrays as short as a text's."""
    values = np.sort(values)
    return values[np.concatenate([[True], values[1:] != values[:-1]])] if len(values) else values


class Weights:
    """How much each shingle says, from the share of the rows that have it.

    A shingle that at most FEW of the rows (or three) have weighs 1, one that all have 0, by logarithm between. At most
    SAMPLED rows are counted, in a table of fixed size; shingles that fall on one place share its count.
    """

    def __init__(self, texts: Iterable[str]):
        counts = np.zeros(TABLE, np.int32)
        rows = 0
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            rows += 1
            if len(batch) == 256:
                self._count(batch, counts)
                batch = []
        self._count(batch, counts)
        few = max(3.0, FEW * rows)
        seen = np.maximum(np.arange(rows + 1), 1)
        weight = np.ones(rows + 1) if rows <= few else np.clip(np.log(rows / seen) / np.log(rows / few), 0, 1)
        self._weight = weight.astype(np.float32)[counts]

    @staticmethod
    def _count(batch: list[str], counts: np.ndarray) -> None:
        hashed, offsets = shingles(batch)
        for at in range(len(batch)):
            counts[distinct(hashed[offsets[at] : offsets[at + 1]] % np.uint64(TABLE)).astype(np.int64)] += 1

    def of(self, hashes: np.ndarray) -> np.ndarray:
        """(m,) float32."""
        return self._weight[(hashes % np.uint64(TABLE)).astype(np.int64)]

    def weighed(self, text: str) -> Weighed:
        """A text's shingles, each once."""
        hashes = distinct(shingles([text])[0])
        return Weighed(hashes, self.of(hashes))


@dataclass(frozen=True)
class Weighed:
    """A text as a set: (m,) sorted hashes and what each weighs."""

    hashes: np.ndarray
    weights: np.ndarray

    @cached_property
    def total(self) -> float:
        return float(self.weights.sum())

    def common(self, other: Weighed) -> tuple[float, int]:
        """What the two have in common: its weight, and how many shingles it is."""
        if not len(self.hashes) or not len(other.hashes):
            return 0.0, 0
        at = np.minimum(np.searchsorted(other.hashes, self.hashes), len(other.hashes) - 1)
        both = other.hashes[at] == self.hashes
        return float(self.weights[both].sum()), int(both.sum())


def likeness(one: Weighed, other: Weighed) -> float:
    """Weighted Jaccard index; where all that two texts hold is everywhere, the plain one."""
    common, count = one.common(other)
    union = one.total + other.total - common
    if union <= 1e-6:
        return count / max(1, len(one.hashes) + len(other.hashes) - count)
    return common / union
