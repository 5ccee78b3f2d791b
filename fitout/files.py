"""Files: atomic writes, JSON lines, hashes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import FitoutError, RequestError


def home() -> Path:
    """Where Fitout remembers things between runs: FITOUT_HOME, else fitout/ in the user's data folder (XDG)."""
    if given := os.environ.get("FITOUT_HOME"):
        return Path(given)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "fitout"


def sync_folder(folder: Path) -> None:
    """Makes renames inside `folder` survive a power loss (POSIX: fsync the directory)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Makes `folder` and what is missing above it, so that a power loss cannot take them away with what is in them."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


@contextmanager
def explain_os_errors(path: Path, doing: str) -> Iterator[None]:
    """Turns an operating-system error into one that names the path and the cause. A file where a folder is to be was
    asked for, and is no failure of the work."""
    try:
        yield
    except OSError as error:
        kind = RequestError if isinstance(error, NotADirectoryError | FileExistsError) else FitoutError
        raise kind(
            f"cannot {doing}: {error.strerror or error}",
            where=str(path),
            harm="Nothing half-written is left behind; what was complete before still is.",
            hint=f"{'Free some space or choose' if error.errno in DISK else 'Choose'} another folder with --out, then "
            "run the same command again.",
        ) from error


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}  # what disks have to say


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """Turns what a disk has to say about work in `folder` (it is full, it failed) into an error with path and cause."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        with explain_os_errors(Path(os.fsdecode(error.filename or folder)), "write"):
            raise


@contextmanager
def errors_of_the_system(folder: Path) -> Iterator[None]:
    """Makes an OSError of an exception that tells of one in words, as libraries written in Rust raise them (tokenizers
    a bare Exception, safetensors its own): "No space left on device (os error 28)"."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        told = re.search(r"\(os error (\d+)\)$", str(error))
        if not told:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(folder)) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a sibling name to write to; when the block ends well it is synced and renamed over `path`.

    Readers see the old content or the new, never a part. On any error the sibling is removed.
    """
    path = Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    with explain_os_errors(path, "write"):
        try:
            make_folder(path.parent)
            yield staging
            with open(staging, "rb") as file:
                os.fsync(file.fileno())
            os.replace(staging, path)
            sync_folder(path.parent)
        finally:
            staging.unlink(missing_ok=True)


@contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for writing so that readers see the old content or the new, never a part (see atomic_path)."""
    with atomic_path(path) as staging, open(staging, "wb") as file:
        yield file


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yields an empty sibling folder to fill; when the block ends well it is synced and takes the place of `path`.

    A reader sees the old folder or the complete new one. (Between the two renames of a replacement neither is there;
    the old one is only removed after the new one is in place.)
    """
    path = Path(path)
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    with explain_os_errors(path, "write"):
        try:
            shutil.rmtree(staging, ignore_errors=True)
            make_folder(path.parent)
            staging.mkdir()
            yield staging
            for file in sorted(staging.rglob("*")):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
                else:
                    sync_folder(file)
            sync_folder(staging)
            if path.exists():
                os.replace(path, old)
            os.replace(staging, path)
            sync_folder(path.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            _remove_or_put_back(old, path)


LEFT = re.compile(r"\.(.+)\.\d+\.(part|old)")  # as the two above name them


def remove_leftovers(folder: Path) -> list[str]:
    """Removes what a killed process left half-written in `folder`; returns the names. What it had put aside for a
    folder that never came is put back."""
    names = []
    for path in sorted(Path(folder).glob(".*")):
        if not (left := LEFT.fullmatch(path.name)):
            continue
        if left[2] == "old":
            _remove_or_put_back(path, path.with_name(left[1]))
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        names.append(path.name)
    return names


def _remove_or_put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with atomic_open(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Numbers that are not finite, which JSON has no words for, become null."""
    write_text(path, json.dumps(_finite(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_jsonl(path: Path, rows: Iterable[dict]) -> int:
    """Writes one object a line, atomically; returns how many."""
    count = 0
    with atomic_open(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n")
            count += 1
    return count


def read_jsonl(path: Path) -> list[dict]:
    """Reads our own JSON lines; a torn last line (a kill while appending) is left out."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                rows.append(json.loads(line))
    return rows


def sha256_file(path: Path, size: int | None = None) -> str:
    """The hash of a file, or of its first `size` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size if size is None else size
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def fingerprint(*parts: Any) -> str:
    """A short stable hash of JSON-able parts (20 hex digits of SHA-256)."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


def size(value: float) -> str:
    """Bytes in words: 1.9 MB, 38 GB."""
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log(max(value, 1), 1000)))
    shown = value / 1000**power
    return f"{shown:,.{1 if power and shown < 100 else 0}f} {units[power]}"
