"""What a run computes: its steps as micro-batches of so many tokens, targets and documents, before any is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..layout import Layout

LOOKED_AT = 64  # steps, evenly over the run; the largest micro-batch among them stands for the largest of the run


@dataclass(frozen=True)
class MicroBatch:
    """`pairs` is how often a token looks at a token, itself included, in each attention layer; `lengths` are those of
    its documents (or branches)."""

    tokens: int
    targets: int
    lengths: tuple[int, ...]
    pairs: int
    layout: Layout | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Work:
    """Some steps of one rank, and how many there are in an epoch and in the run."""

    steps: tuple[tuple[MicroBatch, ...], ...]
    steps_per_epoch: float
    total_steps: int
    longest: int  # tokens of the longest sample
    samples: int

    @property
    def largest(self) -> MicroBatch:
        return max((one for step in self.steps for one in step), key=lambda one: (one.tokens, one.targets))

    @property
    def most_micro_batches(self) -> int:
        return max(len(step) for step in self.steps)

    @property
    def tokens_per_step(self) -> float:
        return sum(one.tokens for step in self.steps for one in step) / len(self.steps)

    @property
    def timed(self) -> tuple[tuple[MicroBatch, ...], ...]:
        """The steps whose times are averaged; the first of a run warms up and is left out (of a measured run too)."""
        return self.steps[1:] if len(self.steps) > 2 else self.steps


WorkAt = Callable[[int, int], Work]  # (tokens a micro-batch, ranks) -> what the run computes


def work_of(
    batches: Any, *, budget: int, epochs: float, max_steps: int | None, ranks: int = 1, share: float = 1.0
) -> Work:
    """The work of a run over `batches` (data.batches.Batches). `share` is the part of all samples that they hold."""
    per_epoch = batches.steps_in_epoch(0)
    total = max_steps or batches.steps_in(epochs)
    looked = np.unique(np.linspace(0, max(1, min(total, per_epoch)) - 1, LOOKED_AT).astype(int))
    steps = [batches.layouts(int(step), budget=budget, ranks=ranks) for step in looked]
    return Work(
        steps=tuple(tuple(_micro_batch(layout) for layout in step if layout.tokens) for step in steps),
        steps_per_epoch=per_epoch / share,
        total_steps=max_steps or round(total / share),
        longest=int(batches.part.lengths.max()),
        samples=round(batches.examples / share),
    )


def _micro_batch(layout: Layout) -> MicroBatch:
    lengths = tuple(segment.length for segment in layout.segments)
    return MicroBatch(layout.tokens, layout.supervised, lengths, layout.pairs, layout)


class AverageLength:
    """Stands in for prepared data of which only the average length is known: lengths spread log-normally around it
    (sigma 0.5, as instruction data roughly are), half of each sample trained. With `pairs` every second sample is the
    rejected answer of a pair. Has what Batches reads of a Part."""

    references = None

    def __init__(self, average: int, longest: int, samples: int = 1024, *, pairs: bool = False):
        spread = np.random.default_rng(0).lognormal(0, 0.5, samples)
        lengths = np.clip(np.round(average * spread / spread.mean()), 2, longest)
        self.lengths = lengths.astype(np.int64)
        if pairs:
            self.lengths[1::2] = self.lengths[::2]
        self.groups = np.arange(samples) // (2 if pairs else 1)
        self.rejected = np.arange(samples) % 2 == pairs if pairs else np.zeros(samples, bool)

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, row: int) -> np.ndarray:
        ids = np.arange(row, row + self.lengths[row], dtype=np.int32)  # no two begin alike: nothing is shared
        if self.rejected[row]:
            ids[: self.lengths[row] // 2] -= 1  # but a pair's prompt
        return ids

    def train_on(self, row: int) -> np.ndarray:
        return (np.arange(self.lengths[row]) >= self.lengths[row] // 2).astype(np.uint8)


def in_steps(one: MicroBatch, count: int = 1) -> Work:
    """Work of steps that are all alike, for questions without data."""
    return Work(((one,) * count,), 1, 1, one.tokens, count)
