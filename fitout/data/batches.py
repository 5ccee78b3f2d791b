"""Which samples make each step, and the layouts they become. (seed, epoch) fixes the order; position is one integer.

    rows --the same prompt--> groups --order(seed, epoch), batch_size or batch_tokens--> step k
    rows of step k --pack--> micro-batches under a token budget --lay_out--> Layouts

What is shuffled is a group: the answers to one prompt are trained in one step where they fit, so that it computes their
prompt once. All steps of an epoch but the last have `batch_size` examples.

Packing happens inside a step only. So the loss of a step does not depend on the budget, on the number of ranks, or on
whether samples are packed at all.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from functools import cached_property, lru_cache
from hashlib import blake2b
from threading import RLock

import numpy as np

from ..errors import RequestError
from ..layout import Layout
from .pack import MIN_SHARED, lay_out, pack
from .store import Part

UNFINISHED = 16  # steps that wait for a group of the right size


class Batches:
    """The steps of a training run over one part of the prepared data. May be asked from several threads."""

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
        self._examples = [np.arange(a, b) for a, b in zip(starts, ends, strict=True)]  # a conversation's samples
        self._groups = _same_prompt(part, starts)  # also without packing: steps are the same ones
        self._epoch_starts = [0]  # the first step of each epoch, as far as it was needed
        self._lock = RLock()  # of what is found out step by step

    @property
    def examples(self) -> int:
        """What `batch_size` counts: conversations, pairs, or blocks of a text."""
        return len(self._examples)

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        """The rows of each step of an epoch."""
        with self._lock:
            return self._cut(epoch)

    @lru_cache(maxsize=2)  # noqa: B019 - one object a run
    def _cut(self, epoch: int) -> list[np.ndarray]:
        shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(self._groups))
        groups = [self._groups[at] for at in shuffled]
        if self.batch_tokens is None:
            cuts = _by_count(groups, self.batch_size)
        else:
            cuts = self._by_tokens([example for group in groups for example in group], self.batch_tokens)
        return [np.concatenate([self._examples[at] for at in cut]) for cut in cuts]

    def _by_tokens(self, order: list[int], budget: int) -> list[list[int]]:
        """Examples in order, up to `budget` tokens a step (at least one example)."""
        lengths = self.part.lengths
        steps: list[list[int]] = []
        full = budget + 1
        for example in order:
            size = int(lengths[self._examples[example]].sum())
            if full + size > budget:
                steps.append([])
                full = 0
            steps[-1].append(example)
            full += size
        return steps

    def steps_in(self, epochs: float) -> int:
        """Steps of the first `epochs` epochs (the last may be a part of one), at least one."""
        whole = int(epochs)
        steps = self._start_of(whole)
        return max(1, steps + round((epochs - whole) * len(self._epoch(whole))) if epochs > whole else steps)

    def steps_in_epoch(self, epoch: int) -> int:
        return len(self._epoch(epoch))

    def _start_of(self, epoch: int) -> int:
        with self._lock:
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

    def tasks(self, step: int) -> dict[str, int]:
        """Tokens of each task in a step, {} where the data have no tasks."""
        if not self.part.tasks:
            return {}
        rows = self.rows(step)
        tokens = np.bincount(self._task_of[rows], self.part.lengths[rows], len(self.part.tasks))
        return {name: int(count) for name, count in zip(self.part.tasks, tokens, strict=True) if count}

    @cached_property
    def _task_of(self) -> np.ndarray:
        """(rows,) the place of each row's task in `part.tasks`; every row has one where there are any."""
        of = np.empty(len(self.part), np.int64)
        for place, rows in enumerate(self.part.tasks.values()):
            of[rows] = place
        return of

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


def _by_count(groups: list[list[int]], size: int) -> list[list[int]]:
    """Steps of `size` examples each (the last may have fewer). A group goes whole into the first of a few unfinished
    steps that has room for it; where none has, the oldest is filled with a part of it."""
    steps: list[list[int]] = []
    unfinished: list[list[int]] = []
    for group in groups:
        whole = len(group) - len(group) % size
        steps += [group[at : at + size] for at in range(0, whole, size)]
        rest = group[whole:]
        if not rest:
            continue
        step = next((step for step in unfinished if len(step) + len(rest) <= size), None)
        if step is None and len(unfinished) == UNFINISHED:
            room = size - len(unfinished[0])
            steps.append(unfinished.pop(0) + rest[:room])
            rest = rest[room:]
        if step is None:
            step = []
            unfinished.append(step)
        step += rest
        if len(step) == size:
            unfinished.remove(step)
            steps.append(step)
    left = [example for step in unfinished for example in step]
    return steps + [left[at : at + size] for at in range(0, len(left), size)]


def _same_prompt(part: Part, starts: np.ndarray) -> list[list[int]]:
    """Examples (by number; example n begins at row starts[n]) grouped by all that stands before their first trained
    token, in order of appearance. A prompt too short to be worth sharing makes no group, and a sample that is there
    twice (a source's weight) is in two groups, so that it is not seen twice at once."""
    found: dict[bytes, list[int]] = {}
    seen: dict[bytes, int] = {}
    rejected = part.rejected
    for example, row in enumerate(starts.tolist()):
        ids, trained = part.ids(row), part.train_on(row)[1:]
        length = 1 + int(trained.argmax()) if len(trained) else 0
        key = b"%d" % example
        if length >= MIN_SHARED:
            pair = row + 1 < len(part) and rejected[row + 1]
            said = np.concatenate([ids, part.ids(row + 1)]) if pair else ids
            whole, prompt = (blake2b(some.tobytes(), digest_size=16).digest() for some in (said, ids[:length]))
            seen[whole] = seen.get(whole, 0) + 1
            key = prompt + b"%d" % seen[whole]
        found.setdefault(key, []).append(example)
    return list(found.values())


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
    """Some rows of a part as this rank's layouts. Without packing every sample, or pair, is a layout of its own. Of a
    pair both rows are there, the rejected answer's after the chosen one's."""
    ids = [part.ids(row) for row in rows]
    partner = {int(i) - 1: int(i) for i in np.flatnonzero(part.rejected[rows])}
    if packing:
        blocks = pack(ids, budget, multiple=ranks, share=share, partner=partner)
    else:
        led = set(partner.values())
        blocks = [[i, partner[i]] if i in partner else [i] for i in range(len(rows)) if i not in led]
        blocks += [[] for _ in range(-len(blocks) % ranks)]
    return [_lay_out(part, rows, ids, block, partner, share and packing) for block in blocks[rank::ranks]]


def _lay_out(
    part: Part, rows: np.ndarray, ids: list[np.ndarray], block: list[int], partner: dict[int, int], share: bool
) -> Layout:
    mine = [int(rows[i]) for i in block]
    layout = lay_out([ids[i] for i in block], [part.train_on(row) for row in mine], mine, share=share)
    pairs = np.array([(rows[i], rows[partner[i]]) for i in block if i in partner], np.int64)
    if not len(pairs):
        return layout
    references = np.full(pairs.shape, np.nan) if part.references is None else part.references[pairs]
    return replace(layout, preferences=pairs, references=references)
