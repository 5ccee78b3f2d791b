"""Whatever is fed in, the answer is a row, a reason or a typed error; never another exception, never a lost line."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fitout.chat.types import Conversation, Origin, Pair, Text
from fitout.data import SourceSettings
from fitout.data.clean import control_tokens, strip_end_markers
from fitout.data.dedupe import exact
from fitout.data.formats import FORMATS, Refused, RowError, choose
from fitout.data.lint import check, check_source
from fitout.data.readers import READERS
from fitout.data.sources import BadRow, RawRow, read
from fitout.errors import DataError

QUICK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def failure(path, content=None, **options):
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(read(SourceSettings(path=path.name, **options), path.parent))
    error = caught.value
    assert error.message and error.hint and error.where and error.exit_code == 2
    return error


# --- files as a whole --------------------------------------------------------------------------------------------


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "train.json").write_text("[]")
    error = failure(tmp_path / "trian.json")
    assert "trian.json" in error.message and "train.json" in error.hint


def test_missing_folder_names_what_is_beside_it(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError) as caught:
        list(read(SourceSettings(path="dta/x/a.json"), tmp_path))
    assert "there is no dta" in caught.value.message and "data" in caught.value.hint


def test_something_like_a_hub_id_gets_told(tmp_path):
    with pytest.raises(DataError, match="hf://tatsu-lab/alpaca"):
        list(read(SourceSettings(path="tatsu-lab/alpaca"), tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"a{ending}", b"") for ending in READERS if ending != ".parquet"),
        ("a.json", b"[]"),
        ("a.json", b" \n "),
        ("a.json", b'{"data": []}'),
        ("a.jsonl", b"\n\n"),
        ("a.csv", b"q,a\n"),
        ("a.txt", b" \n"),
        ("a.txt", b"\xef\xbb\xbf"),
        ("a.json.gz", gzip.compress(b"")),
    ],
)
def test_empty_files(tmp_path, name, content):
    assert "empty" in (message := failure(tmp_path / name, content).message) or "no rows" in message


def test_empty_folder_and_unknown_endings(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    assert "no file that can be read" in failure(folder).message
    (folder / "x.docx").write_text("x")
    assert "x.docx" in failure(folder).message
    assert "'.rar'" in failure(tmp_path / "a.json.rar", b"Rar!").message
    assert "not a zip archive" in failure(tmp_path / "a.json.zip", b"PK").message


@pytest.mark.parametrize(
    ("content", "line", "column"),
    [
        ('[{"a": 1},\n{"a": 2}\n{"a": 3}]', 3, 1),
        ('[{"a": 1},\n{"a": }]', 2, 7),
        ('[{"a": 1},\n]', 2, 1),
        ('[\n{"a": 1}\n', 3, 1),
        ('[{"a": 1}]\n]', 2, 1),
        ('{"a": 1,\n"b": [1 2]}', 2, 9),
        ("[" * 100_000, 1, None),
        ('{"a": ' + "[" * 100_000, 1, None),
    ],
)
def test_broken_json_names_line_and_column(tmp_path, content, line, column):
    error = failure(tmp_path / "a.json", content)
    assert error.where == f"a.json:{line}"
    assert f"line {line}, column {column or ''}" in error.message


def test_json_that_is_something_else(tmp_path):
    assert "web page" in failure(tmp_path / "a.json", "<!DOCTYPE html><html>").hint
    assert "git lfs pull" in failure(tmp_path / "a.json", "version https://git-lfs.github.com/spec/v1\noid x").hint
    assert "middle" in failure(tmp_path / "a.json", '[{"a": "cut').message


def test_wrong_encoding_names_byte_line_and_a_guess(tmp_path):
    content = '{"a": "x"}\n' * 30_000 + '{"a": "中文"}\n'
    raw = content.encode("gb18030")
    error = failure(tmp_path / "a.jsonl", raw)
    offset = next(at for at, byte in enumerate(raw) if byte > 127)
    assert f"at offset {offset} " in error.message and error.where == "a.jsonl:30001"
    assert "encoding: gb18030" in error.hint
    error = failure(tmp_path / "a.csv", b"\xef\xbb\xbfq,a\nx,caf\xe9 \n")
    assert "byte 0xe9 at offset 12 is not utf-8" in error.message and error.where == "a.csv:2"
    assert "encoding: cp1252" in error.hint
    assert "encoding: utf-16" in failure(tmp_path / "b.txt", "text".encode("utf-16")).hint
    assert "binary" in failure(tmp_path / "c.json", b"\x89PNG\r\n\x1a\n\0\0\0").hint
    assert "utf-16" in failure(tmp_path / "d.txt", b"abcdef", encoding="utf-16").message


def test_a_character_cut_at_the_end(tmp_path):
    error = failure(tmp_path / "a.txt", "abc\n中".encode()[:-1])
    assert "offset 4" in error.message and error.where == "a.txt:2"


def test_truncated_and_damaged_gzip(tmp_path):
    whole = gzip.compress("".join(json.dumps({"a": str(n) * 50}) + "\n" for n in range(2000)).encode())
    assert "gzip" in failure(tmp_path / "a.jsonl.gz", whole[:-20]).message
    assert "gzip" in failure(tmp_path / "b.jsonl.gz", whole[:100] + b"\0\0\0\0" + whole[104:]).message


def test_truncated_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": ["x"] * 100}), tmp_path / "whole.parquet")
    assert "Parquet" in failure(tmp_path / "cut.parquet", (tmp_path / "whole.parquet").read_bytes()[:-10]).message
    assert "Parquet" in failure(tmp_path / "none.parquet", b"text").message


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    broken = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    rows = list(read(SourceSettings(path="a.parquet"), tmp_path))
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False]
    assert rows[1].origin.line == 2


def test_unclosed_quote_and_double_columns(tmp_path):
    error = failure(tmp_path / "a.csv", 'q,a\n1,2\n3,"open\n4,5\n')
    assert error.where == "a.csv:3" and "never closed" in error.message
    assert "'q' twice" in failure(tmp_path / "b.csv", "q,q\n1,2\n").message


def test_unreadable_file(tmp_path, monkeypatch):
    import builtins

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.json").write_text("[]")
    monkeypatch.setattr(builtins, "open", refuse)
    assert "Permission denied" in failure(tmp_path / "a.json").message


# --- single rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"a": "\\ud83d"}', "surrogate"),
        ('{"\\uDC00": 1}', "surrogate"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "deep"),
        ('{"a": Infinity}', "Infinity"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": "tab\there"}', "Invalid control character"),
    ],
)
def test_rows_that_would_break_later_stages(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' + line + '\n{"a": "\\ud83d\\ude00"}\n')
    rows = list(read(SourceSettings(path="a.jsonl"), tmp_path))
    assert [type(row) for row in rows] == [RawRow, BadRow, RawRow]
    assert reason in rows[1].reason and rows[1].raw == line and rows[1].origin.line == 2
    assert rows[2].row == {"a": "😀"}
    if len(line) < 1000:
        path.write_text('[{"a": 1},\n' + line.replace("\t", "\\t") + "]")
        again = list(read(SourceSettings(path="a.jsonl"), tmp_path))
        assert reason.startswith("Invalid") or isinstance(again[1], BadRow)


# --- anything at all ---------------------------------------------------------------------------------------------

SNIPPETS = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"\n", b"\r", b"\\", b"\\ud800", b"NaN", b"1e999", b"\xff", b"\0"]
SNIPPETS += [b'{"a":1}', b'{"data":[', b"\xef\xbb\xbf", "中".encode(), b"\x1f\x8b", b"PAR1", b"a,b\n", b'"x"y', b"\x80"]
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(SNIPPETS), max_size=30).map(b"".join),
    st.lists(st.sampled_from(SNIPPETS), max_size=20).map(b"".join).map(gzip.compress),
)


@pytest.mark.parametrize("ending", READERS)
@QUICK
@given(content=BYTES, encoding=st.sampled_from(["utf-8", "utf-16", "gb18030", "cp1252", "ascii", "utf-32-le", "big5"]))
def test_any_bytes_give_rows_or_a_data_error(ending, content, encoding):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{ending}"
        path.write_bytes(content)
        source = SourceSettings(path=path.name, encoding=encoding)
        try:
            rows = list(read(source, Path(folder)))
        except DataError as error:
            assert error.where.startswith(path.name)
        else:
            assert rows
            for row in rows:
                json.dumps(row.row if isinstance(row, RawRow) else row.raw, ensure_ascii=False).encode()
        check_source(source, Path(folder))


@QUICK
@given(
    st.lists(st.one_of(st.binary(max_size=30).filter(lambda raw: b"\n" not in raw), st.just(b'{"a": 1}')), max_size=20)
)
def test_no_line_is_lost(lines):
    """Every filled line of a JSON lines file comes back, as a row or as itself."""
    lines = [line for line in lines if line.decode("utf-8", "replace").encode() == line]
    content = b'{"a": 0}\n{"a": 0}\n' + b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.jsonl").write_bytes(content)
        rows = list(read(SourceSettings(path="a.jsonl"), Path(folder)))
    filled = [line.decode().strip(" \t\r\ufeff") for line in content.split(b"\n")]
    assert len(rows) == sum(line != "" for line in filled)
    for row in rows:
        line = filled[row.origin.line - 1]
        assert json.loads(line) == row.row if isinstance(row, RawRow) else row.raw == line


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5))
KEYS = ["role", "content", "from", "value", "tool_calls", "function_call", "train", "weight", "type", "text", "name"]
KEYS += ["function", "arguments", "reasoning_content", "id", "replies", "rank", "result", "from_name", "choices"]
KEYS += ["labels", "start", "end", "taxonomy", "selected", "ranker", "completed_by", "author", "solution", "is_correct"]
WORDS = [
    "user",
    "assistant",
    "system",
    "tool",
    "human",
    "gpt",
    "function_call",
    "observation",
    "text",
    "x",
    "",
    "{}",
    "[]",
]
LEAVES = st.one_of(SCALARS, st.sampled_from(WORDS), st.just('{"name": "f", "arguments": {}}'))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
COLUMNS = ["instruction", "input", "output", "history", "instances", "system", "tools", "messages", "conversations"]
COLUMNS += ["prompt", "completion", "chosen", "rejected", "text", "label", "question", "answer", "images", "functions"]
COLUMNS += ["data", "annotations", "annotation_id", "annotator", "lead_time", "id", "entities", "relations", "cats"]
COLUMNS += ["train", "ground_truth", "model", "filename", "goal"]
ROWS = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=6)


@settings(deadline=None, max_examples=600)
@given(row=ROWS)
def test_any_row_gives_samples_or_a_reason(row):
    origin = Origin("f", 1)
    for plug in FORMATS:
        plug.matches(row)
        try:
            samples = plug.convert(row, origin)
        except RowError as error:
            assert error.reason
            continue
        assert samples
        assert all(part.reason for part in samples if isinstance(part, Refused))
        samples = [sample for sample in samples if not isinstance(sample, Refused)]
        for sample in samples:
            sound(sample)
            strip_end_markers(sample)
            control_tokens(sample, ("<s>",))
        exact(samples)


def sound(sample):
    """What the rest of the house relies on."""
    if isinstance(sample, Text):
        assert sample.text.strip()
        return
    messages = sample.messages if isinstance(sample, Conversation) else (*sample.prompt, sample.chosen)
    assert messages[-1].role == "assistant"
    assert all(message.role in ("system", "user", "assistant", "tool") for message in messages)
    assert all(isinstance(message.content, str) for message in messages)
    assert all(message.role != "system" or at == 0 for at, message in enumerate(messages))
    assert all(message.content.strip() for message in messages if message.role == "user")
    assert all(
        message.content.strip() or message.extra.get("tool_calls")
        for message in messages
        if message.role == "assistant"
    )
    if isinstance(sample, Pair):
        assert sample.chosen != sample.rejected
    else:
        assert any(message.train for message in messages if message.role == "assistant")


@settings(deadline=None, max_examples=200)
@given(
    rows=st.lists(ROWS, max_size=6),
    columns=st.none() | st.dictionaries(st.sampled_from(COLUMNS), st.sampled_from(COLUMNS)),
)
def test_any_rows_are_detected_or_refused_with_keys(rows, columns):
    try:
        assert choose(rows, columns=columns) in FORMATS
    except DataError as error:
        assert error.hint
    check([RawRow(row, Origin("f", line)) for line, row in enumerate(rows, 1)], columns=columns)
