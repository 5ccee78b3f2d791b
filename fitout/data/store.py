"""Prepared data on disk: one Arrow file a part, memory-mapped, with the fingerprint of all that made it."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from ..chat.types import Origin, Tokens
from ..errors import CheckError
from ..files import atomic_open, read_json, sync_folder, write_json
from .split import PARTS

SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("train_on", pa.large_list(pa.uint8())),
        ("cut", pa.large_list(pa.int32())),  # what truncation left out, for the token view
        ("group", pa.int64()),  # samples of one conversation are shuffled together
        ("file", pa.string()),
        ("line", pa.int64()),
        ("part", pa.int64()),
        ("task", pa.int32()),  # a number of the data report's tasks; -1 for none
        ("rejected", pa.uint8()),  # 1: the answer that was not chosen; the chosen one is the row before
    ]
)
BATCH = 4096


class PartWriter:
    """Writes one part row by row; the file stands when the block ends well, and not otherwise. Memory stays bounded by
    BATCH rows and two numbers a row: `lengths` (tokens) and `supervised` (trained tokens)."""

    def __init__(self, path: Path, tasks: Sequence[str] = ()):
        """`tasks` names the numbers that rows' tasks have."""
        self.path = path
        self._schema = SCHEMA.with_metadata({"tasks": json.dumps(list(tasks))})
        self.lengths, self.supervised = array("i"), array("i")
        self._batch: list[tuple[int, int, bool, Tokens]] = []
        self._open = ExitStack()

    def __enter__(self) -> PartWriter:
        file = self._open.enter_context(atomic_open(self.path))
        self._writer = self._open.enter_context(ipc.new_file(file, self._schema))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        if kind is None:
            self._flush()
        self._open.__exit__(kind, error, trace)

    def add(self, group: int, tokens: Tokens, task: int = -1, *, rejected: bool = False) -> None:
        self._batch.append((group, task, rejected, tokens))
        self.lengths.append(len(tokens.ids))
        self.supervised.append(tokens.supervised)
        if len(self._batch) == BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            self._writer.write_batch(_record(self._batch))
            self._batch = []


def write_part(path: Path, rows: Iterable[tuple[int, Tokens]]) -> int:
    """Writes (group, tokens) rows; returns how many."""
    with PartWriter(path) as writer:
        for group, tokens in rows:
            writer.add(group, tokens)
    return len(writer.lengths)


def copy_rows(source: Path, target: Path, rows: np.ndarray, groups: np.ndarray) -> None:
    """Writes the given rows of a part, in that order and as often as they are named, with new groups."""
    table = Part(source).table
    with atomic_open(target) as file, ipc.new_file(file, table.schema) as writer:
        for at in range(0, len(rows), BATCH):
            taken = table.take(rows[at : at + BATCH])
            column = SCHEMA.get_field_index("group")
            taken = taken.set_column(column, SCHEMA.field("group"), pa.array(groups[at : at + BATCH], pa.int64()))
            for record in taken.combine_chunks().to_batches():
                writer.write_batch(record)


def _record(batch: Sequence[tuple[int, int, bool, Tokens]]) -> pa.RecordBatch:
    tokens = [t for *_, t in batch]
    return pa.record_batch(
        [
            _lists([t.ids for t in tokens]),
            _bytes([t.train_on for t in tokens]),
            _lists([t.cut for t in tokens]),
            pa.array([group for group, *_ in batch], pa.int64()),
            pa.array([t.origin.file for t in tokens], pa.string()),
            pa.array([t.origin.line for t in tokens], pa.int64()),
            pa.array([t.origin.part for t in tokens], pa.int64()),
            pa.array([task for _, task, *_ in batch], pa.int32()),
            pa.array([int(rejected) for _, _, rejected, _ in batch], pa.uint8()),
        ],
        schema=SCHEMA,
    )


def _lists(values: Sequence[Sequence[int]]) -> pa.LargeListArray:
    """Lists as one Arrow array, by way of numpy: several times as fast as pyarrow's own walk over Python lists."""
    offsets = _offsets(values)
    if all(isinstance(one, array) or not one for one in values):
        flat = np.frombuffer(b"".join(one for one in values if isinstance(one, array)), np.int32)
    else:
        flat = np.fromiter(chain.from_iterable(values), np.int32, int(offsets[-1]))
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _bytes(values: Sequence[bytes | bytearray]) -> pa.LargeListArray:
    """Numbers below 256, a list a row."""
    flat = np.frombuffer(b"".join(values), np.uint8)
    return pa.LargeListArray.from_arrays(pa.array(_offsets(values)), pa.array(flat))


