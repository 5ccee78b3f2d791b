"""JSON that notes what Python's own decoder would let pass."""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

from .rows import MAX_DEPTH, MAX_DIGITS, MAX_WEIGHT

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LARGE = 1 << 20  # characters from which a text is weighed before it is decoded


class StrictJSON:
    """A JSON decoder that notes double keys, NaN, numbers out of range, deep nesting and halves of surrogate pairs."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_constant=self._constant,
            parse_float=self._float,
            parse_int=self._int,
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, str]:
        """The value at `start`, where it ends, and a reason to refuse it ("" when there is none).

        Raises json.JSONDecodeError for what is not JSON, also for what nests too deeply to be read at all.
        """
        self.faults.clear()
        try:
            value, end = self.decoder.raw_decode(text, start)
        except RecursionError:
            raise json.JSONDecodeError("nested too deeply", text, start) from None
        raw = text[start:end]
        if self.faults:
            return value, end, self.faults[0]
        if raw.count("[") + raw.count("{") > MAX_DEPTH and depth(value) > MAX_DEPTH:
            return value, end, f"nested more than {MAX_DEPTH} levels deep"
        if SURROGATE.search(raw) and has_half_pair(value):
            return value, end, "half of a surrogate pair (\\ud8.. without its partner), which no encoding can write"
        return value, end, ""

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            self.faults.append(f"the key {twice[:100]!r} appears twice in one object")
        return value

    def _constant(self, name: str) -> None:
        self.faults.append(f"{name} is not a JSON value; write null for what is missing")

    def _float(self, text: str) -> float:
        value = float(text)
        if math.isinf(value):
            self.faults.append(f"the number {text[:20]} is out of range")
        return value

    def _int(self, text: str) -> int:
        if len(text) > MAX_DIGITS:
            self.faults.append(f"an integer of {len(text)} digits")
            return 0
        return int(text)


def too_heavy(text: str) -> str:
    """Why a text must not be decoded: its values would fill the memory. "" when they would not."""
    if len(text) <= LARGE or (size := weight(text)) <= MAX_WEIGHT:
        return ""
    return f"{size >> 20} MB of small values in one row"


def weight(text: str) -> int:
    """About the most bytes that JSON text can take as Python values, with what decoding needs for a moment."""
    marks = 184 * text.count("{") + 64 * text.count("[") + 72 * text.count(":")
    return sys.getsizeof(text) + marks + 36 * text.count('"') + 40 * text.count(",")


def depth(value: Any) -> int:
    """How many lists and objects are nested in each other, without recursion."""
    deepest, todo = 0, [(value, 1)]
    while todo:
        value, level = todo.pop()
        if isinstance(value, dict | list):
            deepest = max(deepest, level)
            todo.extend((child, level + 1) for child in (value.values() if isinstance(value, dict) else value))
    return deepest


def has_half_pair(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
