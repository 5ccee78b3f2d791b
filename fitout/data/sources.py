"""Where rows come from: a file, a folder or a hub id becomes a stream of rows, each with its origin (file:line)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..chat.types import Origin
from ..errors import DataError
from . import HUB_ID, SourceSettings
from .readers import ARCHIVE, READERS, BadRow, RawRow, Rows, extension, in_archive, plain, read_file, weight

__all__ = ["BadRow", "Listing", "RawRow", "list_files", "named", "probe", "read"]

ENOUGH = 64 << 20  # bytes of rows, as Python values, that a format is told by
KNOWN = ", ".join(READERS) + f", each also with .gz or in a {ARCHIVE}"


@dataclass
class Listing:
    """The files of a source, in reading order, and what its folder holds besides, with the reason it is not read.

    Files are (path, name); the name is the path as the recipe wrote it, so that origins are the same on every machine.
    """

    files: list[tuple[Path, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def named(path: str, format: str | None = None) -> SourceSettings:
    """A source as a command line names it. Raises DataError for a hub id or a format that is none."""
    try:
        return SourceSettings(path=path, format=format)
    except ValidationError as error:
        raise DataError(error.errors()[0]["msg"].removeprefix("Value error, "), where=path) from None


def read(source: SourceSettings, base: Path) -> Iterator[RawRow | BadRow]:
    """The rows of a source in order, at most `source.limit` of them (bad ones count).

    `base` is the folder that relative paths start from. Raises DataError for what cannot be read as a whole; that may
    come after rows have been given, since files are streamed.
    """
    hub = HUB_ID.fullmatch(source.path)
    rows = hub_rows(hub) if hub else file_rows(source, base)
    with closing(rows):
        yield from islice(rows, source.limit)


def probe(source: SourceSettings, base: Path, count: int = 100) -> list[dict[str, Any]]:
    """About `count` good rows to detect a format from: the first of every file, of `count` files at most; fewer where
    they are so large that ENOUGH bytes of them are had before."""
    files = list_files(source, base).files
    if not files:  # a hub id
        return _light(read(source.model_copy(update={"limit": count}), base), ENOUGH)[0]
    chosen = files[:: -(-len(files) // count)]
    each = -(-count // len(chosen))
    found: list[dict[str, Any]] = []
    room = ENOUGH
    for path, name in chosen:
        with closing(read_file(path, name, source.encoding, each)) as rows:
            more, room = _light(islice(rows, count), room)
        found += more
        if room <= 0:
            break
    return found


def _light(rows: Iterable[RawRow | BadRow], room: int) -> tuple[list[dict[str, Any]], int]:
    """Good rows until they weigh `room` bytes, and how many are left of these."""
    found = []
    for row in rows:
        if isinstance(row, RawRow):
            found.append(row.row)
            room -= weight(row.row, room)
            if room <= 0:
                break
    return found, room


def file_rows(source: SourceSettings, base: Path) -> Rows:
    for path, name in list_files(source, base).files:
        yield from read_file(path, name, source.encoding)


def list_files(source: SourceSettings, base: Path) -> Listing:
    """What reading a source will read, and what it will pass over. Raises DataError when there is nothing to read."""
    if HUB_ID.fullmatch(source.path):
        return Listing()
    path = Path(base) / Path(source.path).expanduser()
    if path.is_dir():
        listing = list_folder(path, source.path)
        if not listing.files:
            names = ", ".join(name for name, _ in listing.skipped[:5])
            raise DataError(
                "the folder holds no file that can be read" + (f", only {names}" if names else ""),
                where=source.path,
                harm="There would be nothing to train on.",
                hint=f"Known are {KNOWN}.",
            )
        return listing
    if not path.exists():
        raise missing(path, source.path)
    if extension(path) == ARCHIVE:
        return Listing([(path, printable(source.path))], in_archive(path, printable(source.path)).skipped)
    if extension(path) not in READERS:
        raise DataError(
            f"files ending in {extension(path) or 'nothing'!r} are not known",
            where=source.path,
            harm="Guessing its form could read it wrongly.",
            hint=f"Known are {KNOWN}; unpack other archives, rename a file that has another ending.",
        )
    return Listing(files=[(path, printable(source.path))])


def list_folder(folder: Path, name: str) -> Listing:
    """All files below a folder, sorted by path; hidden, linked, empty and unknown ones are passed over."""
    listing = Listing()

    def unreadable(error: OSError) -> None:
        raise DataError(
            f"a folder cannot be read: {error.strerror}",
            where=str(error.filename),
            harm="The rows of its files would be missing without a word.",
            hint="Give yourself the right to read it, or name the files one by one.",
        )

    for root, folders, files in os.walk(folder, onerror=unreadable):
        here = Path(root)
        for child in sorted(folders):
            if child.startswith(".") or (here / child).is_symlink():
                reason = "a hidden folder" if child.startswith(".") else "a link to a folder"
                listing.skipped.append((shown(here / child, folder, name), reason))
                folders.remove(child)
        for child in files:
            path = here / child
            reason = reason_to_skip(path)
            if reason:
                listing.skipped.append((shown(path, folder, name), reason))
            else:
                listing.files.append((path, shown(path, folder, name)))
                if extension(path) == ARCHIVE:
                    listing.skipped += in_archive(path, shown(path, folder, name)).skipped
    listing.files.sort(key=lambda item: item[1])
    listing.skipped.sort()
    return listing


def reason_to_skip(path: Path) -> str:
    if path.name.startswith("."):
        return "a hidden file"
    if extension(path) not in (*READERS, ARCHIVE):
        return "an unknown ending"
    if not path.is_file():
        return "not a file"
    return "" if path.stat().st_size else "empty"


def shown(path: Path, folder: Path, name: str) -> str:
    return printable(str(Path(name) / path.relative_to(folder)))


def printable(name: str) -> str:
    """A file name that reports can write: bytes that are not UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def missing(path: Path, name: str) -> DataError:
    """Says which part of a path is missing and what stands in its place."""
    while not path.parent.exists():
        path = path.parent
    try:
        beside = sorted(os.listdir(path.parent))
    except OSError:
        beside = []
    near = get_close_matches(path.name, beside, 3, 0.5) or [entry for entry in beside if not entry.startswith(".")][:3]
    hint = f"In {path.parent} there is {', '.join(map(printable, near))}." if near else f"{path.parent} is empty."
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        hint += f" For a data set on a hub write hf://{name}."
    return DataError(
        f"there is no {printable(path.name)}",
        where=printable(name),
        harm="There would be nothing to train on.",
        hint=hint,
    )


