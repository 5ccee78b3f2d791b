"""Files made to break an importer, each read in a process of its own: what came of it, memory, processor time.

    python -m tests.data.hostile [CASE...]

Every one must end in rows, bad rows or a DataError that names file and line, below 1 GB and 60 s of processor time.
"""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

MB = 1 << 20
LIMIT_MB, LIMIT_SECONDS = 1000, 60


Part = tuple[bytes, int]  # a block and how many times it is written


def raw(*parts: Part | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with open(path, "wb") as file:
            for part in parts:
                block, times = part if isinstance(part, tuple) else (part, 1)
                at_once = max(1, MB // max(1, len(block)))
                for _ in range(times // at_once):
                    file.write(block * at_once)
                file.write(block * (times % at_once))

    return write


def lines(*parts: Part | bytes) -> Callable[[Path], None]:
    """Between two good lines."""
    return raw(b'{"question": "q", "answer": "a"}\n', *parts, b'\n{"question": "q2", "answer": "a"}\n')


def counted(head: bytes, form: bytes, count: int, tail: bytes) -> Callable[[Path], None]:
    """`form` with a number in it, `count` times."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(head)
            for number in range(count):
                file.write(form % number)
            file.write(tail)

    return write


def gzip_bomb(head: bytes, unit: bytes, megabytes: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        block = unit * (MB // len(unit))
        with gzip.open(path, "wb", compresslevel=6) as file:
            file.write(head)
            for _ in range(megabytes):
                file.write(block)

    return write


def zip_bomb(ending: str, megabytes: int, members: int = 1) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        block = b" x" * (MB // 2)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for number in range(members):
                with archive.open(f"{number}{ending}", "w") as file:
                    for _ in range(megabytes):
                        file.write(block)

    return write


def nested_bomb(path: Path) -> None:
    """gzip in gzip in zip: a member that is itself packed."""
    inner = gzip.compress(b" " * (100 * MB))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jsonl.gz", inner)


def shared_bytes(path: Path) -> None:
    """Many members over the same bytes (Fifield's bomb)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.jsonl", b'{"text": "' + b"a" * (8 * MB) + b'"}\n')
    content = path.read_bytes()
    start = content.rindex(b"PK\x01\x02")
    entry = content[start : content.rindex(b"PK\x05\x06")]
    many = 60_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, many, many, many * len(entry), start, 0)
    path.write_bytes(content[:start] + entry * many + end)


def parquet_dictionary(nested: bool, value: int, rows: int) -> Callable[[Path], None]:
    """One large value in a dictionary, repeated by a few bits a row."""

    def write(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        text = random.Random(0).randbytes(value // 2).hex() if value <= 16 * MB else "x" * value
        column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text]))
        if nested:
            offsets = pyarrow.array(range(rows + 1), pyarrow.int32())
            column = pyarrow.ListArray.from_arrays(offsets, pyarrow.StructArray.from_arrays([column], ["content"]))
        table = pyarrow.table({"messages": column})
        pyarrow.parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)

    return write


CASES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "row of 50 MB": (".jsonl", lines(b'{"text": "', (b"x", 50 * MB), b'"}')),
    "row of 12 MB": (".jsonl", lines(b'{"text": "', (b"x", 12 * MB), b'"}')),
    "row of 15 M emoji": (".jsonl", lines(b'{"text": "', ("🎉".encode(), 15_000_000), b'"}')),
    "row of 15 MB of {}": (".jsonl", lines(b'{"a": [', (b"{},", 5_000_000), b"1]}")),
    "row of 15 MB of 1,": (".jsonl", lines(b'{"a": [', (b"1,", 7_500_000), b"1]}")),
    "row of a million keys": (".jsonl", counted(b'{"a": 1}\n{', b'"%d":1,', 1_000_000, b'"z":1}\n{"a":1}\n')),
    "100 rows of 15 MB": (".jsonl", raw(*[b'{"text": "', (b"x", 15 * MB), b'"}\n'] * 100)),
    "100 rows of a million numbers": (".jsonl", raw(*[b'{"a": [', (b"1.5,", 1_000_000), b"1]}\n"] * 100)),
    "first row of 50 MB": (".json", raw(b'{"text": "', (b"x", 50 * MB), b'"}\n{"text": "y"}\n')),
    "one row of 50 MB alone": (".json", raw(b'{"text": "', (b"x", 50 * MB), b'"}')),
    "list with a row of 50 MB": (".json", raw(b'[{"text": "y"},\n{"text": "', (b"x", 50 * MB), b'"}]')),
    "list of 3 million {}": (".json", raw(b"[", (b"{},", 3_000_000), b"{}]")),
    "map of a million members": (".json", counted(b"{", b'"%d": {"a": [1]},\n', 1_000_000, b'"z": {}}')),
    "1e5 brackets": (".jsonl", lines(b'{"a": ', (b"[", 100_000), (b"]", 100_000), b"}")),
    "1e7 brackets": (".json", raw((b"[", 10_000_000))),
    "1e7 keys deep": (".json", raw((b'{"a":', 10_000_000))),
    "no line end, 200 MB": (".jsonl", raw((b"x", 200 * MB))),
    "200 MB of blanks": (".jsonl", raw((b" ", 200 * MB))),
    "200 MB of NUL": (".jsonl", raw((b"\0", 200 * MB))),
    "escapes": (".jsonl", lines(b'{"text": "', (b"\\ud83d", 2_000_000), b'"}')),
    "50 bad lines of 15 MB": (".jsonl", lines(*[(b"x", 15 * MB), b"\n"] * 50)),
    "quote never closed": (".csv", raw(b'question,answer\n"', (b"x,y\n", 25_000_000))),
    "csv line of 200 MB": (".csv", raw(b"question,answer\n", (b"x", 200 * MB))),
    "csv of ten million columns": (".csv", raw((b"a,", 10_000_000), b"\n")),
    "text of 200 MB": (".txt", raw((b"once upon a time\n", 12_000_000))),
    "text without line ends": (".txt", raw((b"x", 200 * MB))),
    "gzip bomb, one line": (".jsonl.gz", gzip_bomb(b'{"text": "', b"x", 2000)),
    "gzip bomb, blanks": (".json.gz", gzip_bomb(b"", b" ", 2000)),
    "gzip bomb, rows": (".jsonl.gz", gzip_bomb(b"", b'{"text": "' + b"x" * 1000 + b'"}\n', 2000)),
    "gzip bomb, csv": (".csv.gz", gzip_bomb(b"a,b\n", b"1," + b"2" * 1000 + b"\n", 2000)),
    "gzip bomb, text": (".txt.gz", gzip_bomb(b"", b"a\n", 2000)),
    "zip bomb": (".zip", zip_bomb(".jsonl", 2000)),
    "zip bomb, many members": (".zip", zip_bomb(".txt", 60, 100)),
    "zip bomb, nested": (".zip", nested_bomb),
    "zip members that share bytes": (".zip", shared_bytes),
    "parquet: 50 MB repeated": (".parquet", parquet_dictionary(False, 50 * MB, 100_000)),
    "parquet: 50 MB repeated, nested": (".parquet", parquet_dictionary(True, 50 * MB, 100_000)),
    "parquet: 10 MB of noise repeated": (".parquet", parquet_dictionary(True, 10 * MB, 100_000)),
}


