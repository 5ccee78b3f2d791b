"""Opening a file as bytes and as text: gzip, archive members, encodings, and what can be wrong with them, in words."""

from __future__ import annotations

import codecs
import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ...chat.types import Origin
from ...errors import DataError
from .rows import MAX_ROW

#: Unpacked, a file may be this many bytes whatever its size, and beyond them this many times its packed size. Text
#: packs 3 to 30 times; a bomb of zeros a thousand times, a nested one more.
UNPACKED_FREE = 64 << 20
UNPACKED_TIMES = 200


class Bomb(Exception):
    """A packed file that unpacks to out of all proportion."""


@dataclass(frozen=True)
class Member:
    """A file inside an archive that is open."""

    archive: zipfile.ZipFile
    info: zipfile.ZipInfo


@dataclass(frozen=True)
class TextFile:
    """A file to be read as text: where it is, the name to report it by, its encoding, and its place in an archive."""

    path: Path
    name: str
    encoding: str
    member: Member | None = None

    @contextmanager
    def open(self, newline: str = "\n") -> Iterator[io.TextIOWrapper]:
        # utf-8-sig is utf-8 that skips a byte order mark where there is one.
        encoding = "utf-8-sig" if self._is_utf8() else self.encoding
        with self.binary() as binary, io.TextIOWrapper(binary, encoding=encoding, newline=newline) as text:
            yield text

    @contextmanager
    def binary(self) -> Iterator[BinaryIO]:
        """The file's bytes. gzip is unpacked; it is known by its first two bytes, not by its name."""
        with ExitStack() as stack:
            if self.member is None:
                packed = self.path.stat().st_size
                file: Any = stack.enter_context(open(self.path, "rb"))
                unpacked = False
            else:
                packed = self.member.info.compress_size
                file = stack.enter_context(self._unpacked(self.member))
                unpacked = True
            if file.peek(2)[:2] == b"\x1f\x8b":
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
                unpacked = True
            yield io.BufferedReader(_Measured(file, packed)) if unpacked else file

    @staticmethod
    def _unpacked(member: Member) -> Any:
        try:
            return member.archive.open(member.info)
        except (UnicodeError, ValueError, RuntimeError, NotImplementedError) as error:  # of a damaged description
            raise zipfile.BadZipFile(str(error)) from error

    def at(self, line: int, part: int = 0) -> Origin:
        return Origin(self.name, line, part)

    def _is_utf8(self) -> bool:
        return codecs.lookup(self.encoding).name == "utf-8"


class _Measured(io.RawIOBase):
    """Passes unpacked bytes on and stops when they are out of proportion to the packed ones."""

    def __init__(self, file: BinaryIO, packed: int):
        self.file = file
        self.left = max(UNPACKED_FREE, UNPACKED_TIMES * packed)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.file.read(len(buffer))
        self.left -= len(block)
        if self.left < 0:
            raise Bomb
        buffer[: len(block)] = block
        return len(block)


def lines(text: io.TextIOWrapper) -> Iterator[tuple[str, int]]:
    """Lines with their ends, and of one longer than MAX_ROW how many characters were left out."""
    while line := text.readline(MAX_ROW):
        left_out = 0
        if len(line) == MAX_ROW and line[-1] != "\n":
            while rest := text.readline(MAX_ROW):
                left_out += len(rest)
                if rest[-1] == "\n":
                    break
        yield line, left_out


# --- what can be wrong -------------------------------------------------------------------------------------------


@contextmanager
def explained(file: TextFile) -> Iterator[None]:
    """Turns what unpacking, decoding and the operating system raise into errors that name the place and the remedy."""
    try:
        yield
    except UnicodeError as error:
        raise wrong_encoding(file, error) from error
    except Bomb:
        raise DataError(
            f"it unpacks to more than {UNPACKED_FREE >> 20} MB and {UNPACKED_TIMES} times its size, as a bomb does",
            where=file.name,
            harm="It could fill the memory and never end.",
            hint="If you trust it, unpack it yourself and name the unpacked file.",
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise DataError(
            f"the {'zip' if file.member else 'gzip'} file is damaged or cut short: {error}",
            where=file.name,
            harm="The rows after the damage would be missing without a word.",
            hint="Download or pack the file again.",
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror or error}", where=file.name, hint="Check its permissions."
        ) from error


def wrong_encoding(file: TextFile, error: UnicodeError) -> DataError:
    found = first_bad_byte(file)
    if found is None:  # a fault of the stream as a whole, such as UTF-16 without its mark
        message, line = f"the file is not {file.encoding}: {error}", 1
    else:
        offset, line, byte = found
        message = f"byte 0x{byte:02x} at offset {offset} is not {file.encoding}"
    guess = guess_encoding(file)
    if guess:
        hint = f"Name its encoding in the source, perhaps `encoding: {guess}`, or save the file as UTF-8."
    else:
        hint = "It looks like a binary file; name a text or Parquet file."
    return DataError(message, where=f"{file.name}:{line}", harm="Guessing would train on garbled text.", hint=hint)


def first_bad_byte(file: TextFile) -> tuple[int, int, int] | None:
    """(offset, line, byte) of the first byte that does not decode; None when every byte does."""
    decoder = codecs.getincrementaldecoder(file.encoding)()
    read = 0
    count = 1
    with file.binary() as binary:
        while True:
            block = binary.read(1 << 16)
            try:
                count += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                kept = len(error.object) - len(block)  # bytes the decoder held back from the block before
                before = error.object[: error.start]
                return read - kept + error.start, count + before.count(b"\n"), error.object[error.start]
            except UnicodeError:
                return None
            read += len(block)
            if not block:
                return None


def guess_encoding(file: TextFile) -> str | None:
    """A guess to offer in a hint, never to act on; None for what looks binary."""
    with file.binary() as binary:
        head = binary.read(1 << 20)
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
