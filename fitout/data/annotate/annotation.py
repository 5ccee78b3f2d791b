"""What one person said of one task, in the same words for every tool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Span:
    """A marked piece of a text: characters `start` to `end` (Python's count), what stands there, its labels."""

    start: int
    end: int
    text: str
    labels: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        label: Any = self.labels[0] if len(self.labels) == 1 else list(self.labels)
        return {"text": self.text, "label": label}


@dataclass(frozen=True)
class Relation:
    """A relation between two spans, given by what stands there."""

    head: str
    tail: str
    kind: str

    def as_dict(self) -> dict[str, Any]:
        return {"from": self.head, "to": self.tail, "type": self.kind}


@dataclass(frozen=True)
class Annotation:
    """One annotator's work on one task.

    texts      written answers, by the name of the field they were written in; several are several answers
    labels     chosen labels by field; a label of a tree is its path, "logical reasoning / common sense"
    spans      marked pieces of the text, `spanned` even where there are none ("no entity" is an answer)
    ratings    stars or numbers by field
    messages   turns that were written in a chat
    order      a ranking: keys of the candidates, the best first; for a choice between two, two
    review     "accepted" or "rejected" by a reviewer, "" when nobody looked; `truth`: marked as ground truth
    seconds    the time it took; `created` when it was made (ISO 8601)
    """

    annotator: str
    texts: dict[str, list[str]] = field(default_factory=dict)
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    spanned: bool = False
    relations: tuple[Relation, ...] = ()
    ratings: dict[str, float] = field(default_factory=dict)
    messages: tuple[dict[str, Any], ...] = ()
    order: tuple[str, ...] = ()
    review: str = ""
    truth: bool = False
    seconds: float | None = None
    created: str = ""

    @property
    def rating(self) -> float | None:
        """The mean of its ratings; None when it has none."""
        return sum(self.ratings.values()) / len(self.ratings) if self.ratings else None

    def content(self) -> tuple:
        """What was said, without who and when: equal for annotations that agree in everything."""
        texts = tuple(
            sorted((name, tuple(" ".join(text.split()) for text in said)) for name, said in self.texts.items())
        )
        labels = tuple(sorted((name, tuple(sorted(chosen))) for name, chosen in self.labels.items()))
        return texts, labels, self.spans, self.relations, repr(self.messages), self.order
