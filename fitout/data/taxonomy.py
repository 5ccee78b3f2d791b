"""What each sample is an exercise in: task and sub-task, from a column, from rules, or suggested by a classifier."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from ..chat.types import Sample
from . import TaskSettings
from .shingles import shingles

Label = tuple[str, ...]
NONE: Label = ("(none)",)
SLASH = re.compile(r"\s*/\s*")
BUCKETS = 1 << 15
SURE = 0.9  # the probability from which a suggestion is taken
LONGEST = 80  # characters of a level's name


class Tasks:
    """Reads a sample's task. `labels` are those seen, in order; `number` gives each its place there."""

    def __init__(self, settings: TaskSettings):
        self.settings = settings
        self.labels: list[Label] = []
        self._number: dict[Label, int] = {}
        self.came_from: Counter[str] = Counter()  # column, rule, suggestion, nothing
        self._rules = [
            (
                parsed(rule.task),
                [text.casefold() for text in rule.contains],
                re.compile(rule.matches) if rule.matches is not None else None,
            )
            for rule in settings.rules
        ]

    def number(self, label: Label) -> int:
        if label not in self._number:
            self._number[label] = len(self.labels)
            self.labels.append(label)
        return self._number[label]

    def read(self, sample: Sample, prompt: str) -> Label:
        """The task of a sample, NONE where neither column nor rule says."""
        label = self._from_field(sample)
        if label:
            self.came_from["column"] += 1
            return label
        folded = prompt.casefold() if self._rules else ""
        for rule, contains, matches in self._rules:
            if any(text in folded for text in contains) or (matches is not None and matches.search(prompt)):
                self.came_from["rule"] += 1
                return rule
        self.came_from["nothing"] += 1
        return NONE

    def _from_field(self, sample: Sample) -> Label:
        field = self.settings.field
        if field is None:
            return ()
        if field == "file":
            task, _, rest = PurePath(sample.origin.file).name.partition(".")[0].partition("_")
            return parsed(f"{task} / {rest}" if rest else task)
        if isinstance(field, str):
            return parsed(look_up(sample.meta, field))
        above, below = (parsed(look_up(sample.meta, name)) for name in field)
        return (*above[:1], *below[:1])


def look_up(meta: dict[str, Any], field: str) -> Any:
    """A column of a row by its name, also one inside another: `labels.task`."""
    if field in meta:
        return meta[field]
    found: Any = meta
    for name in field.split("."):
        found = found.get(name) if isinstance(found, dict) else None
    return found


def parsed(value: Any) -> Label:
    """A task of at most two levels from `a / b`, a choice, a list of choices, or what annotation tools make of those
    ({"choices": [...]}, {"taxonomy": [["a", "b"]]}); () for what says nothing."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("taxonomy", "choices", "value", "labels") if value.get(key)), None)
        return parsed(value)
    if isinstance(value, list):
        while value and isinstance(value[0], list):
            value = value[0]
        if value and isinstance(value[0], dict):
            return parsed(value[0])
        levels = [one for one in value if isinstance(one, str)]
        return parsed(" / ".join(levels[:2]) if levels else None)
    if isinstance(value, bool) or value is None:
        return ()
    if isinstance(value, int | float):
        value = f"{value:g}"
    if not isinstance(value, str):
        return ()
    levels = [level.strip()[:LONGEST] for level in SLASH.split(value.strip(), maxsplit=1) if level.strip()]
    return tuple(levels)


def named(label: Label) -> str:
    return " / ".join(label)


def of_label(values: dict[str, Any], label: Label) -> Any:
    """What a recipe says of a label (`task / sub-task`) or else of its task; None for neither."""
    return values.get(named(label), values.get(label[0]))


class Classifier:
    """Multinomial naive Bayes over hashed character sequences (Manning, Raghavan, Schütze, section 13.2). `accuracy`
    and `coverage` say how far to trust it, by labelled samples that it was not shown."""

    def __init__(self, labels: Sequence[int], texts: Callable[[int], str], count: int, classes: int):
        known = [at for at in range(count) if labels[at] >= 0]
        self.classes = classes
        self.accuracy, self.coverage = self._tried(known, labels, texts)
        self._fit(known, labels, texts)

    def _fit(self, numbers: Sequence[int], labels: Sequence[int], texts: Callable[[int], str]) -> None:
        counts = np.full((self.classes, BUCKETS), 0.1)
        size = np.zeros(self.classes)
        for at in numbers:
            counts[labels[at], np.unique(_buckets(texts(at)))] += 1
            size[labels[at]] += 1
        with np.errstate(divide="ignore"):
            self._prior = np.log(size / max(1.0, size.sum()))
        self._log = np.log(counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)

    def _tried(self, known: list[int], labels: Sequence[int], texts: Callable[[int], str]) -> tuple[float, float]:
        """Trained on four fifths of the labelled samples, over the rest: how many of the answers it is sure of are
        right, and of how many samples it is sure."""
        held_out = known[::5]
        self._fit([at for place, at in enumerate(known) if place % 5], labels, texts)
        answers = [(self.suggest(texts(at)), labels[at]) for at in held_out]
        sure = [(said, right) for said, right in answers if said is not None]
        right = sum(said == right for said, right in sure)
        return right / len(sure) if sure else 0.0, len(sure) / max(1, len(answers))

    def suggest(self, text: str) -> int | None:
        """The class, None when it is not sure. Likelihoods are tempered by the text's length: character sequences
        overlap, and counting each as a witness of its own would make every answer sure."""
        buckets = np.unique(_buckets(text))
        if not len(buckets):
            return None
        score = self._log[:, buckets].sum(axis=1) / max(1.0, len(buckets) ** 0.5) + self._prior
        best = int(np.argmax(score))
        with np.errstate(under="ignore"):
            probability = 1.0 / float(np.exp(score - score[best]).sum())
        return best if probability >= SURE else None


def _buckets(text: str) -> np.ndarray:
    return (shingles([text])[0] % np.uint64(BUCKETS)).astype(np.int64)
