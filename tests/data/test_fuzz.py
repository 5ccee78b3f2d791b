"""A short round of `python -m tests.data.fuzz`, and what longer ones have found."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fitout.data.formats import Refused, choose, convert
from fitout.data.readers import in_archive
from fitout.data.sources import named, read
from fitout.errors import DataError

from .conftest import write
from .fuzz import run

FLIPS = """
import sys
from pathlib import Path
from fitout.data.sources import named, read
from fitout.errors import DataError
path = Path(sys.argv[1])
whole, refused, tried = path.read_bytes(), 0, 0
for at in range(len(whole) - int.from_bytes(whole[-8:-4], "little") - 8, len(whole) - 8):
    for bit in (0, 1, 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        tried += 1
        try:
            list(read(named(path.name), path.parent))
        except DataError:
            refused += 1
print(tried, refused)
"""


def test_spoiled_files_give_samples_or_reasons():
    outcomes, broken = run(60, seed=3, most=2500)
    assert not broken, [path.with_name(path.name + ".error").read_text() for path in broken[:3]]
    assert {"sample", "data error", "refused"} <= outcomes.keys()


def test_no_changed_bit_of_a_parquet_footer_ends_the_process(tmp_path):
    """pyarrow 26 lets a C++ exception go where a damaged column is asked about; it ended the process."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"]}), path)
    done = subprocess.run([sys.executable, "-c", FLIPS, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    tried, refused = map(int, done.stdout.split())
    assert tried > 500 and refused > 50


def test_a_message_without_a_known_role_is_refused(tmp_path: Path):
    tree = {"message_id": "m", "text": "q", "replies": [{"role": "assistant", "text": "a", "replies": []}]}
    for role in ("system", "", None, 0, ["prompter"], {"a": 1}):
        path = write(tmp_path / "rows.jsonl", [{"message_tree_id": "m", "prompt": {**tree, "role": role}}])
        [row] = read(named(str(path)), tmp_path)
        [refused] = convert(choose([row.row]), row)
        assert isinstance(refused, Refused) and "neither prompter nor assistant" in refused.reason


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name in names:
            made.writestr(name, '{"prompt": "q", "completion": "a"}\n')
    return file.getvalue()


def test_a_member_without_a_name_is_passed_over(tmp_path):
    path = tmp_path / "rows.zip"
    path.write_bytes(archive("rows.jsonl", "none").replace(b"none", b"\0one"))  # a name ends at a NUL
    found = in_archive(path, path.name)
    assert [info.filename for info in found.members] == ["rows.jsonl"]
    assert [why for _, why in found.skipped] == ["a file without a name"]
    assert len(list(read(named(path.name), tmp_path))) == 1


def test_a_damaged_name_before_a_member_is_a_damaged_archive(tmp_path):
    """The name stands twice in an archive; the one before the data is not UTF-8."""
    path = tmp_path / "rows.zip"
    whole = archive("r\u00e9.jsonl")
    path.write_bytes(whole.replace("r\u00e9".encode(), b"r\xc3\xff", 1))
    with pytest.raises(DataError, match="damaged or cut short"):
        list(read(named(path.name), tmp_path))
