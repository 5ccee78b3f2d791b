"""Spoiled files through every importer, as many as the time allows.

    python -m tests.data.fuzz --seconds 600 [--seed N]      our own changes to samples of every form
    python -m tests.data.fuzz --atheris -max_total_time=600  guided by coverage (needs `pip install atheris`)

Each file goes the way of `fitout data prepare`: read, format detected, every row converted, repairs suggested and
tried, samples written and read back, cleaned. Whatever it holds, the end is samples, refusals with reasons, or a
DataError that names the file; never another error, never more than a second of processor time for a few kilobytes. A
file that breaks this is kept in build/fuzz with what came of it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import random
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parents[2] / "build" / "fuzz"
SECONDS = 1.0  # of processor time for one file

ROWS: list[Any] = [
    {"instruction": "Say it.", "input": "loud", "output": "IT", "history": [["a", "b"]], "system": "Be kind."},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "s", "tools": "[]"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": "a", "weight": 1}], "tools": [{"type": "function"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": None,
                  "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
                  {"role": "tool", "name": "f", "content": "7"}, {"role": "assistant", "content": "seven"}]},
    {"prompt": "q", "completion": "a"},
    {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}],
     "rejected": [{"role": "assistant", "content": "b"}]},
    {"question": "q", "answer": "a", "rating": 4.5, "task": "reasoning / maths"},
    {"text": "Once upon a time.\n", "meta": {"source": "x"}},
    {"id": 1, "data": {"text": "q"}, "annotations": [{"id": 2, "completed_by": 3, "was_cancelled": False,
     "result": [{"from_name": "answer", "to_name": "text", "type": "textarea", "value": {"text": ["a"]}},
                {"from_name": "label", "to_name": "text", "type": "choices", "value": {"choices": ["x"]}},
                {"from_name": "ner", "to_name": "text", "type": "labels",
                 "value": {"start": 0, "end": 1, "text": "q", "labels": ["P"]}}]}], "predictions": []},
    {"id": 1, "text": "q", "label": [[0, 1, "P"]], "Comments": [], "entities": [{"id": 1, "label": "P",
     "start_offset": 0, "end_offset": 1}], "relations": []},
    {"message_tree_id": "m", "prompt": {"message_id": "m", "role": "prompter", "text": "q", "lang": "en", "replies": [
        {"message_id": "n", "role": "assistant", "text": "a", "rank": 0, "replies": []},
        {"message_id": "o", "role": "assistant", "text": "b", "rank": 1, "replies": []}]}},
    {"seed_task_id": "s", "name": "n", "instruction": "i", "instances": [{"input": "", "output": "o"},
                                                                        {"input": "x", "output": "p"}]},
]  # fmt: skip
ODD: list[Any] = [
    None, True, 0, -1, 2**63, 1e308, float("nan"), float("inf"), "", " ", "\x00", "\ud800", "\ufeff", "ﷺ" * 40, "[]",
    "{}", "null", "<|im_end|>", "assistant", "{{ 7 * 7 }}", [], {}, [[]], [None], {"": ""}, {"role": "user"},
    {"content": {"text": "x"}}, ["a", ["b", ["c"]]], "../../etc/passwd", "9" * 400,
]  # fmt: skip
BITS = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xc3", b"\xed\xa0\x80", b'"', b"'", b"\\", b"\\u12", b"\\ud800", b"{",
    b"}", b"[", b"]", b"[[[[[[[[", b",", b":", b"NaN", b"-Infinity", b"1e999", b"\r", b"\n", b"\r\n", b"\t", b"\x0b",
    b"null", b'{"a":1,"a":2}', b"\xe2\x80\xa8", b"=cmd|' /C'!A0", b"#", b"//", b"PK\x03\x04", b"\x1f\x8b", b"PAR1",
]  # fmt: skip


def written(rows: list[Any], ending: str) -> bytes:
    """The rows in one of the forms that are read."""
    if ending.endswith(".gz"):
        return gzip.compress(written(rows, ending.removesuffix(".gz")))
    if ending == ".zip":
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a/rows.jsonl", written(rows, ".jsonl"))
            archive.writestr("rows.csv", written(rows, ".csv"))
        return file.getvalue()
    if ending == ".json":
        return json.dumps(rows).encode()
    if ending in (".csv", ".tsv"):
        import csv

        columns = sorted({key for row in rows if isinstance(row, dict) for key in row})
        text = io.StringIO()
        sheet = csv.writer(text, delimiter="\t" if ending == ".tsv" else ",")
        sheet.writerow(columns)
        for row in rows:
            cells = [row.get(key) for key in columns] if isinstance(row, dict) else [row]
            sheet.writerow([one if isinstance(one, str) else json.dumps(one) for one in cells])
        return text.getvalue().encode("utf-8", "surrogatepass")
    if ending == ".parquet":
        import pyarrow
        import pyarrow.parquet

        file = io.BytesIO()
        texts = [json.dumps(row) for row in rows]
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "n": list(range(len(texts)))}), file)
        return file.getvalue()
    if ending == ".txt":
        return "\n\n".join(json.dumps(row) for row in rows).encode()
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz", ".zip")


def spoiled_value(value: Any, rng: random.Random) -> Any:
    """A copy with one or a few places changed: another value, a place lost, doubled or moved up."""
    roll = rng.random()
    if roll < 0.12:
        return rng.choice(ODD)
    if isinstance(value, dict) and value:
        keys = list(value)
        key = rng.choice(keys)
        if roll < 0.2:
            return {k: v for k, v in value.items() if k != key}
        if roll < 0.26:
            return {**value, rng.choice([*keys, "role", "content", "text", ""]): rng.choice(ODD)}
        return {**value, key: spoiled_value(value[key], rng)}
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        if roll < 0.2:
            return value[:at] + value[at + 1 :]
        if roll < 0.28:
            return value[: at + 1] * rng.choice((2, 3, 40))
        return [*value[:at], spoiled_value(value[at], rng), *value[at + 1 :]]
    return rng.choice([*ODD, [value], {"x": value}, str(value) * 3])


def spoiled_bytes(data: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        to = min(to, at + rng.choice((1, 4, 64)))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:at] + rng.choice(BITS) + data[at:]
        elif kind == 1:
            data = data[:at] + data[to:]
        elif kind == 2:
            data = data[:at] + data[at:to] * rng.choice((2, 9)) + data[to:]
        elif kind == 3 and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        else:
            data = data[: max(1, at)]
    return data


def files(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """(ending, content) without end."""
    while True:
        rows = [rng.choice(ROWS) for _ in range(rng.choice((1, 2, 5)))]
        if rng.random() < 0.6:
            rows = [spoiled_value(row, rng) if rng.random() < 0.7 else row for row in rows]
        ending = rng.choice(ENDINGS)
        data = written(rows, ending)
        yield ending, spoiled_bytes(data, rng) if rng.random() < 0.6 else data


def went(path: Path) -> str:
    """What came of a file, in a word. Raises what should never be raised."""
    from fitout.data import CleanSettings, SourceSettings
    from fitout.data.clean import Cleaner
    from fitout.data.formats import Refused, choose, convert
    from fitout.data.repair import readmitted, suggest
    from fitout.data.rows import as_row, from_row
    from fitout.data.sources import RawRow, probe, read
    from fitout.errors import DataError

    source, cleaner = SourceSettings(path=path.name), Cleaner(CleanSettings(), ("<|im_end|>",))
    said: Counter[str] = Counter()
    try:
        plug = choose(probe(source, path.parent), where=path.name)
        for row in read(source, path.parent):
            if not isinstance(row, RawRow):
                assert row.reason and row.origin.line >= 0
                suggest(row.raw, row.origin, plug, None)
                said["bad row"] += 1
                continue
            for sample in convert(plug, row):
                if isinstance(sample, Refused):
                    assert sample.reason
                    repair = suggest(sample.raw, sample.origin, plug, None)
                    if repair:
                        list(readmitted({"row": repair.row, "as": "row"}, sample.origin, plug, None))
                    said["refused"] += 1
                    continue
                assert from_row(json.loads(json.dumps(as_row(sample)))) == sample
                cleaner.clean(sample)
                said["sample"] += 1
    except DataError as error:
        assert error.message and error.where.startswith(path.name), (error.message, error.where)
        said["data error"] += 1
    return "+".join(sorted(said)) or "nothing"


def tried(ending: str, data: bytes, folder: Path) -> str:
    path = folder / f"case{ending}"
    path.write_bytes(data)
    began = time.process_time()
    came = went(path)
    took = time.process_time() - began
    assert took < SECONDS, f"{took:.1f} s of processor time for {len(data)} bytes"
    return came


def keep(ending: str, data: bytes) -> Path:
    KEPT.mkdir(parents=True, exist_ok=True)
    path = KEPT / f"{hashlib.sha256(data).hexdigest()[:12]}{ending}"
    path.write_bytes(data)
    path.with_name(path.name + ".error").write_text(traceback.format_exc())
    return path


def run(seconds: float, seed: int, most: int = sys.maxsize) -> tuple[Counter[str], list[Path]]:
    """What came of the files, and those that broke something."""
    outcomes: Counter[str] = Counter()
    broken: list[Path] = []
    until = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as name:
        for number, (ending, data) in enumerate(files(random.Random(seed))):
            if time.monotonic() > until or number >= most:
                break
            try:
                outcomes[tried(ending, data, Path(name))] += 1
            except Exception:
                outcomes["BROKEN"] += 1
                broken.append(keep(ending, data))
    return outcomes, broken


def guided(arguments: list[str]) -> None:
    """The same under atheris: the first byte chooses the ending."""
    import atheris

    with atheris.instrument_imports(include=["fitout.data"]):
        import fitout.data.clean
        import fitout.data.formats
        import fitout.data.readers
        import fitout.data.repair
        import fitout.data.sources  # noqa: F401
    folder = tempfile.TemporaryDirectory()
    corpus = Path(folder.name) / "corpus"
    corpus.mkdir()
    for at, ending in enumerate(ENDINGS):
        for number, row in enumerate(ROWS):
            (corpus / f"{at}-{number}").write_bytes(bytes([at]) + written([row], ending))

    def one(data: bytes) -> None:
        ending = ENDINGS[data[0] % len(ENDINGS)] if data else ".jsonl"
        try:
            tried(ending, data[1:], Path(folder.name))
        except Exception:
            print(f"kept: {keep(ending, data[1:])}")
            raise

    KEPT.mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], f"-artifact_prefix={KEPT}/", *arguments, str(corpus)], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true")
    asked, rest = parser.parse_known_args()
    if asked.atheris:
        guided(rest)
        return 0
    outcomes, broken = run(asked.seconds, asked.seed)
    for outcome, count in outcomes.most_common():
        print(f"{count:8,} {outcome}")
    for path in broken[:20]:
        print(f"{path}: {path.with_name(path.name + '.error').read_text().strip().splitlines()[-1][:160]}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
