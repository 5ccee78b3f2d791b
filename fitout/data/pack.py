"""Packing: which samples share a forward, and how they lie in it. Pure functions over ids and lengths.

Samples that begin with the same tokens are laid out as a tree: the common beginning is one segment, computed once, and
every sample continues it as a branch. Loss and gradients are those of the samples laid out apart (tests/equal).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np

from ..layout import Layout, Segment

MIN_SHARED = 16  # a shorter common beginning costs more in small attention calls than it saves


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two samples have in common at their beginning."""
    size = min(len(a), len(b))
    differs = np.flatnonzero(a[:size] != b[:size])
    return int(differs[0]) if len(differs) else size


def families(samples: Sequence[np.ndarray], group: Sequence[int], depth: int = 0) -> list[list[int]]:
    """Splits samples (indices `group`) by the MIN_SHARED tokens after `depth`; each family in lexicographic order."""
    found: dict[bytes, list[int]] = {}
    for index in group:
        key = samples[index][depth : depth + MIN_SHARED]
        found.setdefault(key.tobytes() if len(key) == MIN_SHARED else b"%d" % index, []).append(index)
    return [sorted(f, key=lambda i: (samples[i].tolist(), i)) if len(f) > 1 else f for f in found.values()]


def tree_tokens(samples: Sequence[np.ndarray], group: Sequence[int]) -> list[int]:
    """How many tokens each sample of a lexicographically ordered group adds to the tree of those before it."""
    added = []
    for at, index in enumerate(group):
        shared = common_prefix(samples[group[at - 1]], samples[index]) if at else 0
        added.append(len(samples[index]) - (shared if shared >= MIN_SHARED else 0))
    return added


def pack(
    samples: Sequence[np.ndarray],
    budget: int,
    *,
    multiple: int = 1,
    share: bool = True,
    partner: Mapping[int, int] = {},  # noqa: B006 - only read
) -> list[list[int]]:
    """Divides a step's samples into micro-batches of about `budget` tokens, a multiple of `multiple` of them.

    Micro-batches are made as equal as possible (largest first into the emptiest), so that no rank waits for another.
    A sample longer than the budget has a micro-batch of its own size. Empty ones fill up where ranks outnumber samples.
    `partner` gives some samples another, of those that are nobody's partner themselves, that must lie with them.
    """
    items: list[tuple[int, list[int]]] = []  # tokens, samples that lie together
    led = set(partner.values())
    leaders = [i for i in range(len(samples)) if i not in led]
    for group in families(samples, leaders) if share else [[i] for i in leaders]:
        tokens = 0
        together: list[int] = []
        for index, added in zip(group, tree_tokens(samples, group), strict=True):
            members = [index, partner[index]] if index in partner else [index]
            _, *more = tree_tokens(samples, members) if share else map(len, (samples[i] for i in members))
            if together and tokens + added + sum(more) > budget:
                items.append((tokens, together))
                tokens, together, added = 0, [], len(samples[index])
            tokens += added + sum(more)
            together += members
        items.append((tokens, together))
    items.sort(key=lambda item: (-item[0], item[1]))
    blocks = max(1, -(-sum(tokens for tokens, _ in items) // budget))
    while True:
        blocks = -(-blocks // multiple) * multiple
        packed = _even(items, blocks)
        fullest = max(tokens for tokens, _ in packed)
        if fullest <= max(budget, items[0][0] if items else 0):
            return [members for _, members in packed]
        blocks += 1


def _even(items: list[tuple[int, list[int]]], blocks: int) -> list[tuple[int, list[int]]]:
    """Puts each item into the emptiest block; `items` are in falling order (longest processing time rule)."""
    heap = [(0, at) for at in range(blocks)]
    filled: list[list[int]] = [[] for _ in range(blocks)]
    sizes = [0] * blocks
    for tokens, members in items:
        size, at = heapq.heappop(heap)
        filled[at] += members
        sizes[at] = size + tokens
        heapq.heappush(heap, (sizes[at], at))
    return list(zip(sizes, filled, strict=True))


def lay_out(
    samples: Sequence[np.ndarray], train_on: Sequence[np.ndarray], rows: Sequence[int], *, share: bool = True
) -> Layout:
    """One layout of the given samples: ids (n_i,), train_on (n_i,) bool, and the row each has in the store."""
    segments: list[Segment] = []
    chunks: list[tuple[int, int, int]] = []  # sample, from, to: the tokens of each segment
    paths: dict[int, list[int]] = {}  # sample -> its segments from the root down

    def add(sample: int, start: int, end: int, parent: int) -> int:
        at = segments[-1].end if segments else 0
        segments.append(Segment(at, at + end - start, parent))
        chunks.append((sample, start, end))
        return len(segments) - 1

    def leaf(sample: int, depth: int, line: list[int]) -> None:
        """The rest of a sample after its first `depth` tokens, which the segments `line` hold."""
        end = len(samples[sample])
        paths[sample] = [*line, add(sample, depth, end, line[-1] if line else -1)] if end > depth else line

    def branch(group: Sequence[int], depth: int, line: list[int]) -> None:
        """Samples that have their first `depth` tokens in common."""
        for twigs in families(samples, group, depth) if share else [[i] for i in group]:
            common = common_prefix(samples[twigs[0]], samples[twigs[-1]]) if len(twigs) > 1 else 0
            if common - depth >= MIN_SHARED:
                trunk = add(twigs[0], depth, common, line[-1] if line else -1)
                branch(twigs, common, [*line, trunk])
            else:
                for sample in twigs:
                    leaf(sample, depth, line)

    branch(range(len(samples)), 0, [])
    ids = np.concatenate([samples[s][a:b] for s, a, b in chunks]) if chunks else np.zeros(0)
    positions = np.concatenate([np.arange(a, b) for _, a, b in chunks]) if chunks else np.zeros(0)
    at, token, sample_of = [], [], []
    for index, path in paths.items():
        where = np.concatenate([np.arange(segments[s].start, segments[s].end) for s in path])
        trained = np.flatnonzero(train_on[index][1:]) + 1
        at.append(where[trained - 1])
        token.append(samples[index][trained])
        sample_of.append(np.full(len(trained), rows[index]))
    flat_at = np.concatenate(at) if at else np.zeros(0)
    return Layout(
        ids=ids.astype(np.int64),
        positions=positions.astype(np.int64),
        segments=tuple(segments),
        target_at=flat_at.astype(np.int64),
        target_token=(np.concatenate(token) if token else np.zeros(0)).astype(np.int64),
        target_weight=np.ones(len(flat_at), np.float32),
        target_sample=(np.concatenate(sample_of) if sample_of else np.zeros(0)).astype(np.int64),
    )
