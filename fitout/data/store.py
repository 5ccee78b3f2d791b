"""Prepared data on disk: one Arrow file a part, memory-mapped, with the fingerprint of all that made it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from ..chat.types import Origin, Tokens
from ..errors import CheckError
from ..files import atomic_open, read_json, write_json
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
    ]
)
BATCH = 4096


def write_part(path: Path, rows: Iterable[tuple[int, Tokens]]) -> int:
    """Writes (group, tokens) rows; returns how many. Memory stays bounded by BATCH rows."""
    count = 0
    with atomic_open(path) as file, ipc.new_file(file, SCHEMA) as writer:
        batch: list[tuple[int, Tokens]] = []
        for row in rows:
            batch.append(row)
            count += 1
            if len(batch) == BATCH:
                writer.write_batch(_record(batch))
                batch = []
        if batch:
            writer.write_batch(_record(batch))
    return count


def _record(batch: Sequence[tuple[int, Tokens]]) -> pa.RecordBatch:
    tokens = [t for _, t in batch]
    return pa.record_batch(
        [
            pa.array([t.ids for t in tokens], SCHEMA.field("ids").type),
            pa.array([[int(on) for on in t.train_on] for t in tokens], SCHEMA.field("train_on").type),
            pa.array([t.cut for t in tokens], SCHEMA.field("cut").type),
            pa.array([group for group, _ in batch], pa.int64()),
            pa.array([t.origin.file for t in tokens], pa.string()),
            pa.array([t.origin.line for t in tokens], pa.int64()),
            pa.array([t.origin.part for t in tokens], pa.int64()),
        ],
        schema=SCHEMA,
    )


class Part:
    """One part of the prepared data, read in place. Rows are numbered from 0."""

    def __init__(self, path: Path):
        with pa.memory_map(str(path)) as source:
            self.table = ipc.open_file(source).read_all().combine_chunks()
        self._ids, self._offsets = _flat(self.table["ids"])
        self._train_on, _ = _flat(self.table["train_on"])
        self.groups = self.table["group"].to_numpy()

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def lengths(self) -> np.ndarray:
        """(rows,) tokens of each row."""
        return np.diff(self._offsets)

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
    array = column.combine_chunks() if column.num_chunks > 1 else column.chunk(0)
    return array.values.to_numpy(zero_copy_only=False), array.offsets.to_numpy()


@dataclass(frozen=True)
class Prepared:
    """The three parts and the fingerprint of what made them."""

    folder: Path
    fingerprint: str

    def part(self, name: str) -> Part:
        return Part(self.folder / f"{name}.arrow")


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
