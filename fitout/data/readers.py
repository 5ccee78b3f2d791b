"""From the bytes of one file to rows, each with the line it began on. JSON lines, CSV and Parquet are streamed.

A row that cannot be read is a `BadRow` and the reading goes on; a file that cannot be read as a whole is a DataError.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import gzip
import io
import json
import math
import re
import tempfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..chat.types import Origin
from ..errors import DataError

MAX_DEPTH = 100  # levels of lists and objects in a row; what comes after (templates, reports) recurses too
MAX_DIGITS = 300  # of an integer; Python itself refuses to print more than 4,300
BATCH = 1024  # Parquet rows decoded at a time
BOM = "\ufeff"


@dataclass(frozen=True)
class RawRow:
    """A row as the file has it."""

    row: dict[str, Any]
    origin: Origin


@dataclass(frozen=True)
class BadRow:
    """What could not be read as a row: why, and the text as it stands in the file."""

    origin: Origin
    reason: str
    raw: str


Rows = Generator[RawRow | BadRow, None, None]


@dataclass(frozen=True)
class TextFile:
    """A file to be read as text: where it is, the name to report it by, its encoding."""

    path: Path
    name: str
    encoding: str

    @contextmanager
    def open(self, newline: str = "\n") -> Iterator[io.TextIOWrapper]:
        # utf-8-sig is utf-8 that skips a byte order mark where there is one.
        encoding = "utf-8-sig" if self._is_utf8() else self.encoding
        with open_binary(self.path) as binary, io.TextIOWrapper(binary, encoding=encoding, newline=newline) as text:
            yield text

    def read(self) -> str:
        with self.open(newline="") as file:
            return file.read()

    def at(self, line: int) -> Origin:
        return Origin(self.name, line)

    def _is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name == "utf-8"


def read_file(path: Path, name: str, encoding: str) -> Rows:
    """The rows of one file by its extension. Raises DataError when it holds none, or cannot be read."""
    reader = READERS[extension(path)]
    empty = True
    with explained(path, name, encoding):
        for row in reader(TextFile(path, name, encoding)):
            empty = False
            yield row
    if empty:
        raise DataError(
            "the file holds no rows" if path.stat().st_size else "the file is empty",
            where=name,
            harm="A source that adds nothing is mostly a wrong path or a failed download.",
            hint="Check the file, or take the source out of `data.sources`.",
        )


def extension(path: Path) -> str:
    """The extension that says how to read a file: `.gz` is looked through, case does not matter."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


# --- opening -----------------------------------------------------------------------------------------------------


