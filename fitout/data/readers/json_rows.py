"""JSON in every form rows come in: lines, a list, {"data": [...]}, objects one after another. All are streamed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ...errors import DataError
from .opening import TextFile, lines
from .rows import BOM, MAX_ROW, RawRow, Rows, as_row, bad, too_long
from .strict import StrictJSON, too_heavy

BLANK = re.compile(r"[ \t\r\n\ufeff]*")
STRETCH = 1 << 16  # characters read at a time
#: An object alone in a file that is longer than this is not one row but a map of rows, and is given in pieces.
PIECE = 4 << 20


def json_rows(file: TextFile) -> Rows:
    """The rows of a JSON file; which form it has is told by content, not by name."""
    with file.open() as text:
        filled = ((line, cut) for line, cut in lines(text) if cut or not BLANK.fullmatch(line))
        first, cut = next(filled, ("", 0))
        if not first:
            return
        alone = next(filled, None) is None
    if not alone and (is_object(first) or (cut and first.lstrip(BOM).startswith("{"))):
        yield from json_lines(file)
        return
    # A list, one object over several lines, or JSON lines whose first line is broken. What comes first can tell.
    documents = json_documents(file)
    try:
        head = next(documents, None)
    except DataError:
        if not has_object_line(file):
            raise
        yield from json_lines(file)
        return
    if head is not None:
        yield from chain([head], documents)


def is_object(line: str) -> bool:
    """Whether a line by itself is a JSON object that starts at the line's beginning."""
    line = line.lstrip(BOM).rstrip(" \t\r\n" + BOM)
    if not line.startswith("{") or too_heavy(line):
        return False
    try:
        return StrictJSON().decode(line)[1] == len(line)
    except json.JSONDecodeError:
        return False


def has_object_line(file: TextFile) -> bool:
    with file.open() as text:
        return any(not cut and is_object(line) for line, cut in lines(text))


def json_lines(file: TextFile) -> Rows:
    """One object a line; lines end at \\n only, blank ones are passed over."""
    strict = StrictJSON()
    with file.open() as text:
        for number, (line, cut) in enumerate(lines(text), 1):
            line = line.strip(" \t\r\n" + BOM)
            if cut:
                yield bad(file.at(number), too_long(len(line) + cut), line, cut)
                continue
            if not line:
                continue
            if heavy := too_heavy(line):
                yield bad(file.at(number), heavy, line)
                continue
            try:
                value, end, fault = strict.decode(line)
                if end < len(line):
                    fault = f"not one JSON value: more text from column {BLANK.match(line, end).end() + 1}"  # type: ignore[union-attr]
            except json.JSONDecodeError as error:
                value, fault = None, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            yield as_row(value, fault, file.at(number), line)


# --- documents ---------------------------------------------------------------------------------------------------


def json_documents(file: TextFile) -> Rows:
    """The objects of a list, of {"data": [...]}, of a large map, or of several values one after another.

    Rows carry the line on which they begin.
    """
    with file.open(newline="") as text:
        window = Window(file, text)
        while opening := window.peek():
            if opening == "[":
                for line, raw, value, fault in window.elements():
                    yield as_row(value, fault, file.at(line), raw)
            elif opening == "{":
                yield from top_object(window)
            else:
                line, raw, value, fault = window.value()
                yield as_row(value, fault, file.at(line), raw)


def top_object(window: Window) -> Rows:
    """An object that stands by itself: a row; or {"data": [...]}, whose list are the rows; or, when it is too large for
    a row, the pieces of a map {id: {...}, ...}, each a smaller map."""
    file = window.file
    try:
        line, raw, value, fault = window.value(PIECE, keep=True)
    except TooLong:
        yield from pieces(window)
        return
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        yield from pieces(window)
        return
    window.at += len(raw)
    yield as_row(value, fault, file.at(line), raw)


def pieces(window: Window) -> Rows:
    """The object at the window, member by member: the elements of its `data` list, or maps of consecutive members.

    A piece's origin has the number of the members before it as its part, so that a format can go on counting.
    """
    file = window.file
    piece: dict[str, Any] = {}
    size = part = 0
    first = window.line_at(window.at)
    listed = scalar = False
    for key, line in window.members():
        opening = window.peek()
        if key == "data" and opening == "[" and not part:
            listed = True
            for at, raw, value, fault in window.elements():
                yield as_row(value, fault, file.at(at), raw)
            continue
        _, raw, value, fault = window.value()
        if fault:
            raise DataError(
                fault,
                where=f"{file.name}:{line}",
                harm="The rows around it cannot be told apart.",
                hint="Put the rows into a plain list or JSON lines to quarantine just one.",
            )
        if listed:
            continue
        scalar = scalar or not isinstance(value, dict | list)
        if key in piece:
            raise window.broken(line, 1, f"the key {key[:100]!r} appears twice")
        piece[key] = value
        size += len(raw)
        if size >= PIECE and not scalar:
            yield RawRow(piece, file.at(first, part))
            part += len(piece)
            piece, size, first = {}, 0, line
    if scalar and not listed and (part or size >= PIECE):
        raise DataError(
            f"the file is one object of more than {PIECE >> 20} MB that is no list of rows",
            where=f"{file.name}:{first}",
            harm="It cannot be told what a row is.",
            hint="Write one object a line (.jsonl), or a list of objects.",
        )
    if piece and not listed:
        yield RawRow(piece, file.at(first, part))


