"""A preparation that was interrupted goes on after its last whole stage and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fitout.data import DataSettings
from fitout.data import prepare as preparing
from fitout.data.prepare import prepare
from fitout.data.rows import Rows
from fitout.errors import DataError
from fitout.rundir import RunDir
from tests.cli.command import ENVIRONMENT
from tests.data.conftest import write
from tests.data.test_prepare import messy, question

STAGES = {
    "_read_and_clean": "",
    "_deduplicate": "clean",
    "_render": "split",
    "_finished": "render",
}  # begun: what is done


def sources(folder) -> DataSettings:
    """Something of everything that the stages remember: tasks, groups, weights, shares, quarantine, moved passages."""
    rows = [
        {**question(n), "input": f"Well. The key is {n}. So it is.", "key": f"The key is {n}.", "who": f"w{n % 7}",
         "kind": f"sums / {'odd' if n % 2 else 'even'}"}
        for n in range(200, 320)
    ]  # fmt: skip
    rows[5]["output"] = "As an AI language model, I cannot. Write to someone@example.com"
    more = write(folder / "more.jsonl", rows)
    settings = {
        "sources": [{"path": messy(folder / "messy.jsonl")}, {"path": more, "weight": 2}],
        "max_length": 96, "split": {"group": "who"}, "tasks": {"field": "kind", "rules": [
            {"contains": ["number"], "task": "numbers"}]}, "position": {"field": "key", "augment": True},
        "clean": {"personal": "mask", "refusals": "drop"},
        "balance": [{"by": "length", "how": "drop", "cap": 0.5, "edges": [30, 60]}],
    }  # fmt: skip
    return DataSettings.model_validate(settings)


def result(run: RunDir) -> dict[str, bytes]:
    """Every file of the prepared data; of the page and the details what does not depend on the clock."""
    files = {path.name: path.read_bytes() for path in sorted(run.data.iterdir()) if path.is_file()}
    details = json.loads(files[run.data_details.name])
    taken = json.dumps(details.pop("seconds"))
    files[run.data_details.name] = json.dumps(details).encode()
    page = files[run.data_page.name].decode()
    files[run.data_page.name] = page.replace(taken, "").encode()
    return files


@pytest.fixture(scope="module")
def whole(tmp_path_factory, chat):
    folder = tmp_path_factory.mktemp("whole")
    settings = sources(folder)
    prepare(settings, chat, "conversation", RunDir(folder / "run"))
    return folder, settings, result(RunDir(folder / "run"))


def interrupt(monkeypatch, where, name, at=1):
    """The `at`-th call of a function is a Ctrl-C."""
    real, calls = getattr(where, name), []

    def stopped(*args, **more):
        calls.append(name)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(where, name, stopped)


def interrupted(monkeypatch, chat, settings, run, begun) -> None:
    """A preparation that ends when a stage begins."""
    with monkeypatch.context() as patch:
        interrupt(patch, preparing, begun)
        with pytest.raises(KeyboardInterrupt):
            prepare(settings, chat, "conversation", run)


def told(chat, settings, run) -> list[str]:
    """Prepares, and what was said of going on."""
    said: list[str] = []
    prepare(settings, chat, "conversation", run, say=said.append)
    return [line.split("`")[1] for line in said]


@pytest.mark.parametrize("begun", STAGES)
def test_after_each_stage(tmp_path, monkeypatch, chat, whole, begun):
    _, settings, want = whole
    run = RunDir(tmp_path / "run")
    interrupted(monkeypatch, chat, settings, run, begun)
    assert not (run.data / "fingerprint.json").exists() and (run.data / ".unfinished").exists()
    done = STAGES[begun]
    with monkeypatch.context() as patch:
        for earlier in list(STAGES)[: list(STAGES).index(begun)]:  # what was done is not done again
            patch.setattr(preparing, earlier, lambda *_: pytest.fail("done already"))
        assert told(chat, settings, run) == ([done] if done else [])
    assert result(run) == want and not (run.data / ".unfinished").exists()


@pytest.mark.parametrize("seed", range(6))
def test_within_stages_again_and_again(tmp_path, monkeypatch, chat, whole, seed):
    """Each start is interrupted a little later, between two rows, two removals, two files."""
    _, settings, want = whole
    run, draw = RunDir(tmp_path / "run"), random.Random(seed)
    places = [
        (Rows, "add", 300), (Rows, "sample", 300), (preparing._Work, "remove", 20), (preparing, "_write_said", 3),
        (preparing, "_fit", 200), (preparing, "_balanced", 1), (preparing, "_take", 1), (preparing, "write_page", 1),
        (preparing, "write_fingerprint", 1),
    ]  # fmt: skip
    for where, name, most in draw.sample(places, 4):
        with monkeypatch.context() as patch:
            interrupt(patch, where, name, draw.randint(1, most))
            try:
                prepare(settings, chat, "conversation", run)
            except KeyboardInterrupt:
                continue
            break
    prepare(settings, chat, "conversation", run)
    assert result(run) == want


DAMAGED = {  # -> after which stage it goes on
    "rows.jsonl": "", "quarantine.jsonl": "", "made_of.json": "", "split/values.json": "clean",
    "split/task_of.npy": "clean", "split/files.json": "clean",
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_what_is_damaged_is_not_gone_on_from(tmp_path, monkeypatch, chat, whole, name, how):
    _, settings, want = whole
    run = RunDir(tmp_path / "run")
    interrupted(monkeypatch, chat, settings, run, "_render")
    path = run.data / ".unfinished" / name
    content = bytearray(path.read_bytes())
    place = len(content) // 8  # of the rows that all stages need
    content[place] ^= 1
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content if how == "flipped" else content[:place])
    assert told(chat, settings, run) == ([DAMAGED[name]] if DAMAGED[name] else [])
    assert result(run) == want


def test_of_other_inputs_nothing_is_taken(tmp_path, monkeypatch, chat, whole):
    folder, settings, want = whole
    run = RunDir(tmp_path / "run")
    other = settings.model_copy(update={"max_length": 90})
    interrupted(monkeypatch, chat, other, run, "_render")
    assert told(chat, settings, run) == []
    assert result(run) == want


def test_what_was_prepared_before_is_not_taken_for_what_replaced_it(tmp_path, monkeypatch, chat, whole):
    """A, then B interrupted when it has begun to replace A's files, then A again."""
    _, settings, want = whole
    run = RunDir(tmp_path / "run")
    prepare(settings, chat, "conversation", run)
    other = settings.model_copy(update={"max_length": 40})
    interrupted(monkeypatch, chat, other, run, "_finished")
    assert told(chat, settings, run) == []
    assert result(run) == want


