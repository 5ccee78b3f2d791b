"""What a run says of the code it computes with on a CPU, and of going on with other code."""

from __future__ import annotations

from fitout.model import native, precision
from fitout.rundir import RunDir
from tests.cli.command import fitout, recipe, rows

OTHERWISE = "this run began with other kernels"


def test_a_run_says_what_it_computes_with_and_when_that_changes(tmp_path, monkeypatch):
    rows(tmp_path / "rows.jsonl")
    made = recipe(tmp_path)

    def train(*more):
        done = fitout("train", made, *more, cwd=tmp_path)
        assert done.code == 0
        return done.out + done.err, RunDir(tmp_path / "runs" / "tiny").read_status()["computed_by"]

    by = "oneDNN" if precision._mkl_is_slow() else "PyTorch's choice"
    with monkeypatch.context() as without:
        without.setattr(native, "why_not", lambda: "there is no C++ compiler (g++)")
        said, status = train("--set", "train.max_steps=2")
    assert "by PyTorch's kernels, which take longer: there is no C++ compiler (g++)" in said and OTHERWISE not in said
    assert status == {"native": False, "products": by}
    said, status = train("--resume", "--set", "train.max_steps=3")
    if native.why_not() is None:
        assert OTHERWISE in said and "take longer" not in said and status["native"] is False
    said, _ = train("--resume", "--set", "train.max_steps=4")
    assert (OTHERWISE in said) == (native.why_not() is None)
