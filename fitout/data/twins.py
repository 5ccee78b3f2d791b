"""The stages that look for one row in another: duplicates, benchmark questions, held-out samples in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..chat.types import Origin, Text
from ..errors import DataError
from . import BenchmarkSettings, DeduplicateSettings, SourceSettings
from .content import digest, opening
from .dedupe import repeats
from .formats import Refused, choose, convert
from .leakage import Certificate, certify, contained
from .near import Groups, Near, keep_best
from .rows import Rows
from .shingles import Weights
from .sources import RawRow, probe, read
from .taxonomy import look_up

Remove = Callable[[int, str, str], None]  # sample, rule, reason
EXCERPT = 300  # characters of a text that a report shows
CLUSTERS, PAIRS = 25, 25  # that a report shows
CERTIFIED = 2_000  # held-out samples of a part that are compared with training
LEAST = 0.5  # likeness that the certificate tells of
SHORTEST = 30  # characters of a benchmark question; a shorter one stands in many a text by chance


@dataclass
class Twins:
    """What the search for duplicates found."""

    here: np.ndarray  # numbers of the samples that stay
    groups: Groups  # over all samples: those whose prompts are the same or nearly so
    weights: Weights | None = None  # of the prompts; None where nothing near was looked for
    figures: dict[str, Any] = field(default_factory=dict)  # for the report
    clusters: list[dict[str, Any]] = field(default_factory=list)  # for the page


def find_twins(rows: Rows, settings: DeduplicateSettings, turn: np.ndarray, remove: Remove) -> Twins:
    """Exact duplicates go; near ones are found, and go where the settings say so. Of twins the one of the lowest `turn`
    (n,) stays."""
    here = np.arange(len(rows))
    if settings.exact:
        first = repeats(rows.keys, turn)
        for at in np.flatnonzero(first != here):
            remove(int(at), "duplicate", f"repeats {rows.origin(first[at])}")
        here = here[first == here]
    found = Twins(here, Groups(len(rows)), figures={"near": settings.near, "similarity": settings.similarity})
    found.groups.join_equal(rows.prompts)
    if settings.near == "off" or len(here) < 2:
        return found
    near = Near(len(here), lambda at: rows.whole(int(here[at])), by_line=True)
    pairs = [(int(here[one]), int(here[other]), value) for one, other, value in near.pairs(settings.similarity)]
    by_meaning: list[tuple[int, int, float]] = []
    if settings.meaning:
        from .meaning import alike

        by_meaning = alike([rows.prompt(int(at)) for at in here], settings.meaning, here)
    _join_prompts(rows, found, settings.similarity)
    for one, other, _ in by_meaning:
        found.groups.join(one, other)
    found.figures |= {"by_meaning": len(by_meaning)}
    _clusters(rows, found, near, [*pairs, *by_meaning], settings, turn, remove)
    return found


def _join_prompts(rows: Rows, found: Twins, similarity: float) -> None:
    """Samples with nearly the same prompt are one group."""
    _, first = np.unique(rows.prompts[found.here], return_index=True)
    asked = found.here[np.sort(first)]
    near = Near(len(asked), lambda at: rows.prompt(int(asked[at])))
    found.weights = near.weights
    for one, other, _ in near.pairs(similarity):
        found.groups.join(int(asked[one]), int(asked[other]))


def _clusters(
    rows: Rows,
    found: Twins,
    near: Near,
    pairs: list[tuple[int, int, float]],
    settings: DeduplicateSettings,
    turn: np.ndarray,
    remove: Remove,
) -> None:
    """The clusters that the pairs make: shown, and all but their best taken out where the settings say so."""
    place = {int(at): number for number, at in enumerate(found.here)}
    clusters = Groups(len(rows))
    for one, other, _ in pairs:
        clusters.join(one, other)
    meant = {frozenset(pair[:2]): pair[2] for pair in pairs}

    def alike(one: int, other: int) -> float:
        return max(near.likeness(place[one], place[other]), meant.get(frozenset((one, other)), 0.0))

    groups = clusters.members()
    gone: dict[int, tuple[int, float]] = {}
    for group in groups:
        losers = keep_best(group, _rank(rows, settings.keep, turn), alike, settings.similarity)
        gone |= losers
        if len(found.clusters) < CLUSTERS:
            found.clusters.append(_shown(rows, group, losers))
    found.figures |= {"clusters": len(groups), "in_clusters": sum(map(len, groups)), "would_go": len(gone)}
    if settings.near == "drop":
        for at, (stays, value) in sorted(gone.items()):
            remove(at, "near-duplicate", f"nearly repeats {rows.origin(stays)} (likeness {value:.2f})")
        found.here = np.array([at for at in found.here if int(at) not in gone], np.int64)


def _rank(rows: Rows, keep: str, turn: np.ndarray) -> Callable[[int], tuple]:
    """The best first: by `turn`, then as `keep` says, then the earlier."""

    def rank(at: int) -> tuple:
        if keep == "first":
            quality = 0.0
        elif keep == "longest":
            quality = float(len(rows.whole(at)) - len(rows.prompt(at)) or len(rows.whole(at)))
        else:
            value = look_up(rows.sample(at).meta, keep)
            quality = float(value) if isinstance(value, int | float) else float("-inf")
        return (int(turn[at]), -quality, at)

    return rank


def _shown(rows: Rows, group: list[int], losers: dict[int, tuple[int, float]]) -> dict[str, Any]:
    shown = sorted(group, key=lambda at: (at in losers, at))[:4]
    return {
        "size": len(group),
        "stay": len(group) - len(losers),
        "members": [
            {
                "where": str(rows.origin(at)),
                "text": excerpt(rows.whole(at)),
                "likeness": round(losers[at][1], 3) if at in losers else None,
            }
            for at in shown
        ],
    }


def excerpt(text: str, longest: int = EXCERPT) -> str:
    text = " ".join(text[: 4 * longest].split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


# benchmarks


def find_benchmarks(
    rows: Rows, here: np.ndarray, settings: BenchmarkSettings, remove: Remove
) -> tuple[np.ndarray, dict[str, Any], list[dict[str, Any]]]:
    """(samples that stay, figures, findings to show): samples that hold a question of a benchmark file."""
    items: list[str] = []
    owners: list[Origin] = []
    counts: dict[str, int] = {}
    for path in settings.files:
        questions = _questions(path)
        counts[path] = len(questions)
        items += [text for text, _ in questions]
        owners += [origin for _, origin in questions]
    weights = Weights([*items, *(rows.whole(int(at)) for at in here[:: max(1, len(here) // 10_000)])])
    best: dict[int, tuple[int, float]] = {}
    for at, item, share in contained(here, rows.whole, items, weights, overlap=settings.overlap):
        if share > best.get(at, (-1, 0.0))[1]:
            best[at] = (item, share)
    shown = [
        {
            "where": str(rows.origin(at)),
            "text": excerpt(rows.whole(at)),
            "benchmark": str(owners[item]),
            "item": excerpt(items[item]),
            "share": round(share, 3),
        }
        for at, (item, share) in sorted(best.items(), key=lambda hit: -hit[1][1])[:PAIRS]
    ]
    figures = {"files": counts, "overlap": settings.overlap, "action": settings.action, "samples": len(best)}
    if settings.action == "drop":
        for at, (item, share) in sorted(best.items()):
            remove(at, "benchmark question", f"holds {share:.0%} of {owners[item]}")
        here = np.array([at for at in here if int(at) not in best], np.int64)
    return here, figures, shown


def _questions(path: str) -> list[tuple[str, Origin]]:
    """What a benchmark file asks: the prompts of its rows, or its texts."""
    source = SourceSettings(path=path)
    plug = choose(probe(source, Path()), where=path)
    found = []
    for row in read(source, Path()):
        for sample in convert(plug, row) if isinstance(row, RawRow) else ():
            if isinstance(sample, Refused):
                continue
            text = sample.text if isinstance(sample, Text) else "\n".join(m.content for m in opening(sample))
            if len(text) >= SHORTEST:
                found.append((text, sample.origin))
    if not found:
        raise DataError(
            f"no question of at least {SHORTEST} characters is in this benchmark file",
            where=path,
            harm="Nothing could be looked for.",
            hint="Name the file that holds the benchmark's questions under data.benchmarks.files.",
        )
    return found


# the certificate


def certify_split(
    rows: Rows, training: np.ndarray, held_out: Mapping[Any, np.ndarray], weights: Weights, similarity: float
) -> tuple[set[int], dict[str, Any], list[dict[str, Any]]]:
    """(training samples too near to a held-out one, figures, nearest pairs to show)."""
    chosen = {part: _some(rows, numbers) for part, numbers in held_out.items()}
    part_of = {int(at): part for part, numbers in chosen.items() for at in numbers}
    found = certify(training, list(part_of), rows.prompt, weights, least=LEAST, limit=similarity)
    too_near = {at for at, _, _ in found.too_near}
    figures: dict[str, Any] = {"similarity": similarity, "least": LEAST, "removed": len(too_near), "parts": {}}
    for part, numbers in chosen.items():
        values = [value for at, (_, value) in zip(found.held_out, found.nearest, strict=True) if part_of[at] == part]
        left = [value for value in values if value < similarity]
        figures["parts"][part] = {
            "samples": len(held_out[part]),
            "compared": len(numbers),
            "nearest": round(max(left, default=0.0), 3),
            "histogram": _histogram(left),
        }
    return too_near, figures, _nearest(rows, found, part_of, similarity)


def _some(rows: Rows, numbers: np.ndarray) -> np.ndarray:
    """All of a part, or as many of a large one as are compared, chosen by content."""
    if len(numbers) <= CERTIFIED:
        return numbers
    keys = rows.prompts
    return np.array(sorted(numbers, key=lambda at: digest(bytes(keys[at]).hex()))[:CERTIFIED])


def _histogram(values: Sequence[float]) -> list[list[float]]:
    """[[from, to, samples], ...]: below LEAST (not told apart), then in steps of a twentieth."""
    edges = [0.0, *np.round(np.arange(LEAST, 1.0001, 0.05), 2)]
    counts, _ = np.histogram(values, edges)
    return [[float(a), float(b), int(n)] for a, b, n in zip(edges, edges[1:], counts, strict=False)]


def _nearest(rows: Rows, found: Certificate, part_of: dict[int, str], similarity: float) -> list[dict[str, Any]]:
    pairs = zip(found.held_out, found.nearest, strict=True)
    told = sorted(((at, one, value) for at, (one, value) in pairs if one >= 0), key=lambda pair: -pair[2])
    return [
        {
            "part": part_of[at],
            "where": str(rows.origin(at)),
            "text": excerpt(rows.prompt(at)),
            "training": str(rows.origin(one)),
            "training_text": excerpt(rows.prompt(one)),
            "likeness": round(value, 3),
            "removed": value >= similarity,
        }
        for at, one, value in told[:PAIRS]
    ]
