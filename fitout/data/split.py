"""Which samples are for training, validation and test, and how often a training sample is seen."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from ..chat.types import Sample
from . import Part, SplitSettings
from .content import content_key, digest, prompt_key

PARTS: tuple[Part, ...] = ("train", "validation", "test")
HELD_OUT: tuple[Part, ...] = ("test", "validation")


def split(
    samples: Sequence[Sample], settings: SplitSettings, seed: int, fixed: Mapping[str, Part] | None = None
) -> dict[Part, list[Sample]]:
    """Parts of the samples, in their own order. Samples with the same prompt always share a part.

    Groups (one a prompt) are put in an order that depends on the seed and their content alone, and fill first the test
    and then the validation share; a group too large for what is left of a share is passed over, so the counts are exact
    wherever groups allow it, and all else is training. Adding rows or reordering files moves only rows at the edges.

    `fixed` maps a file (as in `origin.file`) to the part its rows are. A part that has such rows takes none of the
    other rows (training has its share), except for rows whose prompt is among the fixed ones: they go to where that is,
    test before validation before training, so that no prompt of the test set is trained on. Only a prompt that fixed
    files themselves repeat can stand in two parts; `straddling` counts those.
    """
    fixed = fixed or {}
    groups: dict[bytes, list[int]] = defaultdict(list)
    home: dict[bytes, Part] = {}  # prompts that a fixed file has, and the part that draws the others to it
    part_of: dict[int, Part] = {}
    for at, sample in enumerate(samples):
        key = prompt_key(sample)
        part = fixed.get(sample.origin.file)
        if part is None:
            groups[key].append(at)
        else:
            part_of[at] = part
            home[key] = max(part, home.get(key, part), key=PARTS.index)

    free = {key: rows for key, rows in groups.items() if key not in home}
    for key in groups.keys() & home.keys():
        part_of.update((at, home[key]) for at in groups[key])

    shares = free_shares(settings, set(fixed.values()))
    quota = quotas(sum(map(len, free.values())), shares)
    left_over = max(PARTS, key=lambda part: (part == "train" and shares[part] > 0, shares[part]))
    for key in sorted(free, key=lambda key: digest(seed, key.hex())):
        rows = free[key]
        goes_to = next((part for part in HELD_OUT if len(rows) <= quota[part]), left_over)
        quota[goes_to] -= len(rows)
        part_of.update((at, goes_to) for at in rows)

    parts: dict[Part, list[Sample]] = {part: [] for part in PARTS}
    for at, sample in enumerate(samples):
        parts[part_of[at]].append(sample)
    return parts


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


def straddling(parts: Mapping[Part, Sequence[Sample]]) -> int:
    """How many prompts stand both in training and in validation or test."""
    trained = {prompt_key(sample) for sample in parts["train"]}
    held_out = {prompt_key(sample) for sample in (*parts["validation"], *parts["test"])}
    return len(trained & held_out)


def weighted(samples: Sequence[Sample], weights: Mapping[str, float], seed: int) -> list[Sample]:
    """Training samples, each as often as its file weighs in an epoch; files not in `weights` weigh 1.

    Weight 2 gives every sample twice, 0.5 a half chosen by seed and content, 1.5 every sample once and a half of them
    once more. The n samples of one weight become round(n * weight), at least one. Copies follow each other (the order
    of an epoch shuffles them). `weighting` says what it came to.
    """
    by_weight: dict[float, list[int]] = defaultdict(list)
    for at, sample in enumerate(samples):
        by_weight[weights.get(sample.origin.file, 1.0)].append(at)
    copies = [1] * len(samples)
    for weight, rows in by_weight.items():
        each, more = divmod(max(1, round(len(rows) * weight)), len(rows))
        if more:  # which of them is seen once more than the others
            rows = sorted(rows, key=lambda at: digest(seed, content_key(samples[at]).hex(), str(samples[at].origin)))
        for rank, at in enumerate(rows):
            copies[at] = each + (rank < more)
    return [sample for at, sample in enumerate(samples) for _ in range(copies[at])]


def weighting(before: Sequence[Sample], after: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """For each file whose count the weights changed: samples before and after."""
    was, now = (Counter(sample.origin.file for sample in samples) for samples in (before, after))
    return {file: (was[file], now[file]) for file in was if was[file] != now[file]}
