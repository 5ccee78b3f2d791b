"""A short round of `python -m tests.data.fuzz`, and what longer ones have found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fitout.data.formats import Refused, choose, convert
from fitout.data.sources import named, read

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
