"""Samples on their way through the stages: on disk as JSON lines, in memory only what the stages decide by.

A million rows of a kilobyte are a gigabyte of text and several of Python objects; here they are the gigabyte on
disk and about a hundred bytes each in memory.
"""

from __future__ import annotations

import json
import mmap
import os
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np

from ..chat.types import Conversation, Message, Origin, Pair, Part, Sample, Text
from ..files import make_folder
from .content import content_key, prompt_key


class Rows:
    """Numbered samples in a file of JSON lines (`as_row`). Written once, then read by number in any order.

    `keys` and `prompts` are (n,) of 16-byte digests: `content.content_key` and `content.prompt_key`.
    """

    def __init__(self, path: Path, mode: Literal["w+b", "r+b"] = "w+b"):
        make_folder(path.parent)
        self._file: BinaryIO = open(path, mode)  # noqa: SIM115 - closed by `with`
        self._map: mmap.mmap | None = None
        self._ends = array("q")
        self._keys, self._prompts = bytearray(), bytearray()
        self._files: dict[str, int] = {}
        self._file_of, self._line, self._part = array("i"), array("q"), array("q")

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._map is not None:
            self._map.close()
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, sample: Sample) -> None:
        line = json.dumps(as_row(sample), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        self._file.write(line)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(line))
        self._keys += content_key(sample)
        self._prompts += prompt_key(sample)
        origin = sample.origin
        self._file_of.append(self._files.setdefault(origin.file, len(self._files)))
        self._line.append(origin.line)
        self._part.append(origin.part)

    def written(self) -> None:
        """To be called after the last `add` and before the first read."""
        self._file.flush()
        if self._map is not None:
            self._map.close()
        if self._ends:
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    # halfway

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `restored` needs besides the file, which is on the disk then."""
        self._file.flush()
        os.fsync(self._file.fileno())
        arrays = {
            "ends": np.array(self._ends), "keys": np.frombuffer(bytes(self._keys), np.uint8),
            "prompts": np.frombuffer(bytes(self._prompts), np.uint8), "file_of": np.array(self._file_of),
            "line": np.array(self._line), "part": np.array(self._part),
        }  # fmt: skip
        return {"files": self.files}, arrays

    @classmethod
    def restored(cls, path: Path, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> Rows:
        """As they were at `state`; what was written to the file since is cut off."""
        rows = cls(path, "r+b")
        rows._ends = array("q", arrays["ends"].tobytes())
        rows._file.truncate(rows._ends[-1] if rows._ends else 0)
        rows._file.seek(0, os.SEEK_END)
        rows._keys, rows._prompts = bytearray(arrays["keys"].tobytes()), bytearray(arrays["prompts"].tobytes())
        rows._files = {name: number for number, name in enumerate(values["files"])}
        rows._file_of = array("i", arrays["file_of"].tobytes())
        rows._line, rows._part = array("q", arrays["line"].tobytes()), array("q", arrays["part"].tobytes())
        rows.written()
        return rows

    # what is kept in memory

    @property
    def keys(self) -> np.ndarray:
        return np.frombuffer(bytes(self._keys), "S16") if self._keys else np.zeros(0, "S16")

    @property
    def prompts(self) -> np.ndarray:
        return np.frombuffer(bytes(self._prompts), "S16") if self._prompts else np.zeros(0, "S16")

    @property
    def files(self) -> list[str]:
        """Names of the files, by the numbers in `file_of`."""
        return list(self._files)

    @property
    def file_of(self) -> np.ndarray:
        """(n,) the number of each sample's file."""
        return np.array(self._file_of, np.int32)

    def origin(self, at: int) -> Origin:
        return Origin(self.files[self._file_of[at]], self._line[at], self._part[at])

    # what is read back

    def chunks(self, numbers: np.ndarray, most: int, most_bytes: int) -> Iterator[np.ndarray]:
        """The numbers in pieces of at most so many samples, and of so many bytes unless one sample has more."""
        ends = np.array(self._ends, np.int64)
        sizes = np.diff(ends, prepend=0)[numbers]
        start = held = 0
        for at, size in enumerate(sizes.tolist()):
            if at > start and (at - start == most or held + size > most_bytes):
                yield numbers[start:at]
                start, held = at, 0
            held += size
        if len(numbers) > start:
            yield numbers[start:]

    def line(self, at: int) -> bytes:
        """The sample's JSON line, its end included."""
        assert self._map is not None
        return self._map[self._ends[at - 1] if at else 0 : self._ends[at]]

    def _row(self, at: int) -> dict[str, Any]:
        return json.loads(self.line(at).decode("utf-8", "surrogatepass"))  # of bytes json would look first how written

    def sample(self, at: int) -> Sample:
        return from_row(self._row(at))

    def prompt(self, at: int) -> str:
        """What stands before the first answer; of a plain text the whole."""
        row = self._row(at)
        if "text" in row:
            return row["text"]
        turns = row["messages"] if "messages" in row else row["prompt"]
        asked = takewhile(lambda turn: turn["role"] != "assistant", turns)
        return "\n".join(turn["content"] for turn in asked)

    def whole(self, at: int) -> str:
        """Everything that is said."""
        row = self._row(at)
        if "text" in row:
            return row["text"]
        turns = row["messages"] if "messages" in row else [*row["prompt"], row["chosen"], row["rejected"]]
        return "\n".join(turn["content"] for turn in turns)

    def samples(self, numbers: Iterable[int]) -> Iterator[Sample]:
        return (self.sample(int(at)) for at in numbers)