class TooLong(Exception):
    """A value that is longer than was allowed for."""


Decoded = tuple[int, str, Any, str]  # line, text, value, fault


class Window:
    """A file's text, a stretch at a time: what was read is forgotten, what a value still needs is added."""

    def __init__(self, file: TextFile, source: io.TextIOWrapper):
        self.file = file
        self.text = ""
        self.at = 0  # the next character in `text`
        self._source = source
        self._ended = False
        self._strict = StrictJSON()
        self._line, self._column, self._counted = 1, 1, 0  # of the character at `_counted`

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]  # `*` always matches
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._grow():
                return ""

    def value(self, limit: int = MAX_ROW, keep: bool = False) -> Decoded:
        """Decodes the value at the window and moves behind it, unless it is to be kept.

        Raises DataError when it is not JSON or longer than MAX_ROW, TooLong when it is longer than a lower limit.
        """
        self.peek()
        while True:
            try:
                value, end, fault = self._strict.decode(self.text, self.at)
                if end < len(self.text) or self.text[end - 1] in '}]"' or not self._grow():
                    if end - self.at > limit:
                        raise TooLong if limit < MAX_ROW else self._too_large(too_long(len(self.text) - self.at))
                    break
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > limit:
                    if limit < MAX_ROW:
                        raise TooLong from None
                    raise self._too_large(too_long(len(self.text) - self.at)) from None
                if unfinished(error, len(self.text)) and (heavy := too_heavy(self.text[self.at :])):
                    raise self._too_large(heavy) from None
                if not (unfinished(error, len(self.text)) and self._grow()):
                    raise self._broken_at(error.pos, error.msg) from error
        line, raw = self.line_at(self.at), self.text[self.at : end]
        if not keep:
            self.at = end
        return line, raw, value, fault

    def elements(self) -> Iterator[Decoded]:
        """Each element of the list that opens at the window."""
        self.at += 1
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            following = self.peek()
            if following == "]":
                self.at += 1
                return
            if following != ",":
                raise self._broken_at(self.at, "expected a comma or the end of the list")
            self.at += 1
            if self.peek() == "]":
                raise self._broken_at(self.at, "a comma before the end of the list")

    def members(self) -> Iterator[tuple[str, int]]:
        """Key and line of each member of the object that opens at the window; the caller takes the value."""
        self.at += 1
        if self.peek() == "}":
            self.at += 1
            return
        while True:
            if self.peek() != '"':
                raise self._broken_at(self.at, "expected a key in double quotes")
            line, _, key, _ = self.value()
            if self.peek() != ":":
                raise self._broken_at(self.at, "expected a colon")
            self.at += 1
            yield key, line
            following = self.peek()
            self.at += 1
            if following == "}":
                return
            if following != ",":
                raise self._broken_at(self.at - 1, "expected a comma or the end of the object")

    def line_at(self, position: int) -> int:
        """The line of a position, which must not lie before the last one asked for."""
        self._count_to(position)
        return self._line

    def broken(self, line: int, column: int, problem: str, hint: str = "") -> DataError:
        return DataError(
            f"not JSON at line {line}, column {column}: {problem}",
            where=f"{self.file.name}:{line}",
            harm="The rows after it cannot be told apart.",
            hint=hint
            or "Mend that place; or write one object a line (.jsonl), where one broken line does not stop the rest.",
        )

    def _grow(self) -> bool:
        """Forgets what was read and adds as much again as is unread; False at the end of the file."""
        if self._ended:
            return False
        unread = len(self.text) - self.at
        more = self._source.read(max(STRETCH, unread))
        if not more:
            self._ended = True
            return False
        self._count_to(self.at)
        self.text = self.text[self.at :] + more
        self.at = self._counted = 0
        return True

    def _count_to(self, position: int) -> None:
        breaks = self.text.count("\n", self._counted, position)
        if breaks:
            self._line += breaks
            self._column = position - self.text.rfind("\n", self._counted, position)
        else:
            self._column += position - self._counted
        self._counted = position

    def _too_large(self, why: str) -> DataError:
        return DataError(
            why,
            where=f"{self.file.name}:{self.line_at(self.at)}",
            harm="It could fill the memory.",
            hint="Split it; in JSON lines (.jsonl) only that row would go to quarantine.",
        )

    def _broken_at(self, position: int, problem: str) -> DataError:
        head = self.text[:200].lstrip(" \t\r\n" + BOM).lower() if self._line == 1 else ""
        self._count_to(position)
        hint = ""
        if self._ended_at(position) or problem.startswith("Unterminated string"):
            problem = f"the file ends in the middle ({problem})"
            hint = "It may have been cut while downloading or writing: get it again."
        elif head.startswith(("<!doctype", "<html")):
            hint = "It is a web page, perhaps a failed download: get the file itself."
        elif head.startswith("version https://git-lfs"):
            hint = "It is a Git LFS pointer, not the data: run `git lfs pull`."
        return self.broken(self._line, self._column, problem, hint)

    def _ended_at(self, position: int) -> bool:
        return BLANK.fullmatch(self.text, position) is not None and not self._source.read(1)


def unfinished(error: json.JSONDecodeError, length: int) -> bool:
    """Whether more text could mend the error: it lies at the end of the text, or in a string that runs to it."""
    return error.msg.startswith("Unterminated string") or error.pos >= length - 16
