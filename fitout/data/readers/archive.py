"""Zip archives, read as folders. Nothing is unpacked to disk; a member's name is only a name."""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import DataError

MEMBERS = 10_000  # that are read; a set of more files is better unpacked
DIRECTORY = 16 << 20  # bytes of an archive's list of members


@dataclass
class Contents:
    """The members that will be read, sorted by name, and those passed over, each with the reason."""

    members: list[zipfile.ZipInfo] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def open_archive(path: Path, name: str) -> Iterator[zipfile.ZipFile]:
    """An archive to read from. Raises DataError when it is none."""
    with open(path, "rb") as file:
        try:
            archive = zipfile.ZipFile(_Careful(file))  # type: ignore[arg-type]  # reads, seeks and tells, as asked for
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(
                f"not a zip archive that can be read: {error}",
                where=name,
                harm="Its rows would be missing.",
                hint="Check that it was downloaded to the end; unpack other kinds of archive.",
            ) from error
        with archive:
            yield archive


def contents(archive: zipfile.ZipFile, path: Path, name: str, known: frozenset[str]) -> Contents:
    """What an archive holds; `known` are the endings that can be read. Raises DataError for more than can be read.

    Members that share bytes, as those of a bomb do, are more in sum than the archive is.
    """
    found = Contents()
    for info in sorted(archive.infolist(), key=lambda info: info.filename):
        if info.filename.endswith("/"):
            continue  # a folder; the library's own `is_dir` fails on a name that is empty
        reason = reason_to_skip(info, known)
        if reason:
            found.skipped.append((shown(name, info), reason))
        else:
            found.members.append(info)
    if sum(info.compress_size for info in found.members) > path.stat().st_size:
        raise DataError(
            "its members are larger than the archive: they share bytes, as a bomb's do",
            where=name,
            harm="It could fill the memory and never end.",
            hint="If you trust it, unpack it yourself and name the folder.",
        )
    if len(found.members) > MEMBERS:
        raise DataError(
            f"the archive holds {len(found.members):,} files, more than {MEMBERS:,}",
            where=name,
            harm="Reading it would take very long.",
            hint="Unpack it and name the folder.",
        )
    return found


def reason_to_skip(info: zipfile.ZipInfo, known: frozenset[str]) -> str:
    path = PurePosixPath(info.filename.replace("\\", "/"))
    if not info.filename:
        return "a file without a name"
    if path.is_absolute() or ".." in path.parts or ":" in info.filename:
        return "a name that leads out of the archive"
    if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
        return "a hidden file"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a link"
    ending = PurePosixPath(path.name.lower().removesuffix(".gz")).suffix
    if ending == ".zip":
        return "an archive in the archive"
    if ending not in known:
        return "an unknown ending"
    if info.flag_bits & 1:
        return "encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "packed by another method than deflate"
    return "" if info.file_size else "empty"


def shown(name: str, info: zipfile.ZipInfo) -> str:
    """A member's name as reports write it: below the archive's, printable."""
    return f"{name}/" + info.filename.encode("utf-8", "backslashreplace").decode("utf-8")


class _Careful:
    """A file whose list of members zipfile cannot be made to read when it is out of all proportion."""

    def __init__(self, file: Any):
        self.file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable
        self.close = file.close

    def read(self, count: int = -1) -> bytes:
        if count > DIRECTORY:
            raise ValueError(f"a list of members of {count:,} bytes")
        return self.file.read(count)
