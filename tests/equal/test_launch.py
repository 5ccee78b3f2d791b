"""`--processes`: a killed rank and a hung one end all, with a message, and the run goes on; mistakes are refused."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fitout.files import read_json

from .small import call, command, environment, losses, write_shell_recipe


def ranks_of(launcher: int) -> dict[int, int]:
    """The processes that a launcher started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names = dict(x.split("=", 1) for x in (folder / "environ").read_text().split("\0") if "=" in x)
        except (OSError, ValueError):
            continue
        if parent == launcher and "RANK" in names:
            found[int(names["RANK"])] = int(folder.name)
    return found


def start(*arguments: object) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_steps(log: Path, steps: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_text().count('"lr"') >= steps:
            return
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1][-3000:])


def test_a_killed_rank_ends_all_and_the_run_goes_on_with_one(tmp_path, whole_run):
    recipe, whole = whole_run
    run = tmp_path / "run"
    process = start("train", recipe, "--out", run, "--processes", 2)
    wait_for_steps(run / "log.jsonl", 7, process)
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1]
    os.kill(ranks[1], signal.SIGKILL)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "rank 1 was ended by SIGKILL" in told and "same command" in told, told
    assert "Traceback" not in told, told
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    call("train", recipe, "--out", run, "--resume")
    want, got = losses(whole / "log.jsonl"), losses(run / "log.jsonl")
    assert [step for step, _ in got] == list(range(1, 31))
    assert [x for _, x in got] == pytest.approx([x for _, x in want], abs=1e-5)


def test_a_hung_rank_ends_all_and_leaves_stacks(tmp_path):
    recipe, run = write_shell_recipe(tmp_path), tmp_path / "run"
    process = start("train", recipe, "--out", run, "--processes", 2, "--set", "train.hang_after=5",
                    "--set", "train.max_steps=5000", "--set", "train.evaluate_every=10000")  # fmt: skip
    wait_for_steps(run / "log.jsonl", 3, process)
    ranks = ranks_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    _, told = process.communicate(timeout=180)
    assert process.returncode == 1 and "a rank hung" in told, told
    stacks = (run / "stacks" / "rank-0.txt").read_text()
    assert "all_reduce" in stacks and "backend.py" in stacks  # where it waited for the other
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def test_asked_to_stop_all_save_and_say_so_once(tmp_path):
    recipe, run = write_shell_recipe(tmp_path), tmp_path / "run"
    more = ("--set", "train.max_steps=5000", "--set", "train.evaluate_every=10000", "--set", "train.save_every=10000")
    process = start("train", recipe, "--out", run, "--processes", 2, *more)
    wait_for_steps(run / "log.jsonl", 3, process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 3 and told.count("a checkpoint is saved") == 1, told
    [saved] = (run / "checkpoints").glob("step-*")
    assert read_json(run / "run.json")["status"] == "stopped" and len(losses(run / "log.jsonl")) == int(
        saved.name.removeprefix("step-")
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--processes", 2, "--set", "train.parallel=fdsp"), "train.parallel"),
        (("--nodes", 2), "--nodes and --rendezvous go together"),
        (("--nodes", 2, "--rendezvous", "here"), "no port"),
        (("--set", "train.offload=true"), "offload needs parallel"),
    ],
)
def test_wrong_requests_are_refused_once(tmp_path, arguments, told):
    done = call("train", write_shell_recipe(tmp_path), "--out", tmp_path / "run", *arguments, code=2)
    assert done.stderr.count(told) == 1, done.stderr