class Lines:
    """A file of JSON lines that is written while the stages run and stands complete at its end, or not at all."""

    def __init__(self, path: Path, staging: Path | None = None, held: int = 0):
        """Written at `staging` until it is done; the first `held` bytes of it stay."""
        make_folder(path.parent)
        self.path, self.staging = path, staging or path.with_name(f".{path.name}.part")
        self._file = open(self.staging, "r+b" if held else "wb")  # noqa: SIM115 - closed by done() or close()
        self._file.truncate(held)
        self._file.seek(held)

    def write(self, row: dict[str, Any]) -> None:
        self.raw(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def raw(self, line: bytes) -> None:
        self._file.write(line)

    def held(self) -> int:
        """Bytes so far, all of them on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def done(self) -> None:
        self.held()
        self._file.close()
        self.staging.replace(self.path)

    def close(self) -> None:
        with suppress(OSError):  # a full disk; what it lacks is made again, or goes with the rest
            self._file.close()


# samples as plain rows


def as_row(sample: Sample) -> dict[str, Any]:
    """A sample as a JSON-able row; `from_row` gives it back."""
    origin = {"file": sample.origin.file, "line": sample.origin.line, "part": sample.origin.part}
    if isinstance(sample, Text):
        return {"text": sample.text, "origin": origin, "meta": sample.meta}
    if isinstance(sample, Conversation):
        messages = [_message(message) for message in sample.messages]
        return {"messages": messages, "tools": list(sample.tools), "meta": sample.meta, "origin": origin}
    return {
        "prompt": [_message(message) for message in sample.prompt],
        "chosen": _message(sample.chosen),
        "rejected": _message(sample.rejected),
        "tools": list(sample.tools),
        "meta": sample.meta,
        "origin": origin,
    }


def from_row(row: dict[str, Any]) -> Sample:
    """The sample that `as_row` wrote."""
    origin, meta = Origin(**row["origin"]), row["meta"]
    if "text" in row:
        return Text(row["text"], origin, meta)
    if "messages" in row:
        return Conversation(tuple(map(_read_message, row["messages"])), origin, tuple(row["tools"]), meta)
    prompt = tuple(map(_read_message, row["prompt"]))
    return Pair(prompt, _read_message(row["chosen"]), _read_message(row["rejected"]), origin, meta, tuple(row["tools"]))


def _message(message: Message) -> dict[str, Any]:
    row = {"role": message.role, "content": message.content, **message.extra, "train": message.train}
    if message.parts:
        row["parts"] = [[part.type, part.value] for part in message.parts]
    return row


def _read_message(row: dict[str, Any]) -> Message:
    if len(row) == 3:  # role, content, train: most of them
        return Message(row["role"], row["content"], row["train"])
    parts = tuple(Part(*part) for part in row.get("parts", ()))
    extra = {key: value for key, value in row.items() if key not in ("role", "content", "train", "parts")}
    return Message(row["role"], row["content"], row["train"], parts, extra)