def run(name: str) -> dict:
    """One case in a process of its own: {outcome, megabytes, seconds}."""
    ending, write = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"case{ending}"
        write(path)
        command = [sys.executable, "-m", "tests.data.hostile", "--read", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS * 30)
    if done.returncode:
        return {"outcome": f"exit {done.returncode}: {done.stderr[-500:]}", "megabytes": -1, "seconds": 0}
    return json.loads(done.stdout)


def read_one(path: Path) -> None:
    """Reads and converts every row, as preparing does, keeping none; prints what came of it."""
    from fitout.data import SourceSettings
    from fitout.data.formats import Refused, choose, convert
    from fitout.data.sources import RawRow, probe, read
    from fitout.errors import DataError

    source = SourceSettings(path=path.name)
    samples = rejected = 0
    outcome = ""
    try:
        try:
            plug = choose(probe(source, path.parent))
        except DataError as error:
            if "not recognised" not in error.message:
                raise
            plug = choose([], "text")
        for row in read(source, path.parent):
            for part in convert(plug, row) if isinstance(row, RawRow) else [Refused(row.origin, row.reason, "")]:
                rejected += isinstance(part, Refused)
                samples += not isinstance(part, Refused)
    except DataError as error:
        assert error.where.startswith(path.name), error.where
        outcome = f"; {error.where[:60]}: {error.message[:120]}"
    outcome = f"{samples} samples, {rejected} refused{outcome}"
    print(json.dumps({"outcome": outcome, "megabytes": peak_mb(), "seconds": round(time.process_time(), 1)}))


def peak_mb() -> int:
    """This program's own peak. `ru_maxrss` would hold that of the process it was started by, which made the file."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) >> 10


def main(names: list[str]) -> int:
    if names[:1] == ["--read"]:
        read_one(Path(names[1]))
        return 0
    bad = 0
    for name in names or CASES:
        found = run(name)
        fine = 0 < found["megabytes"] < LIMIT_MB and found["seconds"] < LIMIT_SECONDS
        bad += not fine
        verdict = "ok " if fine else "BAD"
        print(f"{verdict} {found['megabytes']:5} MB {found['seconds']:6.1f} s  {name}: {found['outcome']}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
