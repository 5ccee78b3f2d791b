"""Files written by csv, json, gzip and pyarrow are read back row by row, each with the line it began on."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import sys
import types

import pytest
from pydantic import ValidationError

from fitout.data import DataSettings, SourceSettings, SplitSettings, sources
from fitout.data.readers import weight
from fitout.data.sources import BadRow, RawRow, list_files, named, probe, read
from fitout.errors import DataError

ROWS = [
    {"instruction": "Say hi", "output": "hi"},
    {"instruction": "中文\nzwei Zeilen", "output": 'with "quotes", commas; and\ttabs'},
    {"instruction": "line\u2028separator \x85 and emoji 🎉", "output": " kept blanks "},
]


def rows_of(path, **settings):
    return list(read(SourceSettings(path=str(path), **settings), path.parent))


def good(path, **settings):
    rows = rows_of(path, **settings)
    assert all(isinstance(row, RawRow) for row in rows), rows
    return [row.row for row in rows]


def lines(path, **settings):
    return [row.origin.line for row in rows_of(path, **settings)]


JSON_FORMS = {
    "list.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "lines.json": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "crlf.jsonl": "\r\n".join(json.dumps(row) for row in ROWS),
    "blank.ndjson": "\n\n" + "\n\n".join(json.dumps(row) for row in ROWS) + "\n\n",
    "data.json": json.dumps({"version": 1, "data": ROWS}),
    "data_pretty.json": json.dumps({"data": ROWS}, indent=1),
    "list.jsonl": json.dumps(ROWS),
    "pretty_one_after_another.jsonl": "\n".join(json.dumps(row, indent=4) for row in ROWS),
    "row_a_line.json": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "UPPER.JSON": json.dumps(ROWS),
}


@pytest.mark.parametrize("name", JSON_FORMS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_json_forms(tmp_path, name, packed, mark):
    path = tmp_path / (name + ".gz" if packed else name)
    content = (mark + JSON_FORMS[name]).encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    assert good(path) == ROWS


def test_gzip_is_known_by_content_not_name(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(gzip.compress(JSON_FORMS["lines.jsonl"].encode()))
    assert good(path) == ROWS


def test_json_line_numbers_are_lines_of_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\n\n\n{"a": 2}\n')
    assert lines(path) == [2, 5]
    path = tmp_path / "a.json"
    path.write_text('[\n\n {"a": 1}, {"a": 2},\n {"a":\n 3},\n{"a": 4}]')
    text = path.read_text().split("\n")
    assert lines(path) == [3, 3, 4, 6]
    assert all("{" in text[line - 1] for line in lines(path))
    path = tmp_path / "two.json"
    path.write_text('{\n"a": 1}\n{"a":\n2}')
    assert lines(path) == [1, 3]


def test_broken_lines_are_told_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": \n[1]\n"text"\n{"a": 2} {"a": 3}\n{"a": 1, "a": 2}\n{"a": NaN}\n{"a": 4}\n')
    rows = rows_of(path)
    assert [type(row) for row in rows] == [RawRow, BadRow, BadRow, BadRow, BadRow, BadRow, BadRow, RawRow]
    assert [row.origin.line for row in rows] == list(range(1, 9))
    reasons = [row.reason for row in rows if isinstance(row, BadRow)]
    for reason, part in zip(
        reasons, ["not JSON", "a list", "text", "column 10", "'a' appears twice", "NaN"], strict=True
    ):
        assert part in reason
    assert rows[1].raw == '{"a":'


def test_a_broken_first_line_does_not_hide_the_rest(tmp_path):
    for name in ("a.jsonl", "a.json"):
        path = tmp_path / name
        path.write_text('{"a": "cut\n{"a": 1}\n{"a": 2}\n')
        rows = rows_of(path)
        assert isinstance(rows[0], BadRow)
        assert [row.row for row in rows[1:]] == [{"a": 1}, {"a": 2}]


def test_single_faults_in_a_list_are_bad_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1},\n{"a": 1, "a": 2},\n7,\n{"a": 1e999},\n{"a": 2}]')
    rows = rows_of(path)
    assert [isinstance(row, RawRow) for row in rows] == [True, False, False, False, True]
    assert [row.origin.line for row in rows] == [1, 2, 3, 4, 5]
    assert rows[1].raw == '{"a": 1, "a": 2}'


def test_an_object_alone_is_one_row(tmp_path):
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"messages": []}))
    assert good(path) == [{"messages": []}]


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_as_the_csv_module_writes_it(tmp_path, sign, end):
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, ["instruction", "output"], delimiter=sign, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + buffer.getvalue().encode())
    assert good(path) == ROWS
    packed = tmp_path / "rows.tsv.gz"
    packed.write_bytes(gzip.compress(buffer.getvalue().encode()))
    assert good(packed) == ROWS


def test_csv_line_numbers_and_bad_records(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('q,a\n\n1,"two\nlines"\n1,2,3\n"x"y,2\n3\n4,5\n')
    rows = rows_of(path)
    assert [row.origin.line for row in rows] == [3, 5, 6, 7, 8]
    assert [isinstance(row, RawRow) for row in rows] == [True, False, False, False, True]
    assert rows[1].reason == "3 cells where the header has 2" and rows[1].raw == "1,2,3"
    assert rows[2].raw == '"x"y,2'
    assert rows[4].row == {"q": "4", "a": "5"}


def test_csv_cells_may_be_long(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("q,a\n" + "x" * 300_000 + ",y\n")
    assert len(good(path)[0]["q"]) == 300_000


def test_csv_index_column_gets_a_name(tmp_path):
    path = tmp_path / "index.csv"
    path.write_text(",q,a\n0,x,y\n")
    assert good(path) == [{"column_1": "0", "q": "x", "a": "y"}]


def test_parquet_as_pyarrow_writes_it(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    many = [{**ROWS[number % 3], "messages": [{"role": "user", "content": str(number)}]} for number in range(2500)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(many), path, row_group_size=700)
    rows = rows_of(path)
    assert [row.row for row in rows] == many
    assert [row.origin.line for row in rows] == list(range(1, 2501))
    packed = tmp_path / "rows.parquet.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert good(packed, limit=3) == many[:3]


def test_parquet_values_become_what_json_has(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    day = datetime.datetime(2020, 1, 2, 3, 4, 5)
    table = pa.table(
        {
            "when": [day],
            "price": [decimal.Decimal("1.50")],
            "missing": [float("nan")],
            "text": pa.array(["é".encode()], pa.binary()),
            "image": pa.array([b"\xff\xd8"], pa.binary()),
            "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
        }
    )
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    (row,) = good(path)
    json.dumps(row, allow_nan=False)
    assert row["when"] == day.isoformat() and row["price"] == "1.50" and row["missing"] is None
    assert row["text"] == "é" and row["image"] == "<2 bytes>" and row["map"] == [["k", 1]]


def test_text_is_one_row_a_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes("Chapter 1\r\n\r\n你好\n".encode("gb18030"))
    assert good(path, encoding="gb18030") == [{"text": "Chapter 1\r\n\r\n你好\n"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "gb18030", "utf-8"])
def test_encodings(tmp_path, encoding):
    content = "".join(json.dumps({"a": "中文 " * 10_000 + str(n)}, ensure_ascii=False) + "\n" for n in range(3))
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode(encoding))
    assert [row["a"][-1] for row in good(path, encoding=encoding)] == ["0", "1", "2"]


def test_folder_is_read_in_order_and_says_what_it_passes_over(tmp_path):
    (tmp_path / "set" / "b").mkdir(parents=True)
    (tmp_path / "set" / ".git").mkdir()
    (tmp_path / "set" / ".git" / "x.json").write_text("[]")
    (tmp_path / "set" / "z.jsonl").write_text('{"n": 3}\n')
    (tmp_path / "set" / "a.json").write_text('[{"n": 1}]')
    (tmp_path / "set" / "b" / "c.csv").write_text("n\n2\n")
    (tmp_path / "set" / "README.md").write_text("#")
    (tmp_path / "set" / "empty.jsonl").write_text("")
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    source = SourceSettings(path="set")
    rows = list(read(source, tmp_path))
    assert [str(row.origin) for row in rows] == ["set/a.json:1", "set/b/c.csv:2", "set/z.jsonl:1"]
    assert list_files(source, tmp_path).skipped == [
        ("set/.git", "a hidden folder"),
        ("set/README.md", "an unknown ending"),
        ("set/empty.jsonl", "empty"),
        ("set/loop", "a link to a folder"),
    ]
    assert [row["n"] for row in probe(source, tmp_path)] == [1, "2", 3]
    assert len(list(read(SourceSettings(path="set", limit=2), tmp_path))) == 2


def test_json_lines_are_streamed(tmp_path):
    path = tmp_path / "big.jsonl"
    with gzip.open(path, "wt") as file:
        for number in range(200_000):
            file.write(json.dumps({"n": number, "pad": "x" * 500}) + "\n")
    import tracemalloc

    tracemalloc.start()
    rows = read(SourceSettings(path=str(path), limit=20_000), tmp_path)
    assert sum(row.row["n"] for row in rows) == sum(range(20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_reading_less_closes_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n' * 10)
    rows = read(SourceSettings(path=str(path)), tmp_path)
    next(rows)
    rows.close()


# --- hubs --------------------------------------------------------------------------------------------------------


def test_hub_ids_go_to_the_hub_library(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"question": "q", "answer": "a", "day": datetime.date(2020, 1, 1)}] * 3)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    rows = list(read(SourceSettings(path="hf://openai/gsm8k/main:test", limit=2), None))
    assert asked == [("openai/gsm8k", "main", "test", True)]
    assert [str(row.origin) for row in rows] == ["hf://openai/gsm8k/main:test:1", "hf://openai/gsm8k/main:test:2"]
    assert rows[0].row == {"question": "q", "answer": "a", "day": "2020-01-01"}
    list(read(SourceSettings(path="hf://owner/name"), None))
    assert asked[-1] == ("owner/name", None, "train", True)
    assert len(probe(SourceSettings(path="hf://owner/name"), None)) == 3


def test_modelscope_ids(monkeypatch):
    class MsDataset:
        @staticmethod
        def load(name, subset_name, split):
            return [{"name": name, "subset": subset_name, "split": split}]

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", types.SimpleNamespace(MsDataset=MsDataset))
    (row,) = read(SourceSettings(path="ms://owner/name:validation"), None)
    assert row.row == {"name": "owner/name", "subset": None, "split": "validation"}


EXTRAS = {"datasets": "hub", "modelscope": "modelscope"}


@pytest.mark.parametrize(("path", "package"), [("hf://a/b", "datasets"), ("ms://a/b", "modelscope")])
def test_a_missing_hub_library_is_named(monkeypatch, path, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError) as caught:
        list(read(SourceSettings(path=path), None))
    assert package in caught.value.message and f"pip install 'fitout[{EXTRAS[package]}]'" in caught.value.hint


def test_what_a_hub_library_lacks_is_named(monkeypatch):
    """modelscope installs without what its data sets need."""
    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "modelscope.msdatasets", None)
    with pytest.raises(DataError) as caught:
        list(read(SourceSettings(path="ms://a/b"), None))
    assert "modelscope" in caught.value.message and "fitout[modelscope]" in caught.value.hint


def test_sources_named_on_a_command_line():
    assert named("hf://owner/name:test").path == "hf://owner/name:test"
    for path, format, says in (("hf://owner", None, "hf://owner/name"), ("a.json", "alpacca", "did you mean 'alpaca'")):
        with pytest.raises(DataError, match=says):
            named(path, format)


def test_hub_errors_are_ours(monkeypatch):
    def load_dataset(*_, **__):
        yield {"a": 1}
        raise ConnectionError("no route\nlong traceback")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as caught:
        list(read(SourceSettings(path="hf://a/b"), None))
    assert caught.value.message == "the hub gave no data after row 1: no route"
    assert "HF_ENDPOINT" in caught.value.hint


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": ""}, "at least 1"),
        ({"path": "a\0b"}, "NUL"),
        ({"path": "hf://only"}, "hf://owner/name"),
        ({"path": "a", "format": "alpacca"}, "did you mean 'alpaca'"),
        ({"path": "a", "encoding": "utf-9"}, "unknown text encoding"),
        ({"path": "a", "encoding": "hex"}, "unknown text encoding"),
        ({"path": "a", "encoding": "unicode_escape"}, "escape"),
        ({"path": "a", "weight": 0}, "greater than 0"),
        ({"path": "a", "weight": float("inf")}, "less than or equal to 1000"),
        ({"path": "a", "weight": 2, "split": "test"}, "no effect"),
        ({"path": "a", "limit": 0}, "greater than or equal to 1"),
        ({"path": "a", "typo": 1}, "Extra inputs"),
    ],
)
def test_source_settings_refuse(settings, says):
    with pytest.raises(ValidationError, match=says):
        SourceSettings(**settings)


def test_split_and_data_settings_refuse():
    with pytest.raises(ValidationError, match=r"is 1\.1, it must be 1"):
        SplitSettings(train=0.9)
    with pytest.raises(ValidationError):
        SplitSettings(train=1.2, validation=-0.1, test=-0.1)
    with pytest.raises(ValidationError):
        DataSettings(sources=[])
    with pytest.raises(ValidationError, match="twice"):
        DataSettings(sources=[{"path": "a"}, {"path": "a"}])
    with pytest.raises(ValidationError):
        DataSettings(sources=[{"path": "a"}], max_length=4)
    assert SplitSettings(train=0.7, validation=0.2, test=0.1)


def test_a_format_is_told_by_few_rows_where_they_are_large(tmp_path, monkeypatch):
    """A hundred rows of the largest size would be gigabytes; all are read, but not held at once."""
    monkeypatch.setattr(sources, "ENOUGH", 1 << 20)
    row = json.dumps({"text": "x" * 100_000, "n": [1.5] * 10})
    (tmp_path / "rows.jsonl").write_text((row + "\n") * 100)
    source = SourceSettings(path="rows.jsonl")
    assert len(probe(source, tmp_path)) == 11  # the row that goes over is the last
    assert sum(1 for _ in read(source, tmp_path)) == 100
    monkeypatch.setattr(sources, "ENOUGH", 1 << 30)
    assert len(probe(source, tmp_path)) == 100


@pytest.mark.parametrize("value", ["x" * 1000, {"a": "x" * 1000}, ["x" * 500, {"b": ["x" * 500]}], {"x" * 1000: 1}])
def test_the_weight_of_a_row(value):
    assert 1000 < weight(value, 1 << 20) < 1700
    assert weight([value] * 50, 5000) <= 5000 + 1700


def test_a_folder_within_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for path in (tmp_path / "a.jsonl", tmp_path / "sub" / "b.jsonl"):
        path.write_text('{"prompt": "q", "completion": "a"}\n')
    real = os.scandir

    def refuses(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(DataError, match="a folder cannot be read: Permission denied") as error:
        list(read(SourceSettings(path=str(tmp_path)), tmp_path))
    assert error.value.where == str(tmp_path / "sub")
