"""Which samples are for training, validation and test, and how often a training sample is seen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import Part, SplitSettings
from .content import digest

PARTS: tuple[Part, ...] = ("train", "validation", "test")
HELD_OUT: tuple[Part, ...] = ("test", "validation")
Label = tuple[str, ...]


def split(
    groups: Sequence[Any],
    settings: SplitSettings,
    seed: int,
    fixed: Sequence[Part | None] | None = None,
    labels: Sequence[Label] | None = None,
) -> dict[Part, np.ndarray]:
    """The numbers of the samples of each part, in rising order. Samples of one group always share a part.

    groups  (n,) what must stay together: equal for twins, for one conversation, one author. Bytes or text; the order in
            which groups are drawn depends on the seed and on these names alone, so that adding rows or reordering files
            moves only rows at the edges
    fixed   (n,) the part that a sample's file was given, None where it is free. A part that has such samples takes none
            of the others (training has its share), except for samples whose group is among the fixed ones: they go to
            where that is, test before validation before training. Only a group that fixed files themselves repeat can
            stand in two parts; `straddling` counts those
    labels  (n,) task and sub-task (any depth). Each part gets its share of every label, exactly where groups allow it

    Groups fill first the test and then the validation share of their label (their most frequent one); a group too large
    for what is left of it is passed over, and all else is training.
    """
    count = len(groups)
    fixed = fixed if fixed is not None else [None] * count
    members: dict[Any, list[int]] = defaultdict(list)
    home: dict[Any, Part] = {}  # groups that a fixed file has, and the part that draws the others to it
    part_of = np.full(count, -1, np.int8)
    for at, name in enumerate(groups):
        part = fixed[at]
        if part is None:
            members[name].append(at)
        else:
            part_of[at] = PARTS.index(part)
            home[name] = max(part, home.get(name, part), key=PARTS.index)
    for name in members.keys() & home.keys():
        part_of[members.pop(name)] = PARTS.index(home[name])

    shares = free_shares(settings, {part for part in fixed if part is not None})
    label_of = {name: _most_frequent(labels, rows) for name, rows in members.items()}
    sizes = Counter[Label]()
    for name, rows in members.items():
        sizes[label_of[name]] += len(rows)
    quota = label_quotas(sizes, shares)
    left_over = PARTS.index(max(PARTS, key=lambda part: (part == "train" and shares[part] > 0, shares[part])))
    ordered = sorted(members, key=lambda name: digest(seed, name.hex() if isinstance(name, bytes) else name))
    rest = []
    for name in ordered:
        size, mine = len(members[name]), quota[label_of[name]]
        part = next((part for part in HELD_OUT if size <= mine[part]), None)
        if part is None:
            rest.append(name)
            continue
        mine[part] -= size
        part_of[members[name]] = PARTS.index(part)
    missing = {part: sum(mine[part] for mine in quota.values()) for part in HELD_OUT}
    for name in rest:  # what groups too large for their label's share left open, any label may fill
        part = next((part for part in HELD_OUT if len(members[name]) <= missing[part]), None)
        if part is not None:
            missing[part] -= len(members[name])
        part_of[members[name]] = left_over if part is None else PARTS.index(part)
    return {part: np.flatnonzero(part_of == at) for at, part in enumerate(PARTS)}


def _most_frequent(labels: Sequence[Label] | None, rows: list[int]) -> Label:
    if labels is None:
        return ()
    if len(rows) == 1:
        return labels[rows[0]]
    counts = Counter(labels[at] for at in rows)
    return min(counts, key=lambda label: (-counts[label], label))


def label_quotas(sizes: Mapping[Label, int], shares: Mapping[Part, float]) -> dict[Label, dict[Part, int]]:
    """For each label whole numbers a part: as many samples as the label has, and over all labels the quotas of all.

    Level by level: a task's quota is divided over its sub-tasks, each within one of its share.
    """
    whole = quotas(sum(sizes.values()), shares)
    result: dict[Label, dict[Part, int]] = {label: dict.fromkeys(PARTS, 0) for label in sizes}
    for part in HELD_OUT:
        _divide(dict(sizes), whole[part], shares[part], 0, part, result)
    for label, mine in result.items():
        while sum(mine[part] for part in HELD_OUT) > sizes[label]:  # both rounded up on a label of one or two
            mine[max(HELD_OUT, key=lambda part: mine[part])] -= 1
        mine["train"] = sizes[label] - mine["test"] - mine["validation"]
    return result


def _divide(
    sizes: dict[Label, int], total: int, share: float, depth: int, part: Part, result: dict[Label, dict[Part, int]]
) -> None:
    """Gives `total` samples of a part to labels that are equal up to `depth`, by largest remainder at each level."""
    branches: dict[Label, dict[Label, int]] = defaultdict(dict)
    for label, size in sizes.items():
        branches[label[: depth + 1]][label] = size
    exact = {branch: round(sum(below.values()) * share, 9) for branch, below in branches.items()}
    given = {branch: min(math.floor(value), total) for branch, value in exact.items()}
    # validation takes its remainders from the other end, so that small labels do not lose to both
    by_remainder = sorted(
        branches, key=lambda b: (exact[b] - math.floor(exact[b]), digest(part, *b)), reverse=True
    )  # fmt: skip
    for branch in by_remainder[: max(0, total - sum(given.values()))]:
        given[branch] += 1
    for branch, below in branches.items():
        if len(below) == 1:
            result[next(iter(below))][part] = given[branch]
        else:
            _divide(below, given[branch], share, depth + 1, part, result)


def free_shares(settings: SplitSettings, served: set[Part]) -> dict[Part, float]:
    """Shares for rows that no `split:` fixes: none for a part that has a source of its own."""
    shares: dict[Part, float] = {part: getattr(settings, part) for part in PARTS}
    for part in served - {"train"}:
        shares["train"] += shares[part]
        shares[part] = 0.0
    return shares


def quotas(count: int, shares: Mapping[Part, float]) -> dict[Part, int]:
    """Whole numbers that add up to `count`, each within one of its share; training has one where its share is not zero.

    By largest remainder, test before validation in a tie.
    """
    # Rounded, so that 0.1 * 30 = 3.0000000000000004 has no remainder.
    exact = {part: round(count * shares[part], 9) for part in PARTS}
    whole = {part: math.floor(exact[part]) for part in PARTS}
    by_remainder = sorted((*HELD_OUT, "train"), key=lambda part: exact[part] - whole[part], reverse=True)
    for part in by_remainder[: count - sum(whole.values())]:
        whole[part] += 1
    if count and shares["train"] > 0 and not whole["train"]:
        whole[max(HELD_OUT, key=lambda part: whole[part])] -= 1
        whole["train"] = 1
    return whole


def straddling(groups: Sequence[Any], parts: Mapping[Part, Sequence[int] | np.ndarray]) -> int:
    """How many groups stand both in training and in validation or test."""
    trained = {groups[at] for at in parts["train"]}
    return len(trained & {groups[at] for part in HELD_OUT for at in parts[part]})


def times_seen(weights: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    """(n,) how often each training sample is seen in an epoch.

    Weight 2 gives every sample twice, 0.5 a half chosen by seed and name, 1.5 every sample once and a half of them once
    more. The n samples of one weight become round(n * weight), at least one.
    """
    times = np.ones(len(weights), np.int64)
    for weight in np.unique(weights):
        rows = np.flatnonzero(weights == weight)
        times[rows] = spread(max(1, round(len(rows) * float(weight))), [names[int(at)] for at in rows], seed)
    return times


def spread(total: int, names: Sequence[str], seed: int) -> np.ndarray:
    """(n,) whole numbers that add up to `total` and differ by at most one; seed and name choose who has more."""
    each, more = divmod(total, len(names))
    times = np.full(len(names), each, np.int64)
    if more:
        times[sorted(range(len(names)), key=lambda at: digest(seed, names[at]))[:more]] += 1
    return times
