"""From the bytes of one file to rows, each with the line it began on. All forms are streamed.

A row that cannot be read is a `BadRow` and the reading goes on; a file that cannot be read as a whole is a DataError.
Whatever a file holds, one row at a time is in memory, and of bounded size (`rows.MAX_ROW`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from ...errors import DataError
from .archive import Contents, contents, open_archive, shown
from .json_rows import json_rows
from .opening import Member, TextFile, explained
from .rows import BadRow, RawRow, Rows, json_kind, plain, weight
from .strict import StrictJSON, too_heavy
from .tables import csv_rows, parquet_rows, text_rows

__all__ = [
    "ARCHIVE",
    "READERS",
    "BadRow",
    "RawRow",
    "Rows",
    "StrictJSON",
    "extension",
    "in_archive",
    "json_kind",
    "plain",
    "read_file",
    "too_heavy",
    "weight",
]

READERS: dict[str, Callable[[TextFile], Rows]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".txt": text_rows,
}
ARCHIVE = ".zip"


def read_file(path: Path, name: str, encoding: str, head: int | None = None) -> Rows:
    """The rows of one file by its extension, of an archive those of its files; `head` is how many of each at most.

    Raises DataError when there are none, or they cannot be read.
    """
    if extension(path) != ARCHIVE:
        yield from islice(_rows(TextFile(path, name, encoding), READERS[extension(path)]), head)
        return
    with open_archive(path, name) as archive:
        found = contents(archive, path, name, frozenset(READERS))
        if not found.members:
            raise DataError(
                "the archive holds no file that can be read"
                + (f", only {', '.join(name for name, _ in found.skipped[:5])}" if found.skipped else ""),
                where=name,
                harm="There would be nothing to train on.",
                hint=f"Known are {', '.join(READERS)}, each also with .gz.",
            )
        for info in found.members:
            member = TextFile(path, shown(name, info), encoding, Member(archive, info))
            yield from islice(_rows(member, READERS[extension(Path(info.filename))]), head)


def in_archive(path: Path, name: str) -> Contents:
    """What an archive holds. Raises DataError when it is none."""
    with open_archive(path, name) as archive:
        return contents(archive, path, name, frozenset(READERS))


def _rows(file: TextFile, reader: Callable[[TextFile], Rows]) -> Rows:
    empty = True
    with explained(file):
        for row in reader(file):
            empty = False
            yield row
    if empty:
        size = file.member.info.file_size if file.member else file.path.stat().st_size
        raise DataError(
            "the file holds no rows" if size else "the file is empty",
            where=file.name,
            harm="A source that adds nothing is mostly a wrong path or a failed download.",
            hint="Check the file, or take the source out of `data.sources`.",
        )


def extension(path: Path) -> str:
    """The extension that says how to read a file: `.gz` is looked through, case does not matter."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix
