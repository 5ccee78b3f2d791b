"""Alpaca: instruction, input, output, with history and system; also several `instances` of one instruction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...chat.types import Message, Origin, Sample
from ..readers import json_kind
from .plug import Columns, Refused, Row, RowError, first_key, renamed, text
from .turns import conversation

ANSWERS = ("output", "response", "answer", "completion")


class Alpaca:
    """The user turn is the instruction, then a line break and the input where there is one."""

    name = "alpaca"
    keys = "instruction, [input], output (or response, answer, completion), [history], [system], or instances"
    fields: tuple[str, ...] = ("instruction", "input", "output", "history", "system", "tools", "instances")

    def matches(self, row: Row) -> bool:
        return "instruction" in row and ("instances" in row or first_key(row, ANSWERS) is not None)

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        row = renamed(row, columns)
        if "instruction" not in row:
            raise RowError("no `instruction`")
        if isinstance(row.get("instances"), list):
            return nested(row, origin)
        return [single(row, origin)]


def single(row: Row, origin: Origin) -> Sample:
    answer = first_key(row, ANSWERS)
    if answer is None:
        raise RowError("no `output`")
    asked = "\n".join(part for part in (text(row, "instruction"), text(row, "input")) if part)
    messages = [*history(row.get("history")), Message("user", asked), Message("assistant", text(row, answer))]
    return conversation(messages, row, origin, ("instruction", "input", "history", answer))


def nested(row: Row, origin: Origin) -> list[Sample | Refused]:
    """One sample an instance, numbered from 1 as parts of the row."""
    shared = {key: value for key, value in row.items() if key != "instances"}
    samples: list[Sample | Refused] = []
    for number, instance in enumerate(row["instances"], 1):
        here = Origin(origin.file, origin.line, number)
        try:
            if not isinstance(instance, dict):
                raise RowError(f"an instance is {json_kind(instance)}, not an object")
            samples.append(single({**shared, **instance}, here))
        except RowError as error:
            samples.append(Refused(here, error.reason, instance))
    if not samples:
        raise RowError("`instances` is empty")
    return samples


def history(value: Any) -> list[Message]:
    """Earlier turns, a list of [user, assistant] pairs."""
    if not value:
        return []
    messages = []
    for pair in value if isinstance(value, list) else [value]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair)):
            raise RowError("`history` is not a list of [user, assistant] pairs of text")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages
