"""The power goes at a random moment: what was not yet synced is lost or arrives in another order.

    python -m benchmarks.disk.power --states 1000 --out benchmarks/results/disk-power.json

One undisturbed run is written down, operation by operation with all bytes (shim.c). From that a disk is made as a power
loss at a random operation could have left it, under the rules of POSIX and no kinder: what a file held when it was last
synced is there; of later writes any prefix, or nothing, or the size with zeros; of the entries of a folder (a new
file, a rename, a removal) those before the folder's last sync are there; of later ones any choice, as long as each
one's own predecessor is (a rename of a file whose creation got lost is lost too).

For each disk the checkpoints are opened as a resume opens them. It passes when the newest that verifies has the very
bytes that the run saved for its step, and is the newest whose save had returned by then, or a later one. `--starts N`
takes N of the disks and runs `fitout run` on them to the end: exit code 0 and the bytes of the undisturbed run.
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..small import machine, write
from .run import SAVE_EVERY, STEPS, adapter, build, fitout, fresh, half_written, sha256


@dataclass(frozen=True)
class Operation:
    """One line of the shim's log; paths relative to the run directory."""

    what: str
    path: str
    to: str
    offset: int
    data: bytes


@dataclass
class File:
    """What a file holds now, what it held at its last sync, and the writes since."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    later: list[Operation] = field(default_factory=list)

    def sync(self) -> None:
        self.synced, self.later = bytes(self.now), []


@dataclass
class Folder:
    """Its entries now, those of its last sync, and the changes since: (name, "" or the new name, what is meant)."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    later: list[tuple[str, str, File | Folder | None]] = field(default_factory=list)

    def sync(self) -> None:
        self.synced, self.later = dict(self.now), []

    def change(self, name: str, to: str, node: File | Folder | None) -> None:
        self.later.append((name, to, node))
        enter(self.now, name, to, node)


def enter(entries: dict[str, File | Folder], name: str, to: str, node: File | Folder | None) -> None:
    """Adds `node` as `name`, renames it to `to`, or removes the name (None). What is not there cannot be renamed."""
    if node is None:
        entries.pop(name, None)
    elif not to:
        entries[name] = node
    elif entries.get(name) is node:
        entries[to] = entries.pop(name)


class Disk:
    def __init__(self) -> None:
        self.root = Folder()

    def at(self, path: str) -> Any:
        node: Any = self.root
        for name in path.split("/") if path else []:
            node = node.now[name]
        return node

    def _arrive(self, path: str) -> None:
        """safetensors renames its temporary file by a system call of its own, which the shim cannot see."""
        above, name = (self.at(path.rpartition("/")[0]), path.rpartition("/")[2]) if path else (self.root, "")
        if name and name not in above.now:
            (temporary,) = [other for other in above.now if other.startswith(".tmp")]
            above.change(temporary, name, above.now[temporary])

    def apply(self, op: Operation) -> None:
        if op.what in "wts":
            self._arrive(op.path)
            node = self.at(op.path)
            if op.what == "s":
                node.sync()
                return
            write_to(node.now, op)
            node.later.append(op)
            return
        if not op.path:
            return  # the run directory itself
        above, name = self.at(op.path.rpartition("/")[0]), op.path.rpartition("/")[2]
        if op.what == "r":
            assert op.to.rpartition("/")[0] == op.path.rpartition("/")[0], "renamed into another folder"
            above.change(name, op.to.rpartition("/")[2], above.now[name])
        else:
            above.change(name, "", {"o": File, "d": Folder}[op.what]() if op.what in "od" else None)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--states", type=int, default=1000)
    arguments.add_argument("--starts", type=int, default=20)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--work", type=Path, default=Path("build/disk"))
    asked = arguments.parse_args()
    work = asked.work.absolute()
    build(work)
    run, log = fresh(work / "logged"), work / "log"
    log.unlink(missing_ok=True)
    code, output = fitout(work, run, (f"train.keep_last={STEPS}",), log=log)
    if code:
        sys.exit(output)
    saved = {
        step: checkpoint_hash(run / "checkpoints" / f"step-{step}") for step in range(SAVE_EVERY, STEPS + 1, SAVE_EVERY)
    }
    operations = list(read(log, run))
    draw = random.Random(asked.seed)
    failures: list[dict[str, Any]] = []
    found: dict[str, int] = {}
    starts = {"tried": 0, "ended well": 0}
    every = max(1, asked.states // max(1, asked.starts))
    for number in range(asked.states):
        moment = draw.randrange(1, len(operations) + 1)
        state = fresh(work / "state")
        lost(operations[:moment], draw, state)
        problem, step = judge(state, operations[:moment], saved)
        found[str(step)] = found.get(str(step), 0) + 1
        if not problem and asked.starts and number % every == 0:
            starts["tried"] += 1
            code, output = fitout(work, state, (f"train.keep_last={STEPS}",))
            same = not code and adapter(state) == adapter(run) and not half_written(state)
            starts["ended well"] += same
            problem = "" if same else f"`fitout run` on it: exit code {code}; {output[-600:]}"
        if problem:
            failures.append({"state": number, "moment": moment, "of": len(operations), "problem": problem})
            os.replace(state, fresh(work / f"lost-{number}"))
            print(failures[-1], flush=True)
    result = {
        "machine": machine(1), "seed": asked.seed, "states": asked.states, "operations": len(operations),
        "newest step found": found, "starts": starts, "failures": failures,
    }  # fmt: skip
    write(asked.out, result)
    print(f"{asked.states - len(failures)} of {asked.states} passed; {starts}; newest step found: {found}")
    sys.exit(bool(failures))


def read(log: Path, run: Path) -> Iterator[Operation]:
    data, at = log.read_bytes(), 0
    while at < len(data):
        what, offset, first, second, size = struct.unpack_from("<cq3I", data, at)
        at += struct.calcsize("<cq3I")
        names = data[at : at + first].decode(), data[at + first : at + first + second].decode()
        at += first + second
        path, to = (str(Path(name).relative_to(run)) if name else "" for name in names)
        yield Operation(what.decode(), "" if path == "." else path, to, offset, data[at : at + size])
        at += size


def write_to(content: bytearray, op: Operation) -> None:
    """Does a write, or a truncation to `offset` bytes."""
    if op.what == "t":
        del content[op.offset :]
    end = op.offset + len(op.data)
    content.extend(bytes(max(0, end - len(content))))
    content[op.offset : end] = op.data


def lost(operations: list[Operation], draw: random.Random, to: Path) -> None:
    """Makes the folder that a power loss after `operations` could leave."""
    disk = Disk()
    for op in operations:
        disk.apply(op)
    share = draw.choice([0.0, 0.5, 0.9, 1.0])  # of the entries not yet synced, how many arrive
    _make(disk.root, to, share, draw)


def _make(folder: Folder, to: Path, share: float, draw: random.Random) -> None:
    to.mkdir()
    entries = dict(folder.synced)
    for change in folder.later:
        if draw.random() < share:
            enter(entries, *change)
    for name, node in entries.items():
        if isinstance(node, Folder):
            _make(node, to / name, share, draw)
        else:
            (to / name).write_bytes(arrived(node, draw))


def arrived(file: File, draw: random.Random) -> bytes:
    """What a file holds afterwards: synced content, and of the later writes a prefix, none, or zeros in their place."""
    how = draw.choice(["all", "none", "prefix", "zeros", "torn"]) if file.later else "all"
    if how == "all":
        return bytes(file.now)
    content = bytearray(file.synced)
    if how == "zeros":
        return bytes(content.ljust(len(file.now), b"\0"))
    if how in ("prefix", "torn"):
        count = draw.randrange(len(file.later) + 1)
        for op in file.later[:count]:
            write_to(content, op)
        if how == "torn":
            content = content[: draw.randrange(len(content) + 1)]
            content = bytearray(file.synced) if len(content) < len(file.synced) else content
    return bytes(content)


def judge(state: Path, operations: list[Operation], saved: dict[int, str]) -> tuple[str, int]:
    """What is wrong with the checkpoints of a disk, and the newest step found in them (0 none)."""
    from fitout.train.checkpoint import Checkpoints

    returned = [  # a save has returned when LATEST names it and its folder was synced after that
        int(step) for step, done in saves(operations).items() if done
    ]
    newest, _ = Checkpoints(state / "checkpoints").newest()
    step = int(newest.folder.name.removeprefix("step-")) if newest else 0
    if newest and checkpoint_hash(newest.folder) != saved[step]:
        return f"step {step} verifies with bytes that the run never saved", step
    if step < max(returned, default=0):
        return f"the newest that verifies is step {step}, though the save of step {max(returned)} had returned", step
    return "", step


def saves(operations: list[Operation]) -> dict[str, bool]:
    """For each step whose folder was renamed into place: whether LATEST was replaced and synced after it."""
    done: dict[str, bool] = {}
    newest, pending = "", False
    for op in operations:
        if op.what == "r" and op.to.startswith("checkpoints/step-"):
            newest = op.to.rpartition("step-")[2]
            done[newest] = False
        elif op.what == "r" and op.to == "checkpoints/LATEST":
            pending = True
        elif op.what == "s" and op.path == "checkpoints" and pending:
            done[newest], pending = True, False
    return done


def checkpoint_hash(folder: Path) -> str:
    return " ".join(sha256(file) for file in sorted(folder.iterdir()))


if __name__ == "__main__":
    main()
