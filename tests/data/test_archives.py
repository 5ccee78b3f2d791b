"""Zip archives are read as folders, and cannot lead out of themselves or fill the memory."""

from __future__ import annotations

import json
import stat
import struct
import zipfile
import zlib

import pytest

from fitout.data import SourceSettings
from fitout.data.readers import archive as archives
from fitout.data.sources import list_files, probe, read
from fitout.errors import DataError
from tests.data.test_bad_input import failure


def pack(path, *members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def test_members_are_read_in_order_each_by_its_ending(tmp_path):
    import gzip

    path = pack(
        tmp_path / "set.json.zip",
        ("b.csv", "n\n2\n"),
        ("a/x.jsonl", '{"n": 1}\n{"n": 11}\n'),
        ("c.jsonl.gz", gzip.compress(b'{"n": 3}\n')),
        ("README.md", "#"),
        (".hidden.json", "{}"),
        ("empty.json", ""),
        ("inner.zip", "PK"),
    )
    source = SourceSettings(path=path.name)
    rows = list(read(source, tmp_path))
    assert [str(row.origin) for row in rows] == [
        "set.json.zip/a/x.jsonl:1",
        "set.json.zip/a/x.jsonl:2",
        "set.json.zip/b.csv:2",
        "set.json.zip/c.jsonl.gz:1",
    ]
    assert [row.row["n"] for row in rows] == [1, 11, "2", 3]
    assert list_files(source, tmp_path).skipped == [
        ("set.json.zip/.hidden.json", "a hidden file"),
        ("set.json.zip/README.md", "an unknown ending"),
        ("set.json.zip/empty.json", "empty"),
        ("set.json.zip/inner.zip", "an archive in the archive"),
    ]
    assert [row["n"] for row in probe(source, tmp_path, 1)] == [1]
    assert [row["n"] for row in list(probe(source, tmp_path, 3))] == [1, 11, "2"]
    folder = tmp_path / "folder"
    folder.mkdir()
    path.rename(folder / "set.json.zip")
    source = SourceSettings(path="folder")
    assert len(list(read(source, tmp_path))) == 4
    assert ("folder/set.json.zip/README.md", "an unknown ending") in list_files(source, tmp_path).skipped


def test_parquet_in_a_zip(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": ["x", "y"]}), tmp_path / "t.parquet")
    path = pack(tmp_path / "t.zip", ("t.parquet", (tmp_path / "t.parquet").read_bytes()))
    assert [row.row for row in read(SourceSettings(path=path.name), tmp_path)] == [{"a": "x"}, {"a": "y"}]


@pytest.mark.parametrize(
    "name", ["../out.json", "/etc/out.json", "a/../../out.json", "..\\out.json", "C:\\out.json", "a/./../../x.json"]
)
def test_names_that_lead_out_are_passed_over_and_nothing_is_written(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = pack(inside / "a.zip", ("good.json", '[{"n": 1}]'), (name, '[{"n": 2}]'))
    source = SourceSettings(path=path.name)
    assert [row.row["n"] for row in read(source, inside)] == [1]
    assert [reason for _, reason in list_files(source, inside).skipped] == ["a name that leads out of the archive"]
    assert [entry.name for entry in tmp_path.rglob("*")] == ["inside", "a.zip"]


def test_links_encrypted_and_other_methods_are_passed_over(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.json", '[{"n": 1}]')
        link = zipfile.ZipInfo("link.json")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("other.json", "[]", compress_type=zipfile.ZIP_BZIP2)
        archive.writestr("secret.json", "[]")
    content = path.read_bytes()
    entry = content.rindex(b"secret.json") - 46  # its line in the list of members; its flags are at 8
    path.write_bytes(content[: entry + 8] + struct.pack("<H", 1) + content[entry + 10 :])
    source = SourceSettings(path="a.zip")
    assert [row.row["n"] for row in read(source, tmp_path)] == [1]
    assert {name[6:]: reason for name, reason in list_files(source, tmp_path).skipped} == {
        "link.json": "a link",
        "other.json": "packed by another method than deflate",
        "secret.json": "encrypted",
    }


def test_a_damaged_member_is_told(tmp_path):
    rows = "".join(json.dumps({"n": number, "x": str(zlib.crc32(bytes(number)))}) + "\n" for number in range(5000))
    path = pack(tmp_path / "a.zip", ("x.jsonl", rows))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    error = failure(path)
    assert "damaged" in error.message and error.where == "a.zip/x.jsonl"
    path.write_bytes(content[:-30])
    assert "not a zip archive" in failure(path).message


def test_members_that_share_bytes_are_refused(tmp_path):
    """As in Fifield's bomb: many entries in the list of members lead to the same packed bytes."""
    path = pack(tmp_path / "a.zip", ("x.jsonl", '{"n": 1}\n' * 1000 + json.dumps({"x": [*range(20_000)]})))
    content = path.read_bytes()
    entry = content[content.rindex(b"PK\x01\x02") : content.rindex(b"PK\x05\x06")]
    start = content.rindex(b"PK\x01\x02")
    many = 50
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, many, many, many * len(entry), start, 0)
    path.write_bytes(content[:start] + entry * many + end)
    assert len(zipfile.ZipFile(path).infolist()) == many
    assert "share bytes" in failure(path).message


def test_a_bomb_is_stopped(tmp_path):
    path = pack(tmp_path / "a.zip", ("x.jsonl", ('{"a": "' + " " * 1_000_000 + '"}\n') * 100))
    assert path.stat().st_size < 200_000
    error = failure(path)
    assert "bomb" in error.message and "unpack it yourself" in error.hint and error.where == "a.zip/x.jsonl"


def test_a_list_of_members_out_of_proportion(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", *((f"{number}.json", "[{}]") for number in range(200)))
    monkeypatch.setattr(archives, "DIRECTORY", 5000)
    assert "list of members" in failure(path).message
    monkeypatch.undo()
    monkeypatch.setattr(archives, "MEMBERS", 100)
    with pytest.raises(DataError, match="200 files, more than 100"):
        list_files(SourceSettings(path="a.zip"), tmp_path)
        list(read(SourceSettings(path="a.zip"), tmp_path))


def test_an_archive_with_nothing_to_read(tmp_path):
    error = failure(pack(tmp_path / "a.zip", ("x.docx", "x")))
    assert "no file that can be read" in error.message and "x.docx" in error.message