# --- hubs --------------------------------------------------------------------------------------------------------


def hub_rows(found: re.Match[str]) -> Rows:
    """Rows of a data set on the Hugging Face Hub or on ModelScope, numbered from 1.

    The hub libraries read their own settings: HF_TOKEN, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE, MODELSCOPE_API_TOKEN.
    """
    path = found[0]
    load = load_huggingface if found["hub"] == "hf" else load_modelscope
    number = 0
    try:
        for row in load(found["name"], found["config"], found["split"] or "train"):
            number += 1
            yield RawRow(plain(dict(row)), Origin(path, number))
    except DataError:
        raise
    except Exception as error:  # the hub libraries raise anything from HTTP, file systems and their own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(
            f"the hub gave no data{f' after row {number}' if number else ''}: {reason}",
            where=path,
            harm="The rows from there on would be missing." if number else "There would be nothing to train on.",
            hint="Check id, config and split (hf://owner/name/config:split), the network, and HF_TOKEN for gated data; "
            "HF_ENDPOINT names a mirror.",
        ) from error
    if not number:
        raise DataError("the data set holds no rows", where=path, hint="Name another split: hf://owner/name:split.")


def load_huggingface(name: str, config: str | None, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise not_installed("datasets", "fitout[hub]", f"hf://{name}", error) from error
    return load_dataset(name, config, split=split, streaming=True)


def load_modelscope(name: str, config: str | None, split: str) -> Any:
    try:
        from modelscope.msdatasets import MsDataset
    except ModuleNotFoundError as error:
        raise not_installed("modelscope", "fitout[modelscope]", f"ms://{name}", error) from error
    return MsDataset.load(name, subset_name=config, split=split)


def not_installed(package: str, extra: str, where: str, error: ModuleNotFoundError) -> DataError:
    """The package itself may be there without what its data sets need (modelscope comes so)."""
    lacking = (error.name or package).partition(".")[0]
    needs = "" if lacking == package else f" with {lacking}"
    return DataError(
        f"reading it needs the package {package}{needs}, which is not installed",
        where=where,
        harm="Its rows cannot be read.",
        hint=f"Run `pip install '{extra}'`, or download the data set and name its folder.",
    )
