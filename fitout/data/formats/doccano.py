"""Doccano exports: JSONL, JSON and CSV of text classification, sequence labelling, sequence to sequence, intents and
slots, and its fastText form.

Marked pieces become a JSON list of {"text", "label"}; with relations {"entities", "relations"}; with intents beside
them {"intent", "entities"}. One label or one text is the answer as it stands.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from ...chat.types import Conversation, Message, Origin, Sample
from ..annotate.annotation import Relation, Span
from ..readers import json_kind
from .plug import Columns, Refused, Row, RowError, parsed, renamed, rest, text
from .turns import check_answered, check_order

LABELS = ("label", "labels")
WHICH = "say `format: doccano_labels` if all hold, `format: doccano_answers` if each is an answer"
IGNORED = ("Comments", "comments")


class Doccano:
    """`several` says what a list of more than one text is: labels that all hold, or answers that are each good. A row
    does not show which, so that the detected format refuses such rows, and one of the other two is to be named."""

    keys = "text, label: [[start, end, name]] or entities, [relations], [cats] (Doccano)"
    fields: tuple[str, ...] = ("text", "label", "entities", "relations", "cats")

    def __init__(self, name: str, several: Literal["labels", "answers"] | None = None):
        self.name = name
        self.several = several

    def matches(self, row: Row) -> bool:
        """Rows with marked pieces, several labels, or a file in place of the text; one label beside a text is taken by
        prompt_completion, which reads it alike."""
        labels = first_label(row)
        if self.several:
            return False  # the same rows; which of the three is meant has to be said
        if "filename" in row and "text" not in row:
            return labels is not None
        pieces = isinstance(labels, list) and any(isinstance(label, list) for label in labels)
        return "text" in row and (
            pieces
            or isinstance(row.get("entities"), list)
            or isinstance(row.get("cats"), list)
            or (isinstance(labels, list) and len(labels) != 1 and all(isinstance(label, str) for label in labels))
        )

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        row = renamed(row, columns)
        if "text" not in row:
            named = f" ({row['filename']})" if isinstance(row.get("filename"), str) else ""
            raise RowError(f"no `text`; labels of a picture or a recording{named} are not text to train on"[:200])
        asked = Message("user", text(row, "text"))
        meta = rest(row, ("text", *LABELS, "entities", "relations", "cats", *IGNORED))
        answers = self.answers(row, asked.content)
        found: list[Sample | Refused] = []
        for number, answer in enumerate(answers, 1):
            here = Origin(origin.file, origin.line, number) if len(answers) > 1 else origin
            messages = (asked, Message("assistant", answer))
            try:
                check_order(list(messages))
                check_answered(list(messages))
                found.append(Conversation(messages, here, (), dict(meta)))
            except RowError as error:
                if len(answers) == 1:
                    raise
                found.append(Refused(here, error.reason, answer))
        return found

    def answers(self, row: Row, whole: str) -> list[str]:
        entities = row.get("entities")
        labels = parsed_list(first_label(row))
        if entities is not None or row.get("cats") is not None:
            return [marked(read_entities(entities, whole), row)]
        if isinstance(labels, list) and any(isinstance(label, list) for label in labels):
            return [marked({str(n): read_piece(label, whole) for n, label in enumerate(labels)}, row)]
        if isinstance(labels, str):
            return [labels]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise RowError(f"`label` is {json_kind(labels)}, not a text, a list of texts or of pieces")
        if not labels:
            raise RowError("nobody has labelled it")
        if len(labels) == 1 or self.several == "answers":
            return labels
        if self.several == "labels":
            return [", ".join(labels)]
        raise RowError(f"{len(labels)} labels; {WHICH}")


def first_label(row: Row) -> Any:
    return next((row[key] for key in LABELS if row.get(key) is not None), None)


def parsed_list(value: Any) -> Any:
    """A list that stands in a CSV cell as JSON text."""
    return parsed(value, "`label`") if isinstance(value, str) and value.startswith("[[") else value


def read_piece(piece: Any, whole: str) -> Span:
    """[start, end, label] as a marked piece of the text, which must lie in it. Raises RowError."""
    if not isinstance(piece, list) or len(piece) != 3:
        raise RowError(f"a label is {json_kind(piece)}, not [start, end, name]")
    start, end, label = piece
    return span(start, end, label, whole)


def span(start: Any, end: Any, label: Any, whole: str) -> Span:
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(label, str)):
        raise RowError("a label without start, end and name")
    if not 0 <= start < end <= len(whole):
        raise RowError(f"the label {label[:40]!r} is at {start}-{end} of a text of {len(whole)} characters")
    return Span(start, end, whole[start:end], (label,))


def read_entities(value: Any, whole: str) -> dict[str, Span]:
    """Marked pieces by their ids. Raises RowError."""
    if value is None:
        return {}
    if not isinstance(value, list):
        raise RowError(f"`entities` is {json_kind(value)}, not a list")
    found = {}
    for number, one in enumerate(value):
        if isinstance(one, dict):
            found[str(one.get("id", number))] = span(
                one.get("start_offset"), one.get("end_offset"), one.get("label"), whole
            )
        else:
            found[str(number)] = read_piece(one, whole)
    return found


def marked(spans: dict[str, Span], row: Row) -> str:
    ordered = sorted(spans.values(), key=lambda one: (one.start, one.end))
    entities = [one.as_dict() for one in ordered]
    intents, relations = row.get("cats"), read_relations(row.get("relations"), spans)
    if intents is None and not relations:
        return json.dumps(entities, ensure_ascii=False)
    answer: dict[str, Any] = {}
    if intents is not None:
        if not isinstance(intents, list) or not all(isinstance(one, str) for one in intents):
            raise RowError(f"`cats` is {json_kind(intents)}, not a list of texts")
        answer["intent"] = intents[0] if len(intents) == 1 else intents
    answer["entities"] = entities
    if relations:
        answer["relations"] = [relation.as_dict() for relation in relations]
    return json.dumps(answer, ensure_ascii=False)


def read_relations(value: Any, spans: dict[str, Span]) -> list[Relation]:
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise RowError(f"`relations` is {json_kind(value)}, not a list of objects")
    found = []
    for one in value:
        head, tail = spans.get(str(one.get("from_id"))), spans.get(str(one.get("to_id")))
        if head is None or tail is None or not isinstance(one.get("type"), str):
            raise RowError("a relation between pieces that are not marked, or without a type")
        found.append(Relation(head.text, tail.text, one["type"]))
    return found


class FastText:
    """`__label__NAME text`, a line each, as fastText reads it; the whole file is one row."""

    name = "fasttext"
    keys = "text of lines `__label__NAME text`"
    fields: tuple[str, ...] = ("text",)

    def matches(self, row: Row) -> bool:
        return isinstance(row.get("text"), str) and row["text"].lstrip().startswith("__label__")

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        found: list[Sample | Refused] = []
        for number, line in enumerate(text(renamed(row, columns), "text").split("\n")):
            if not line.strip():
                continue
            here = Origin(origin.file, origin.line + number, origin.part)
            words = line.split()
            labels = [word.removeprefix("__label__") for word in words if word.startswith("__label__")]
            said = " ".join(word for word in words if not word.startswith("__label__"))
            if not labels or not all(labels) or not said:
                found.append(Refused(here, "not `__label__NAME text`", line))
            else:
                messages = (Message("user", said), Message("assistant", ", ".join(labels)))
                found.append(Conversation(messages, here))
        if not found:
            raise RowError("the text is empty")
        return found
