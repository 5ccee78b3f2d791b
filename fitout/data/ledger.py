"""What became of every sample, stage by stage: nothing may be lost without a count."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckError


@dataclass
class Stage:
    """One stage: what came, what it made (a row that holds several samples, a copy with the key passage moved), what it
    took out by a named rule, what it changed. `left` is counted where the samples leave, not worked out here."""

    name: str
    came: int
    left: int = 0
    made: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)  # by rule
    removed: Counter[str] = field(default_factory=Counter)  # by rule
    changed: Counter[str] = field(default_factory=Counter)  # by rule; a changed sample is a kept one
    seconds: float = 0.0

    def check(self) -> None:
        """Raises CheckError when what came and was made is not what left and was taken out."""
        out = self.left + self.quarantined.total() + self.removed.total()
        if self.came + self.made.total() != out:
            raise CheckError(
                f"{self.came + self.made.total()} samples came to the stage `{self.name}`, but {out} are accounted for",
                harm="Some were lost or counted twice.",
                hint="This is a fault of Fitout; please report it with the data report.",
            )

    def told(self) -> str:
        """The stage as one line that adds up; only the counts that there are."""
        parts = [f"{self.came:,}"]
        parts += [f"+ {n:,} {what}" for what, n in self.made.items() if n]
        for verb, counts in (("quarantined", self.quarantined), ("removed", self.removed)):
            if counts.total():
                parts.append(f"- {counts.total():,} {verb}")
        return f"{self.name:<12}" + " ".join(parts) + f" = {self.left:,}"


class Ledger:
    """The stages in order. Each begins with what the one before it left."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def begin(self, name: str, came: int | None = None) -> Stage:
        before = self.stages[-1].left if self.stages else 0
        self.stages.append(Stage(name, before if came is None else came))
        return self.stages[-1]

    def check(self) -> None:
        """Every stage adds up, and each begins with what the one before it left. Raises CheckError."""
        for stage in self.stages:
            stage.check()
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if before.left != after.came:
                raise CheckError(
                    f"the stage `{before.name}` left {before.left} samples, but {after.came} came to `{after.name}`",
                    harm="Some were lost or counted twice.",
                    hint="This is a fault of Fitout; please report it with the data report.",
                )

    def total(self, what: str) -> Counter[str]:
        """quarantined, removed, changed or made, summed over the stages."""
        summed: Counter[str] = Counter()
        for stage in self.stages:
            summed.update(getattr(stage, what))
        return summed

    @property
    def samples(self) -> int:
        """All there ever were: rows of the files, and what stages made of them."""
        return (self.stages[0].came if self.stages else 0) + self.total("made").total()

    def state(self) -> list[dict[str, Any]]:
        return [dict(vars(stage)) for stage in self.stages]

    def restore(self, stages: list[dict[str, Any]]) -> None:
        """As it was at `state`."""
        counted = ("made", "quarantined", "removed", "changed")
        self.stages = [Stage(**{**one, **{name: Counter(one[name]) for name in counted}}) for one in stages]

    def as_rows(self) -> list[dict[str, Any]]:
        return [
            {
                "name": stage.name,
                "came": stage.came,
                "made": dict(stage.made),
                "quarantined": dict(stage.quarantined),
                "removed": dict(stage.removed),
                "changed": dict(stage.changed),
                "left": stage.left,
                "told": stage.told(),
            }
            for stage in self.stages
        ]