def _offsets(values: Sequence[Sequence[int]]) -> np.ndarray:
    offsets = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(one) for one in values], out=offsets[1:])
    return offsets


class Part:
    """One part of the prepared data, read in place. Rows are numbered from 0.

    `references`, (rows,) float64, are log-probabilities of the rows' trained tokens under the model as training began;
    the loop gives them where the objective asks for them.
    """

    references: np.ndarray | None = None

    def __init__(self, path: Path):
        with pa.memory_map(str(path)) as source:
            self.table = ipc.open_file(source).read_all().combine_chunks()
        self._ids, self._offsets = _flat(self.table["ids"])
        self._train_on, _ = _flat(self.table["train_on"])
        self.groups = _numbers(self.table["group"])

    def __len__(self) -> int:
        return self.table.num_rows

    @cached_property
    def rejected(self) -> np.ndarray:
        """(rows,) bool: the answers that were not chosen, each right after the chosen one."""
        if "rejected" not in self.table.column_names:  # prepared by an earlier version
            return np.zeros(len(self), bool)
        return _numbers(self.table["rejected"]).astype(bool)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row."""
        lengths = np.diff(self._offsets)
        lengths.flags.writeable = False
        return lengths

    @cached_property
    def tasks(self) -> dict[str, np.ndarray]:
        """Names of the tasks and the rows of each; {} where the data have none."""
        if "task" not in self.table.column_names:  # prepared by an earlier version
            return {}
        names = json.loads((self.table.schema.metadata or {}).get(b"tasks", b"[]"))
        of_row = _numbers(self.table["task"])
        found = {name: np.flatnonzero(of_row == number) for number, name in enumerate(names)}
        return {name: rows for name, rows in found.items() if len(rows)}

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def supervised(self) -> int:
        """Tokens that are trained; a row's first token has nothing before it and never is."""
        firsts = self._offsets[:-1][self.lengths > 0]
        return int(self._train_on.sum(dtype=np.int64) - self._train_on[firsts].sum(dtype=np.int64))

    def ids(self, row: int) -> np.ndarray:
        """(n,) int32, a view of the file."""
        return self._ids[self._offsets[row] : self._offsets[row + 1]]

    def train_on(self, row: int) -> np.ndarray:
        """(n,) uint8, a view of the file."""
        return self._train_on[self._offsets[row] : self._offsets[row + 1]]

    def cut(self, row: int) -> list[int]:
        """The ids that truncation left out of this row."""
        return self.table["cut"][row].as_py()

    def origin(self, row: int) -> Origin:
        values = [self.table[name][row].as_py() for name in ("file", "line", "part")]
        return Origin(*values)


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and row offsets of a list column, without copying where it is one chunk."""
    if column.num_chunks == 0:
        return np.zeros(0, np.int32), np.zeros(1, np.int64)
    array = _one(column)
    return np.from_dlpack(array.values), np.from_dlpack(array.offsets)  # to_numpy() would import pandas, half a second


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, in the same way."""
    return np.from_dlpack(_one(column)) if column.num_chunks else np.zeros(0, column.type.to_pandas_dtype())


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks > 1 else column.chunk(0)


@dataclass(frozen=True)
class Prepared:
    """The three parts and the fingerprint of what made them."""

    folder: Path
    fingerprint: str

    def part(self, name: str) -> Part:
        return Part(self.folder / f"{name}.arrow")


def forget_fingerprint(folder: Path) -> None:
    """Before prepared data are replaced: what is there then counts as incomplete."""
    (folder / "fingerprint.json").unlink(missing_ok=True)
    sync_folder(folder)


def write_fingerprint(folder: Path, fingerprint: str) -> None:
    """Written last: prepared data without it are not complete."""
    write_json(folder / "fingerprint.json", {"fingerprint": fingerprint})


def open_prepared(folder: Path) -> Prepared | None:
    """The prepared data in `folder`, or None when there are none (or a killed process left them incomplete)."""
    if not (folder / "fingerprint.json").exists():
        return None
    missing = [name for name in PARTS if not (folder / f"{name}.arrow").exists()]
    if missing:
        raise CheckError(
            f"prepared data are incomplete: {', '.join(missing)} missing",
            where=str(folder),
            harm="The run would go on with other data than it began with.",
            hint="Delete this folder and run again; the data are prepared anew.",
        )
    return Prepared(folder, read_json(folder / "fingerprint.json")["fingerprint"])
