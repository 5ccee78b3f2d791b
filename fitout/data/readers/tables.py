"""CSV, Parquet and plain text."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from ...chat.types import Origin
from ...errors import DataError
from .opening import TextFile, lines
from .rows import MAX_ROW, RawRow, Rows, bad, plain, too_long

COLUMNS = 10_000  # of a table at most
BATCH = 64  # Parquet rows decoded at a time
DECODED = 64 << 20  # bytes that decoding a batch should not exceed
EXPANDED_FREE = 1 << 30  # decoded, a Parquet file may be this many bytes whatever its size; beyond them
EXPANDED_TIMES = 1000  # this many times its size (a dictionary holds a text once for any number of rows)


def csv_rows(file: TextFile) -> Rows:
    """One object a record, its fields named by the header. Records carry the line on which they begin."""
    csv.field_size_limit(MAX_ROW)  # process-wide; the default of 128 KiB is shorter than many documents
    taken: list[str] = []
    size = 0

    def counted(text: io.TextIOWrapper) -> Iterator[str]:
        nonlocal size
        for line, _ in lines(text):
            taken.append(line)
            size += len(line)
            if size >= MAX_ROW:
                raise csv.Error("field larger than field limit")
            yield line

    with file.open(newline="") as text:
        reader = csv.reader(counted(text), delimiter=delimiter(file), strict=True)
        header: list[str] | None = None
        while True:
            origin = file.at(reader.line_num + 1)
            taken.clear()
            size = 0
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "field limit" in str(error):
                    raise DataError(
                        too_long(size),
                        where=str(origin),
                        harm="A quotation mark that is never closed makes one cell of all that follows.",
                        hint='Close it; a mark inside a quoted cell is written twice ("").',
                    ) from error
                if "unexpected end of data" in str(error):
                    raise DataError(
                        "a quotation mark opens here and is never closed",
                        where=str(origin),
                        harm="Everything after it would be one cell.",
                        hint='Close it; a mark inside a quoted cell is written twice ("").',
                    ) from error
                yield bad(origin, f"not CSV: {error}", "".join(taken).rstrip("\r\n"))
                continue
            if not any(cells):
                continue
            if header is None:
                header = csv_header(cells, origin)
            elif len(cells) != len(header):
                reason = f"{len(cells)} cell{'s' * (len(cells) != 1)} where the header has {len(header)}"
                yield bad(origin, reason, "".join(taken).rstrip("\r\n"))
            else:
                yield RawRow(dict(zip(header, cells, strict=True)), origin)


def csv_header(cells: list[str], origin: Origin) -> list[str]:
    """Column names; a nameless column (pandas writes its index so) gets its number."""
    if len(cells) > COLUMNS:
        raise DataError(
            f"the header has {len(cells):,} columns, more than {COLUMNS:,}",
            where=str(origin),
            harm="That is not a table of rows.",
            hint="Check that the file is CSV.",
        )
    names = [cell.strip() or f"column_{number}" for number, cell in enumerate(cells, 1)]
    twice = repeated(names)
    if twice:
        raise DataError(
            f"the header names {', '.join(map(repr, twice))} twice",
            where=str(origin),
            harm="One of the columns would hide the other.",
            hint="Give every column its own name.",
        )
    return names


def repeated(names: list[str]) -> list[str]:
    seen: set[str] = set()
    twice = {name for name in names if name in seen or seen.add(name)}  # type: ignore[func-returns-value]
    return sorted(name[:100] for name in twice)[:10]


def delimiter(file: TextFile) -> str:
    """Of comma, tab, semicolon and bar the one that splits the first line most; comma (tab in .tsv) in doubt."""
    usual = "\t" if file.name.lower().removesuffix(".gz").endswith(".tsv") else ","
    with file.open(newline="") as text:
        header = next((line for line, _ in lines(text) if line.strip()), "")
    candidates = [usual, *(sign for sign in ",\t;|" if sign != usual)]
    return max(candidates, key=lambda sign: cells_by(header, sign))


def cells_by(header: str, sign: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=sign), []))
    except csv.Error:  # a cell beyond the limit, which reading will tell
        return 0


def parquet_rows(file: TextFile) -> Rows:
    """Rows of a Parquet file, decoded a batch at a time and numbered from 1."""
    import pyarrow
    import pyarrow.parquet

    with file.binary() as binary, tempfile.TemporaryFile() as unpacked:
        seekable: BinaryIO = binary
        if not isinstance(getattr(binary, "raw", None), io.FileIO):  # Parquet is read from its end, gzip from its start
            while block := binary.read(1 << 20):
                unpacked.write(block)
            seekable = unpacked  # type: ignore[assignment]
        size = seekable.seek(0, io.SEEK_END)
        seekable.seek(0)
        try:
            parquet = pyarrow.parquet.ParquetFile(seekable)
            twice = repeated(parquet.schema_arrow.names)
            if twice:
                raise DataError(
                    f"the columns {', '.join(twice)} appear twice", where=file.name, hint="Rename one of them."
                )
            number, decoded = 0, 0
            for batch in _batches(parquet):
                decoded += batch.nbytes
                if decoded > max(EXPANDED_FREE, EXPANDED_TIMES * size):
                    raise DataError(
                        f"it decodes to more than {EXPANDED_TIMES:,} times its size, as a bomb does",
                        where=f"{file.name}:{number}",
                        harm="It would never end.",
                        hint="If you trust it, write its rows as JSON lines.",
                    )
                for row in parquet_batch(batch):
                    number += 1
                    if isinstance(row, dict):
                        yield RawRow(row, file.at(number))
                    else:
                        yield bad(file.at(number), f"cannot be decoded: {row}", "")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise DataError(
                f"not a Parquet file that can be read: {str(error).splitlines()[0] if str(error) else error!r}",
                where=file.name,
                harm="Its rows would be missing.",
                hint="Check that it was written or downloaded to the end.",
            ) from error


def _batches(parquet: Any) -> Iterator[Any]:
    """The record batches of a file, a row group at a time.

    A damaged description of a column ends the process where it is asked for (pyarrow 26 lets a C++ exception go), and
    is an error where the column is read: so a row of each group is read before it is asked about.
    """
    for group in range(parquet.metadata.num_row_groups):
        how: dict[str, Any] = {"row_groups": [group], "use_threads": False}
        if next(parquet.iter_batches(batch_size=1, **how), None) is not None:
            yield from parquet.iter_batches(batch_size=rows_at_a_time(parquet.metadata.row_group(group)), **how)


def rows_at_a_time(group: Any) -> int:
    """BATCH, or fewer where a dictionary could make many large values of one.

    A value in a dictionary page is repeated by a few bits a row, so that no figure of the file bounds a batch except
    the size of that page: packed at least, and where a column packs a hundred times, nothing is known of it.
    """
    at_once = BATCH
    for column in range(group.num_columns):
        chunk = group.column(column)
        packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
        if unpacked > 1 << 20 and unpacked > 100 * packed:
            return 1
        if chunk.has_dictionary_page:
            page = chunk.data_page_offset - chunk.dictionary_page_offset
            at_once = max(1, min(at_once, DECODED // max(1, page)))
    return at_once


def parquet_batch(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a batch as plain values; an Exception in place of each that has none, such as broken UTF-8."""
    if batch.nbytes <= MAX_ROW:
        try:
            yield from [plain(row) for row in batch.to_pylist()]
            return
        except (ValueError, OverflowError):
            pass
    for index in range(batch.num_rows):
        one = batch.slice(index, 1)
        try:
            yield plain(one.to_pylist()[0]) if one.nbytes <= MAX_ROW else ValueError(too_long(one.nbytes))
        except (ValueError, OverflowError) as error:
            yield error


def text_rows(file: TextFile) -> Rows:
    """The whole file as one row with the field `text`; a very long one as several, cut at line ends."""
    with file.open(newline="") as text:
        line, rest = 1, ""
        while True:
            more = text.read(MAX_ROW - len(rest))
            content = rest + more
            cut = content.rfind("\n") + 1 if more and len(content) == MAX_ROW else 0
            rest = content[cut:] if cut else ""
            content = content[:cut] if cut else content
            if content.strip():
                yield RawRow({"text": content}, file.at(line))
            line += content.count("\n")
            if not more:
                return
