"""Which samples make each step, and the layouts they become. (seed, epoch) fixes the order; position is one integer.

    rows --order(seed, epoch)--> groups --batch_size or batch_tokens--> the rows of step k
    rows of step k --pack--> micro-batches under a token budget --lay_out--> Layouts

Packing happens inside a step only. So the loss of a step does not depend on the budget, on the number of ranks, or on
whether samples are packed at all.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache

import numpy as np

from ..errors import RequestError
from ..layout import Layout
from .pack import lay_out, pack
from .store import Part


class Batches:
    """The steps of a training run over one part of the prepared data."""

    def __init__(
        self,
        part: Part,
        *,
        batch_size: int = 16,
        batch_tokens: int | None = None,
        seed: int = 0,
        packing: bool = True,
        share: bool = True,
    ):
        self.part = part
        self.batch_size, self.batch_tokens, self.seed = batch_size, batch_tokens, seed
        self.packing, self.share = packing, share
        if len(part) == 0:
            raise RequestError(
                "there is nothing to train on: the training part is empty",
                where="data",
                hint="See quarantine.jsonl and the data report for what was removed, or change data.split.",
            )
        starts = np.flatnonzero(np.diff(part.groups, prepend=part.groups[0] - 1))
        ends = np.append(starts[1:], len(part))
        self._group_rows = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)]
        self._epoch_starts = [0]  # the first step of each epoch, as far as it was needed

    @lru_cache(maxsize=2)  # noqa: B019 - one object a run
    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step of an epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._group_rows))
        if self.batch_tokens is None:
            cuts = [list(order[at : at + self.batch_size]) for at in range(0, len(order), self.batch_size)]
        else:
            cuts = self._by_tokens(order, self.batch_tokens)
        return [np.concatenate([self._group_rows[g] for g in cut]) for cut in cuts]

    def _by_tokens(self, order: np.ndarray, budget: int) -> list[list[int]]:
        """Groups in order, up to `budget` tokens a step (at least one group)."""
        lengths = self.part.lengths
        steps: list[list[int]] = []
        full = budget + 1
        for group in order:
            size = int(lengths[self._group_rows[group]].sum())
            if full + size > budget:
                steps.append([])
                full = 0
            steps[-1].append(group)
            full += size
        return steps

    def steps_in(self, epochs: float) -> int:
        """Steps of the first `epochs` epochs (the last may be a part of one)."""
        whole = int(epochs)
        steps = self._start_of(whole)
        return steps + round((epochs - whole) * len(self._epoch(whole))) if epochs > whole else steps

    def steps_in_epoch(self, epoch: int) -> int:
        return len(self._epoch(epoch))

    def _start_of(self, epoch: int) -> int:
        while len(self._epoch_starts) <= epoch:
            done = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + len(self._epoch(done)))
        return self._epoch_starts[epoch]

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within it), both from 0."""
        while self._epoch_starts[-1] <= step:
            self._start_of(len(self._epoch_starts))
        epoch = bisect_right(self._epoch_starts, step) - 1
        return epoch, step - self._epoch_starts[epoch]

    def rows(self, step: int) -> np.ndarray:
        """(n,) the rows that step `step` (from 0, over all epochs) trains."""
        epoch, within = self.epoch_of(step)
        return self._epoch(epoch)[within]

    def layouts(self, step: int, *, budget: int, rank: int = 0, ranks: int = 1) -> list[Layout]:
        """This rank's micro-batches of a step: as many on every rank, some perhaps empty."""
        return layouts_of(self.part, self.rows(step), budget, rank, ranks, packing=self.packing, share=self.share)

    def saving(self, steps: int, *, budget: int) -> tuple[int, int]:
        """(tokens apart, tokens computed) over the first `steps` steps: what shared prefixes save."""
        apart = computed = 0
        for step in range(steps):
            rows = self.rows(step)
            apart += int(self.part.lengths[rows].sum())
            computed += sum(layout.tokens for layout in layouts_of(self.part, rows, budget, packing=self.packing))
        return apart, computed


def layouts_of(
    part: Part,
    rows: np.ndarray,
    budget: int,
    rank: int = 0,
    ranks: int = 1,
    *,
    packing: bool = True,
    share: bool = True,
) -> list[Layout]:
    """Some rows of a part as this rank's layouts. Without packing every sample is a layout of its own."""
    ids = [part.ids(row) for row in rows]
    if packing:
        blocks = pack(ids, budget, multiple=ranks, share=share)
    else:
        blocks = [[i] for i in range(len(rows))] + [[] for _ in range(-len(rows) % ranks)]
    return [
        lay_out(
            [ids[i] for i in block],
            [part.train_on(rows[i]) for i in block],
            [int(rows[i]) for i in block],
            share=share and packing,
        )
        for block in blocks[rank::ranks]
    ]
