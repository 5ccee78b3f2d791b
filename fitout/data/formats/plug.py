"""What a row format is, and what all of them need: named columns, text fields, the columns that are left over."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...chat.types import Origin, Sample
from ..readers import StrictJSON, json_kind, too_heavy

Row = dict[str, Any]
Columns = dict[str, str]

#: Columns that hold pictures or sound. A row that uses one is not plain text and must not be trained as if it were.
MEDIA = ("images", "image", "videos", "video", "audios", "audio")

#: Columns of unpaired preference data (KTO): true for a good answer, false for a bad one.
MARKS = ("label", "kto_tag")


class RowError(ValueError):
    """Why one row is no sample; it goes to quarantine with this reason and the others go on."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Refused:
    """A part of a row that is no sample, beside parts that are: why, and the part as the row has it."""

    origin: Origin
    reason: str
    raw: Any


class Format(Protocol):
    """A form that rows come in.

    name     what `format:` in the recipe says
    keys     its columns in words, for messages
    fields   the names that `columns:` may map, all it reads
    matches  whether a row has this form (by its keys, not by whether its values are good)
    convert  the samples of a row; `columns` maps our field to the row's column. Raises RowError when the whole row is
             bad. A row of several samples gives each an origin with a `part`, and a Refused for each that is bad
    """

    name: str
    keys: str
    fields: tuple[str, ...]

    def matches(self, row: Row) -> bool: ...

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]: ...


def renamed(row: Row, columns: Columns | None) -> Row:
    """The row with our field names. Another column that already has one of these names steps aside."""
    if not columns:
        return row
    taken = set(columns.values())
    result = {}
    for key, value in row.items():
        if key not in taken:
            result[f"{key} (column)" if key in columns else key] = value
    for ours, theirs in columns.items():
        if theirs in row:
            result[ours] = row[theirs]
    return result


def text(row: Row, key: str) -> str:
    """The text of an optional field: "" when absent or null. Raises RowError for anything but text."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"`{key}` is {json_kind(value)}, not text")
    return value


def first_key(row: Row, keys: Iterable[str]) -> str | None:
    """The first of `keys` that the row has with a value; else the first that it has at all."""
    present = [key for key in keys if key in row]
    return next((key for key in present if row[key] is not None), present[0] if present else None)


def parsed(value: Any, what: str) -> Any:
    """A structured field that may come as JSON text, as in CSV. Raises RowError for broken text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    text = value.strip()
    if heavy := too_heavy(text):
        raise RowError(f"{what}: {heavy}")
    try:
        found, end, fault = StrictJSON().decode(text)
    except json.JSONDecodeError as error:
        raise RowError(f"{what} is text that is not JSON: {error.msg} at column {error.colno}") from None
    if end < len(text):
        raise RowError(f"{what} is text that is not JSON: more text from column {end + 1}")
    if fault:
        raise RowError(f"{what}: {fault}")
    return found


def rest(row: Row, used: Iterable[str]) -> dict[str, Any]:
    """The columns a format did not use, kept as the sample's `meta`.

    Raises RowError where leaving one unread would train the wrong thing: media, and answers marked as bad.
    """
    left = {key: value for key, value in row.items() if key not in set(used)}
    for key in MEDIA:
        if left.get(key):
            raise RowError(f"the row has `{key}`; training on more than text comes with vision-language support")
    for key in MARKS:
        if left.get(key) is False:
            raise RowError(f"the answer is marked as bad (`{key}`: false); training on it would teach it")
    return left