@contextmanager
def open_binary(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, unpacking gzip, which is known by its first two bytes and not by its name."""
    with open(path, "rb") as file:
        if file.peek(2)[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield unpacked  # type: ignore[misc]
        else:
            yield file


@contextmanager
def explained(path: Path, name: str, encoding: str) -> Iterator[None]:
    """Turns what decoding and the operating system raise into errors that name the place and the remedy."""
    try:
        yield
    except UnicodeError as error:
        raise wrong_encoding(path, name, encoding, error) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"the gzip file is damaged or cut short: {error}",
            where=name,
            harm="The rows after the damage would be missing without a word.",
            hint="Download or pack the file again.",
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror or error}", where=name, hint="Check its permissions."
        ) from error


def wrong_encoding(path: Path, name: str, encoding: str, error: UnicodeError) -> DataError:
    found = first_bad_byte(path, encoding)
    if found is None:  # a fault of the stream as a whole, such as UTF-16 without its mark
        message, line = f"the file is not {encoding}: {error}", 1
    else:
        offset, line, byte = found
        message = f"byte 0x{byte:02x} at offset {offset} is not {encoding}"
    guess = guess_encoding(path)
    if guess:
        hint = f"Name its encoding in the source, perhaps `encoding: {guess}`, or save the file as UTF-8."
    else:
        hint = "It looks like a binary file; name a text or Parquet file."
    return DataError(message, where=f"{name}:{line}", harm="Guessing would train on garbled text.", hint=hint)


def first_bad_byte(path: Path, encoding: str) -> tuple[int, int, int] | None:
    """(offset, line, byte) of the first byte that does not decode; None when every byte does."""
    decoder = codecs.getincrementaldecoder(encoding)()
    read = 0
    lines = 1
    with open_binary(path) as file:
        while True:
            block = file.read(1 << 16)
            try:
                lines += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                kept = len(error.object) - len(block)  # bytes the decoder held back from the block before
                before = error.object[: error.start]
                return read - kept + error.start, lines + before.count(b"\n"), error.object[error.start]
            except UnicodeError:
                return None
            read += len(block)
            if not block:
                return None


def guess_encoding(path: Path) -> str | None:
    """A guess to offer in a hint, never to act on; None for what looks binary."""
    with open_binary(path) as file:
        head = file.read(1 << 20)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in head:
        return None
    for encoding in ("utf-8", "gb18030"):
        try:
            codecs.getincrementaldecoder(encoding)().decode(head)
            return encoding
        except UnicodeError:
            pass
    return "cp1252"


# --- JSON --------------------------------------------------------------------------------------------------------


class StrictJSON:
    """A JSON decoder that notes what Python's would let pass: double keys, NaN, numbers out of range."""

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
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.faults.append(f"the key {twice!r} appears twice in one object")
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


SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
BLANK = re.compile(r"[ \t\r\n\ufeff]*")


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


def as_row(value: Any, fault: str, origin: Origin, raw: str) -> RawRow | BadRow:
    if fault:
        return BadRow(origin, fault, raw)
    if not isinstance(value, dict):
        return BadRow(origin, f"a row must be an object with named fields, this is {json_kind(value)}", raw)
    return RawRow(value, origin)


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


def json_rows(file: TextFile) -> Rows:
    """JSON lines, a list of objects, {"data": [...]}, or objects one after another: told by content, not by name."""
    with file.open() as text:
        filled = (line for line in text if not BLANK.fullmatch(line))
        first = next(filled, None)
        if first is None:
            return
        alone = next(filled, None) is None
    if is_object(first) and not alone:
        yield from json_lines(file)
        return
    content = file.read()
    start = BLANK.match(content).end()  # type: ignore[union-attr]  # a pattern of `*` always matches
    if content.startswith("[", start):
        yield from json_documents(file, content)
        return
    # Either one object over several lines, or JSON lines whose first line is broken. Only the whole can tell.
    try:
        rows = list(json_documents(file, content))
    except DataError:
        if not any(is_object(line) for line in content.split("\n")):
            raise
        rows = list(json_lines(file))
    yield from rows


def is_object(line: str) -> bool:
    """Whether a line by itself is a JSON object that starts at the line's beginning."""
    if not line.lstrip(BOM).startswith("{"):
        return False
    try:
        json.loads(line.lstrip(BOM), parse_int=str)
    except (ValueError, RecursionError):
        return False
    return True


def json_lines(file: TextFile) -> Rows:
    """One object a line; lines end at \\n only, blank ones are passed over."""
    strict = StrictJSON()
    with file.open() as text:
        for number, line in enumerate(text, 1):
            line = line.strip(" \t\r\n" + BOM)
            if not line:
                continue
            try:
                value, end, fault = strict.decode(line)
                if end < len(line):
                    fault = f"not one JSON value: more text from column {after_blank(line, end) + 1}"
            except json.JSONDecodeError as error:
                value, fault = None, f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            yield as_row(value, fault, file.at(number), line)


def json_documents(file: TextFile, content: str) -> Rows:
    """The objects of a list, of {"data": [...]}, or of several values one after another.

    Rows carry the line on which they begin; within {"data": [...]} the number of the element.
    """
    strict = StrictJSON()
    line, counted = 1, 0

    def line_at(position: int) -> int:
        nonlocal line, counted
        line += content.count("\n", counted, position)
        counted = position
        return line

    position = after_blank(content, 0)
    while position < len(content):
        if content[position] == "[":
            for start, end, value, fault in list_elements(file, strict, content, position):
                if value is not LIST_END:
                    yield as_row(value, fault, file.at(line_at(start)), content[start:end])
                position = end
        else:
            start = position
            value, position, fault = decode_in(file, strict, content, start)
            inner = value.get("data") if isinstance(value, dict) else None
            if isinstance(inner, list):
                if fault:
                    raise DataError(
                        fault,
                        where=file.name,
                        hint="Put the rows into a plain list or JSON lines to quarantine just one.",
                    )
                for number, element in enumerate(inner, 1):
                    yield as_row(element, "", file.at(number), json.dumps(element, ensure_ascii=False))
            else:
                yield as_row(value, fault, file.at(line_at(start)), content[start:position])
        position = after_blank(content, position)


LIST_END = object()


def list_elements(
    file: TextFile, strict: StrictJSON, content: str, position: int
) -> Iterator[tuple[int, int, Any, str]]:
    """(start, end, value, fault) of each element of the list that opens at `position`, and of its end."""
    position = after_blank(content, position + 1)
    if content.startswith("]", position):
        yield position, position + 1, LIST_END, ""
        return
    while True:
        value, end, fault = decode_in(file, strict, content, position)
        yield position, end, value, fault
        position = after_blank(content, end)
        if content.startswith("]", position):
            yield position, position + 1, LIST_END, ""
            return
        if not content.startswith(",", position):
            raise broken_json(file, content, position, "expected a comma or the end of the list")
        position = after_blank(content, position + 1)
        if content.startswith("]", position):
            raise broken_json(file, content, position, "a comma before the end of the list")


def decode_in(file: TextFile, strict: StrictJSON, content: str, position: int) -> tuple[Any, int, str]:
    try:
        return strict.decode(content, position)
    except json.JSONDecodeError as error:
        raise broken_json(file, content, error.pos, error.msg) from error


def broken_json(file: TextFile, content: str, position: int, problem: str) -> DataError:
    line = content.count("\n", 0, position) + 1
    column = position - content.rfind("\n", 0, position)
    head = content[:200].lstrip().lower()
    if position >= len(content.rstrip()) or problem.startswith("Unterminated string"):
        problem = f"the file ends in the middle ({problem})"
        hint = "It may have been cut while downloading or writing: get it again."
    elif head.startswith(("<!doctype", "<html")):
        hint = "It is a web page, perhaps a failed download: get the file itself."
    elif head.startswith("version https://git-lfs"):
        hint = "It is a Git LFS pointer, not the data: run `git lfs pull`."
    else:
        hint = "Mend that place; or write one object a line (.jsonl), where one broken line does not stop the rest."
    return DataError(
        f"not JSON at line {line}, column {column}: {problem}",
        where=f"{file.name}:{line}",
        harm="The rows after it cannot be told apart.",
        hint=hint,
    )


def after_blank(text: str, position: int) -> int:
    return BLANK.match(text, position).end()  # type: ignore[union-attr]  # a pattern of `*` always matches


# --- CSV, Parquet, plain text ------------------------------------------------------------------------------------


def csv_rows(file: TextFile) -> Rows:
    """One object a record, its fields named by the header. Records carry the line on which they begin."""
    csv.field_size_limit(2**31 - 1)  # process-wide; the default of 128 KiB is shorter than many documents
    taken: list[str] = []

    def lines(text: io.TextIOWrapper) -> Iterator[str]:
        for line in text:
            taken.append(line)
            yield line

    with file.open(newline="") as text:
        reader = csv.reader(lines(text), delimiter=delimiter(file), strict=True)
        header: list[str] | None = None
        while True:
            origin = file.at(reader.line_num + 1)
            taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "unexpected end of data" in str(error):
                    raise DataError(
                        "a quotation mark opens here and is never closed",
                        where=str(origin),
                        harm="Everything after it would be one cell.",
                        hint='Close it; a mark inside a quoted cell is written twice ("").',
                    ) from error
                yield BadRow(origin, f"not CSV: {error}", "".join(taken).rstrip("\r\n"))
                continue
            if not any(cells):
                continue
            if header is None:
                header = csv_header(cells, origin)
            elif len(cells) != len(header):
                reason = f"{len(cells)} cell{'s' * (len(cells) != 1)} where the header has {len(header)}"
                yield BadRow(origin, reason, "".join(taken).rstrip("\r\n"))
            else:
                yield RawRow(dict(zip(header, cells, strict=True)), origin)


def csv_header(cells: list[str], origin: Origin) -> list[str]:
    """Column names; a nameless column (pandas writes its index so) gets its number."""
    names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, 1)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"the header names {', '.join(map(repr, twice))} twice",
            where=str(origin),
            harm="One of the columns would hide the other.",
            hint="Give every column its own name.",
        )
    return names


