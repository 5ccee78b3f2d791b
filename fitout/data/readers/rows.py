"""What reading gives: rows and bad rows, values as JSON has them, and the limits of one row."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Generator
from dataclasses import dataclass
from sys import getsizeof
from typing import Any

from ...chat.types import Origin

MAX_DEPTH = 100  # levels of lists and objects in a row; what comes after (templates, reports) recurses too
MAX_DIGITS = 300  # of an integer; Python itself refuses to print more than 4,300
MAX_ROW = 16 << 20  # characters of one row: a shelf of novels
MAX_WEIGHT = 256 << 20  # bytes that one row may take as Python values
MAX_RAW = 1 << 20  # characters of a bad row that are kept to be shown
BOM = "\ufeff"


@dataclass(frozen=True)
class RawRow:
    """A row as the file has it."""

    row: dict[str, Any]
    origin: Origin


@dataclass(frozen=True)
class BadRow:
    """What could not be read as a row: why, and the text as it stands in the file (of a very long one, its head)."""

    origin: Origin
    reason: str
    raw: str


Rows = Generator[RawRow | BadRow, None, None]


def bad(origin: Origin, reason: str, raw: str, left_out: int = 0) -> BadRow:
    """A BadRow whose text is cut to MAX_RAW characters; `left_out` more were not even read."""
    left_out += max(0, len(raw) - MAX_RAW)
    return BadRow(origin, reason, raw[:MAX_RAW] + (f" ... ({left_out:,} characters more)" if left_out else ""))


def as_row(value: Any, fault: str, origin: Origin, raw: str) -> RawRow | BadRow:
    if fault:
        return bad(origin, fault, raw)
    if not isinstance(value, dict):
        return bad(origin, f"a row must be an object with named fields, this is {json_kind(value)}", raw)
    return RawRow(value, origin)


def too_long(length: int) -> str:
    return f"a row of {length:,} characters or more; the limit is {MAX_ROW:,}"


def json_kind(value: Any) -> str:
    """A value's kind in the words of JSON, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    kinds: dict[type, str] = {str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def weight(value: Any, limit: int) -> int:
    """Bytes that a row takes as Python values, counted no further than `limit`."""
    inside, total = [value], 0
    while inside and total < limit:
        one = inside.pop()
        total += getsizeof(one)
        if isinstance(one, dict):
            inside += one
            inside += one.values()
        elif isinstance(one, list):
            inside += one
    return total


def plain(value: Any) -> Any:
    """A value of Arrow or a hub library as JSON has them: dates and decimals as text, bytes as text, NaN as null."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")  # old writers store text as bytes
        except UnicodeDecodeError:
            return f"<{len(value)} bytes>"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal | datetime.timedelta):
        return str(value)
    return f"<{type(value).__name__}>"