def test_and_is_kept_by_what_replaced_nothing(tmp_path, monkeypatch, chat, whole):
    _, settings, want = whole
    run = RunDir(tmp_path / "run")
    prepare(settings, chat, "conversation", run)
    other = settings.model_copy(update={"max_length": 40})
    interrupted(monkeypatch, chat, other, run, "_deduplicate")
    monkeypatch.setattr(preparing, "_stages", lambda *_: pytest.fail("it is all there"))
    prepare(settings, chat, "conversation", run)
    assert result(run) == want and not (run.data / ".unfinished").exists()


def test_after_an_error_nothing_is_left(tmp_path, chat):
    settings = DataSettings.model_validate({"sources": [{"path": write(tmp_path / "x.jsonl", [question(1)])}],
                                            "split": {"group": "nobody"}})  # fmt: skip
    with pytest.raises(DataError):
        prepare(settings, chat, "conversation", RunDir(tmp_path / "run"))
    assert not list((tmp_path / "run" / "data").iterdir())


def test_killed_through_the_command_line(tmp_path, chat):
    """kill -9 at three moments of the real command, then left alone."""
    rows = [question(n) for n in range(4000)]
    path = write(tmp_path / "rows.jsonl", rows)
    (tmp_path / "recipe.yaml").write_text(json.dumps({
        "name": "killed", "model": {"base": "embedded:shell"}, "data": {"sources": [{"path": path}], "max_length": 64},
    }))  # fmt: skip

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "fitout.cli.app", "data", "prepare", "recipe.yaml", "--out", out]
        return subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)

    assert start("whole").wait(120) == 0
    seen = []
    for stage in ("clean", "split", "render"):
        process = start("killed")
        place = tmp_path / "killed" / "data" / ".unfinished" / stage
        while process.poll() is None and not place.exists():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        seen.append(place.exists())
    last = start("killed")
    assert "going on after the stage" in last.communicate(timeout=120)[0] or not seen[-1]
    assert last.returncode == 0 and any(seen)
    assert result(RunDir(tmp_path / "killed")) == result(RunDir(tmp_path / "whole"))