def delimiter(file: TextFile) -> str:
    """Of comma, tab, semicolon and bar the one that splits the first line most; comma (tab in .tsv) in doubt."""
    usual = "\t" if extension(file.path) == ".tsv" else ","
    with file.open(newline="") as text:
        header = next((line for line in text if line.strip()), "")
    candidates = [usual, *(sign for sign in ",\t;|" if sign != usual)]
    return max(candidates, key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


def parquet_rows(file: TextFile) -> Rows:
    """Rows of a Parquet file, decoded a batch at a time and numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    with open_binary(file.path) as binary, tempfile.TemporaryFile() as unpacked:
        seekable: BinaryIO = binary
        if isinstance(binary, gzip.GzipFile):  # Parquet is read from its end, gzip only from its beginning
            while block := binary.read(1 << 20):
                unpacked.write(block)
            seekable = unpacked  # type: ignore[assignment]
        try:
            parquet = pyarrow.parquet.ParquetFile(seekable)
            names = parquet.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise DataError(
                    f"the columns {', '.join(twice)} appear twice", where=file.name, hint="Rename one of them."
                )
            number = 0
            for batch in parquet.iter_batches(batch_size=BATCH):
                for row in parquet_batch(batch):
                    number += 1
                    if isinstance(row, dict):
                        yield RawRow(row, file.at(number))
                    else:
                        yield BadRow(file.at(number), f"cannot be decoded: {row}", "")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"not a Parquet file that can be read: {str(error).splitlines()[0] if str(error) else error!r}",
                where=file.name,
                harm="Its rows would be missing.",
                hint="Check that it was written or downloaded to the end.",
            ) from error


def parquet_batch(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a batch as plain values; an Exception in place of each that has none, such as broken UTF-8."""
    try:
        yield from [plain(row) for row in batch.to_pylist()]
    except (ValueError, OverflowError):
        for index in range(batch.num_rows):
            try:
                yield plain(batch.slice(index, 1).to_pylist()[0])
            except (ValueError, OverflowError) as error:
                yield error


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


def text_rows(file: TextFile) -> Rows:
    """The whole file as one row with the field `text`."""
    content = file.read()
    if content.strip():
        yield RawRow({"text": content}, file.at(1))


READERS: dict[str, Callable[[TextFile], Rows]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".txt": text_rows,
}
