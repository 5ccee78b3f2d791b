"""`fitout compare` through the real command line: killed and gone on with, the sweep kept from the test part."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fitout.data.store import Part
from fitout.files import read_json, read_jsonl
from fitout.rundir import RunDir
from tests.cli.command import ENVIRONMENT, Done, fitout, recipe, rows

HOW = ("--methods", "full,lora", "--seeds", 1, "--budget", "steps=9", "--lrs", "full=1e-3", "--lrs", "lora=1e-7,1e-2")


def settled(path: Path) -> list[dict]:
    return [row for row in read_jsonl(path) if "event" not in row] if path.exists() else []


@pytest.fixture(scope="module")
def gone_on_with(tmp_path_factory) -> tuple[Path, bytes, int, Done]:
    """(folder, the log of the run that was finished at the kill, steps of the one that was not, the second call)."""
    folder = tmp_path_factory.mktemp("compare")
    rows(folder / "rows.jsonl", 40)
    asked = recipe(folder, more="export: {merge: true}")
    text = asked.read_text().replace("listeners: []", "listeners: [], save_every: 2, seed: 3")
    asked.write_text(text.replace("limit: 2", "limit: 4"))
    arguments = ["compare", str(asked), *map(str, HOW), "--out", "c"]
    first = subprocess.Popen(
        [sys.executable, "-m", "fitout.cli.app", *arguments], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    half_done = RunDir(folder / "c" / "runs" / "lora" / "seed-3")
    deadline = time.monotonic() + 120
    while first.poll() is None and time.monotonic() < deadline and len(settled(half_done.log)) < 4:
        time.sleep(0.01)
    first.kill()  # the comparison first: nobody can tell its child
    os.kill(json.loads(half_done.lock_file.read_text())["pid"], signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert half_done.read_status()["status"] == "running"
    done_before = (folder / "c" / "runs" / "full" / "seed-3" / "log.jsonl").read_bytes()
    steps = len(settled(half_done.log))
    return folder / "c", done_before, steps, fitout(*arguments, "--json", cwd=folder)


def test_a_killed_comparison_goes_on(gone_on_with):
    folder, done_before, steps, again = gone_on_with
    assert again.code == 0, again.err
    assert "full, seed 3: done already" in again.err and "learning rate 0.01: done already" in again.err
    assert (folder / "runs" / "full" / "seed-3" / "log.jsonl").read_bytes() == done_before
    log = read_jsonl(folder / "runs" / "lora" / "seed-3" / "log.jsonl")
    assert 4 <= steps < 9
    assert [row["step"] for row in log if row.get("event") == "resumed"][0] in (2, 4, 6, 8)
    assert [row["step"] for row in log if "event" not in row] == list(range(1, 10))


def test_it_tells_a_machine_and_leaves_page_and_json(gone_on_with):
    folder, _, _, again = gone_on_with
    result = json.loads(again.out)
    assert result == read_json(folder / "compare.json")
    assert list(result["methods"]) == ["full", "lora"] and result["seeds"] == [3]
    assert set(result["task"][0]["places"]) == {"full", "lora"} and result["verdicts"]
    for one in result["methods"].values():
        run = one["runs"]["3"]
        assert run["memory_mb"] > 50 and run["train_seconds"] > 0 and run["disk_bytes"] > 0 and not one["failed"]
    disk = {name: one["runs"]["3"]["disk_bytes"] for name, one in result["methods"].items()}
    assert disk["lora"] < disk["full"] / 10
    page = (folder / "compare.html").read_text(encoding="utf-8")
    assert "Quality against memory" in page and "<script" not in page


def test_the_rate_is_the_best_on_validation(gone_on_with):
    folder, *_ = gone_on_with
    swept = {}
    for run in (folder / "sweep" / "lora").iterdir():
        training = RunDir(run).read_status()["training"]
        swept[float(run.name.removeprefix("lr-"))] = dict(map(tuple, training["validation"]))[training["best_step"]]
    assert len(swept) == 2 and swept[1e-2] < swept[1e-7]
    result = read_json(folder / "compare.json")["methods"]
    assert result["lora"]["lr"] == min(swept, key=swept.__getitem__)
    whole = {float(run.name.removeprefix("lr-")) for run in (folder / "whole" / "lora").iterdir()}
    assert whole == {float(rate) for rate in result["lora"]["whole"]} == {1e-2, 1e-7}  # the best, and the one below
    assert {float(rate): loss for rate, loss in result["lora"]["rates"].items()} == swept
    assert result["full"]["lr"] == 1e-3 and not (folder / "sweep" / "full").exists()  # one rate was given


def test_the_sweep_has_no_test_question(gone_on_with):
    """Not that it does not look: there is nothing in its folder to look at."""
    folder, *_ = gone_on_with
    swept = [RunDir(path) for stage in ("sweep", "whole") for path in (folder / stage / "lora").iterdir()]
    prepared = RunDir(folder / "prepared")
    origins = {row["origin"]["line"] for row in read_jsonl(prepared.test_rows)}
    assert origins
    for run in swept:
        assert not run.test_rows.exists() and not run.evaluation.exists()
        assert len(Part(run.data / "test.arrow")) == 0
        for name in ("train", "validation"):
            part = Part(run.data / f"{name}.arrow")
            assert len(part) and not origins & {part.origin(row).line for row in range(len(part))}
        assert not run.checkpoints.exists() and not run.adapter.exists()  # a rate needs its figure only


def test_all_runs_have_the_same_data_and_split(gone_on_with):
    folder, *_ = gone_on_with
    runs = [RunDir(path) for path in (folder / "runs").glob("*/*")]
    assert len(runs) == 2
    prints = {run.read_status()["data_fingerprint"] for run in runs}
    assert prints == {read_json(folder / "prepared" / "data" / "fingerprint.json")["fingerprint"]}
    assert {run.test_rows.stat().st_ino for run in runs} == {(folder / "prepared/data/test.jsonl").stat().st_ino}


def test_another_budget_or_other_data_in_the_same_folder_are_refused(gone_on_with):
    folder, *_ = gone_on_with
    asked = folder.parent / "recipe.yaml"
    other = [word if word != "steps=9" else "steps=8" for word in HOW]
    done = fitout("compare", asked, *other, "--out", folder, cwd=folder.parent)
    assert done.code == 2 and "another budget" in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "full,lorra"], "did you mean lora?"),
        (["--methods", "nope"], "Known: full"),
        (["--methods", ","], "there is no method ','"),
        (["--budget", "hours=2"], "steps=200"),
        (["--methods", "lora", "--lrs", "full=1e-4"], "--lrs names 'full'"),
    ],
)
def test_a_wrong_request_is_told_before_any_work(tmp_path, arguments, said):
    rows(tmp_path / "rows.jsonl", 40)
    done = fitout("compare", recipe(tmp_path), *arguments, cwd=tmp_path)
    assert done.code == 2 and said in done.err
    assert not (tmp_path / "runs").exists()


def test_the_split_keeps_its_seed_while_the_training_seed_changes(tmp_path):
    rows(tmp_path / "rows.jsonl", 40)
    asked = recipe(tmp_path)

    def held_out(*changes):
        out = tmp_path / f"p{len(list(tmp_path.iterdir()))}"
        sets = [word for change in changes for word in ("--set", change)]
        assert fitout("data", "prepare", asked, *sets, "--out", out, cwd=tmp_path).code == 0
        return (out / "data" / "test.jsonl").read_bytes(), read_json(out / "data" / "fingerprint.json")

    plain, other = held_out("train.seed=5"), held_out("train.seed=6")
    fixed = held_out("train.seed=6", "data.split_seed=5")
    assert plain[0] != other[0] and fixed == plain
