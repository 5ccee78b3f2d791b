"""How far annotators agree: kappa for labels, overlap for texts, and the rules that make one answer of several."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from .annotation import Annotation

Rule = Literal["majority", "best_rated", "reviewer"]
RULES: tuple[Rule, ...] = ("majority", "best_rated", "reviewer")

#: A word, or one character of a script without blanks between words.
TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+")


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two annotators on the same items beyond chance: (p_o - p_e) / (1 - p_e) (Cohen 1960).

    1 is agreement in everything, 0 what chance gives. NaN when chance alone would agree in everything: both used one
    and the same label throughout.
    """
    if len(first) != len(second) or not first:
        raise ValueError("kappa is of two lists of the same length, not empty")
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    by_first, by_second = Counter(first), Counter(second)
    expected = sum(by_first[label] * by_second[label] for label in by_first) / n**2
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


def fleiss_kappa(items: Sequence[Sequence[Hashable]]) -> float:
    """Agreement of many annotators, not necessarily the same ones on each item (Fleiss 1971).

    `items` are the labels that each item was given. Fleiss asks for as many on every item; where they differ, an item
    of n labels counts by its pairs, n(n-1)/2 of them, and the labels' shares by all labels given. Items of one label
    say nothing and are left out. NaN when there are none, or when all labels are the same.
    """
    counts = [Counter(labels) for labels in items if len(labels) > 1]
    pairs = sum(n * (n - 1) for n in map(Counter.total, counts))
    if not pairs:
        return math.nan
    agreeing = sum(count * (count - 1) for labels in counts for count in labels.values())
    shares = sum(counts, Counter())
    total = shares.total()
    expected = sum((count / total) ** 2 for count in shares.values())
    return (agreeing / pairs - expected) / (1 - expected) if expected < 1 else math.nan


def text_overlap(first: str, second: str) -> float:
    """F1 of the words two texts share (characters where a script has no blanks), 0 to 1; the same both ways round."""
    a, b = (Counter(TOKEN.findall(text.casefold())) for text in (first, second))
    if not a and not b:
        return float(first.split() == second.split())
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total())


@dataclass(frozen=True)
class Agreement:
    """The agreement of a project. `fields` are the label fields; `pairs` who agreed with whom.

    fleiss      kappa by label field
    cohen       kappa by (field, annotator, annotator), with the number of tasks both labelled
    overlap     mean overlap of two answers to the same task; None when no task has two
    tasks       tasks by how many annotators they have
    """

    fleiss: dict[str, float]
    cohen: dict[tuple[str, str, str], tuple[float, int]]
    overlap: float | None
    tasks: dict[int, int]

    def as_dict(self) -> dict:
        def figure(value: float | None) -> float | None:
            return None if value is None or math.isnan(value) else round(value, 4)

        return {
            "fleiss": {name: figure(kappa) for name, kappa in self.fleiss.items()},
            "cohen": [
                {"field": name, "annotators": [a, b], "kappa": figure(kappa), "tasks": n}
                for (name, a, b), (kappa, n) in self.cohen.items()
            ],
            "answer_overlap": figure(self.overlap),
            "annotators_per_task": {str(count): tasks for count, tasks in sorted(self.tasks.items())},
        }


def agreement(tasks: Sequence[Sequence[Annotation]]) -> Agreement:
    """The agreement over tasks, each given as its annotations. A person's latest word on a task counts."""
    tasks = [latest(annotations) for annotations in tasks]
    names = sorted({name for annotations in tasks for one in annotations for name in one.labels})
    people = sorted({one.annotator for annotations in tasks for one in annotations})
    fleiss, cohen = {}, {}
    for name in names:
        given = [
            {one.annotator: tuple(sorted(one.labels[name])) for one in task if name in one.labels} for task in tasks
        ]
        fleiss[name] = fleiss_kappa([list(labels.values()) for labels in given])
        for a, b in combinations(people, 2):
            both = [(labels[a], labels[b]) for labels in given if a in labels and b in labels]
            if both:
                cohen[name, a, b] = (cohen_kappa(*zip(*both, strict=True)), len(both))
    overlaps = [
        text_overlap(said(a), said(b)) for task in tasks for a, b in combinations(task, 2) if said(a) and said(b)
    ]
    return Agreement(
        fleiss,
        cohen,
        sum(overlaps) / len(overlaps) if overlaps else None,
        dict(Counter(len(task) for task in tasks)),
    )


def said(annotation: Annotation) -> str:
    """All that was written, as one text."""
    return "\n".join(text for texts in annotation.texts.values() for text in texts)


def latest(annotations: Sequence[Annotation]) -> list[Annotation]:
    """The last word of each annotator, in the order in which the annotators first spoke."""
    by_person: dict[str, Annotation] = {}
    for one in annotations:
        before = by_person.get(one.annotator)
        if before is None or one.created >= before.created:
            by_person[one.annotator] = one
    return list(by_person.values())


class Undecided(ValueError):
    """Why a rule makes no answer of what the annotators said."""


def decide(annotations: Sequence[Annotation], rule: Rule) -> Annotation:
    """One annotation of several, always one that was really made. Raises Undecided, with the reason.

    reviewer     the one that a reviewer accepted or that is marked as ground truth (of several the latest)
    best_rated   the one with the highest rating, when that is one alone
    majority     what more annotators said than anything else; labels by field, then the annotation that has these
                 labels and whose text is nearest to all others'. Rejected ones have no vote
    """
    if not annotations:
        raise Undecided("nobody has annotated it")
    if rule == "reviewer":
        accepted = [one for one in annotations if one.review == "accepted" or one.truth]
        if not accepted:
            raise Undecided("no reviewer has accepted an answer or marked one as ground truth")
        return max(accepted, key=lambda one: one.created)
    valid = latest([one for one in annotations if one.review != "rejected"])
    if not valid:
        raise Undecided("a reviewer has rejected every answer")
    if len(valid) == 1:
        return valid[0]
    if rule == "best_rated":
        rated = [one for one in valid if one.rating is not None]
        if not rated:
            raise Undecided(f"none of the {len(valid)} annotators gave a rating")
        best = max(one.rating or 0 for one in rated)
        top = [one for one in rated if one.rating == best]
        if len({one.content() for one in top}) > 1:
            raise Undecided(f"{len(top)} different answers share the best rating, {best:g}")
        return top[0]
    return majority(valid)


def majority(annotations: Sequence[Annotation]) -> Annotation:
    left = list(annotations)
    for name in dict.fromkeys(name for one in annotations for name in one.labels):
        votes = Counter(tuple(sorted(one.labels[name])) for one in annotations if name in one.labels)
        (label, most), *others = votes.most_common(2)
        if others and others[0][1] == most:
            tied = " and ".join(repr(", ".join(labels)) for labels, count in sorted(votes.items()) if count == most)
            raise Undecided(f"a tie in `{name}`: {tied}, {most} each")
        left = [one for one in left if tuple(sorted(one.labels.get(name, ()))) == label]
    if not left:
        raise Undecided("no annotator chose the majority's label in every field")
    votes_of = Counter(one.content() for one in left)
    (_, most), *others_ = votes_of.most_common(2)
    if not others_ or others_[0][1] < most:
        return next(one for one in left if votes_of[one.content()] == most)
    written = [one for one in left if said(one)]
    if len(written) < 3:
        raise Undecided(f"{len(left)} annotators gave {len(votes_of)} different answers and none has a majority")
    nearest = {id(one): sum(text_overlap(said(one), said(other)) for other in annotations) for one in written}
    return max(written, key=lambda one: nearest[id(one)])
