"""`kill -9` at random moments of real runs, and whether the same command ends them bit-equal.

    python -m benchmarks.crash --trials 200 --out benchmarks/results/crash.json

Each side trains the same small LoRA run: the embedded model, the same rows, dropout on. First undisturbed, for the
truth and for how long it takes; then again and again with up to KILLS kills in a row, each of a process started by the
same command, and a last start that is left alone. A kill falls at a moment drawn evenly over the whole time of an
undisturbed run (start, data, training, saves, evaluation, end), or, half of them, into a save: as soon as files of a
checkpoint that is being written are seen, plus up to SAVE_DELAY seconds. A trial is one kill. It went on when the next
start of the same command did not end with an error, and is bit-equal when the run's adapter in the end has the bytes
of an undisturbed run; after a start that fails there is no end to compare, and the next chain begins.

    fitout        `fitout run RECIPE --out RUN`, through the command line
    fitout aside  the same, with checkpoints written by a thread as on a GPU (`benchmarks.side_aside`)
    trainer       `python -m benchmarks.side_crash`: transformers' Trainer with peft, started again as its users do,
                  from `get_last_checkpoint` (its own saves, its own resume)

Goes on where it stopped: what is in `--out` is not done again. Exit code 1 when one of Fitout's trials did not survive.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .small import ROOT, environment, machine, recipe, write

KILLS = 5  # in a row, of one run
SAVE_DELAY = 0.01  # seconds; a save of this size takes about that long
LIMIT = 300  # seconds for one start; more is a hang
STEPS, SAVE_EVERY, BATCH, RATE, DROPOUT = 40, 3, 8, 1e-3, 0.05
RECIPE = recipe(
    "crash",
    f"rank: 8, alpha: 16, dropout: {DROPOUT}",
    f"max_steps: {STEPS}, lr: {RATE}, save_every: {SAVE_EVERY}, evaluate_every: 20, listeners: []",
)


@dataclass(frozen=True)
class Side:
    """How a side is started, where its saves show, and what it ends with."""

    name: str
    command: Callable[[Path], list[str]]
    saving: str  # of files under the run folder that are there only, or first, while a checkpoint is written
    result: str


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--trials", type=int, default=200)
    arguments.add_argument("--aside-trials", type=int, default=60)
    arguments.add_argument("--peer-trials", type=int, default=25)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--work", type=Path, default=Path("build/crash"))
    arguments.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so long; go on later")
    asked = arguments.parse_args()
    work = asked.work.absolute()
    until = time.monotonic() + asked.seconds
    sides = prepare(work)
    result = json.loads(asked.out.read_text()) if asked.out.exists() else {"machine": machine(1), "sides": {}}
    for side in sides:
        mine = result["sides"].setdefault(side.name, {"trials": []})
        if "truth" not in mine:
            mine["truth"], mine["seconds"] = undisturbed(side, work)
            write(asked.out, result)
        wanted = {"fitout": asked.trials, "fitout aside": asked.aside_trials, "trainer": asked.peer_trials}[side.name]
        for trials in chains(side, work, mine, wanted):
            mine["trials"] += trials
            write(asked.out, result)
            print(f"{side.name}: {told(mine['trials'])}", flush=True)
            if time.monotonic() > until:
                sys.exit(3)
    ours = (trial for name in ("fitout", "fitout aside") for trial in result["sides"][name]["trials"])
    sys.exit(0 if all(map(survived, ours)) else 1)


def survived(trial: dict[str, Any]) -> bool:
    return trial["went_on"] and trial["bit_equal"] is True


def told(trials: list[dict[str, Any]]) -> str:
    """A start that fails ends its chain, so the kills before it have no end to compare: they are in neither count of
    the second sentence."""
    ended = [trial for trial in trials if trial["bit_equal"] is not None]
    return (
        f"went on after {sum(trial['went_on'] for trial in trials)} of {len(trials)} kills; "
        f"of {len(ended)} whose run came to its end {sum(trial['bit_equal'] for trial in ended)} are bit-equal"
    )


def prepare(work: Path) -> list[Side]:
    """Writes the recipe, and for the peer the rows as Fitout prepares them."""
    work.mkdir(parents=True, exist_ok=True)
    path, rows = work / "recipe.yaml", work / "rows.json"
    path.write_text(RECIPE)
    if not rows.exists():
        from fitout import config, verbs
        from fitout.data.store import Part

        part = Part(verbs.prepare(config.load(path), out=work / "prepared").data / "train.arrow")
        settings = {"steps": STEPS, "save_every": SAVE_EVERY, "batch": BATCH, "rate": RATE, "dropout": DROPOUT}
        samples = [{"ids": part.ids(i).tolist(), "mask": part.train_on(i).tolist()} for i in range(len(part))]
        write(rows, {**settings, "base": str(ROOT / "fitout/demo/shell"), "rows": samples})
    fitout = [sys.executable, "-m", "fitout.cli.app", "run", str(path), "--out"]
    aside = [sys.executable, "-m", "benchmarks.side_aside", *fitout[3:]]
    trainer = [sys.executable, "-m", "benchmarks.side_crash", str(rows)]
    return [
        Side("fitout", lambda run: [*fitout, str(run)], "checkpoints/.*.part", "adapter/adapter_model.safetensors"),
        Side(
            "fitout aside", lambda run: [*aside, str(run)], "checkpoints/.*.part", "adapter/adapter_model.safetensors"
        ),
        Side("trainer", lambda run: [*trainer, str(run)], "checkpoint-*", "adapter/adapter_model.safetensors"),
    ]


def undisturbed(side: Side, work: Path) -> tuple[str, float]:
    """The hash of what a run that nobody kills ends with, twice the same, and its seconds."""
    hashes, seconds = set(), 0.0
    for _ in range(2):
        run = fresh(work / f"{side.name}-whole")
        started = time.monotonic()
        process = start(side, run)
        if process.wait(LIMIT):
            sys.exit(f"{side.name} does not run even undisturbed: see {run.with_suffix('.log')}")
        seconds = time.monotonic() - started
        hashes.add(outcome(side, run))
    if len(hashes) > 1:
        sys.exit(f"{side.name}: two undisturbed runs differ, so nothing can be compared: {hashes}")
    return hashes.pop(), seconds


def chains(side: Side, work: Path, mine: dict[str, Any], wanted: int) -> Iterator[list[dict[str, Any]]]:
    """Runs of up to KILLS kills each, until `wanted` kills are there."""
    while len(mine["trials"]) < wanted:
        draw = random.Random(f"{side.name} {len(mine['trials'])} {time.time_ns()}")
        run = fresh(work / f"{side.name}-killed")
        kills: list[dict[str, Any]] = []
        problem = ""
        for _ in range(min(KILLS, wanted - len(mine["trials"]))):
            before = [*mine["trials"], *kills]
            few = 2 * sum(trial["in_save"] for trial in before) < len(before)
            kill = kill_once(side, run, mine["seconds"], draw, in_save=few)
            if isinstance(kill, str):  # it ended before the moment came
                problem = kill
                break
            kills.append(kill)
        if not problem:
            process = start(side, run)
            try:
                code = process.wait(LIMIT)
                problem = f"exit code {code}" if code else ""
            except subprocess.TimeoutExpired:
                process.kill()
                problem = "hung"
        same = None if problem else outcome(side, run) == mine["truth"]
        if kills and not same:
            shutil.move(run, fresh(work / f"{side.name}-lost-{len(mine['trials'])}"))
        for kill in kills:
            kill |= {"went_on": True, "bit_equal": same}
        if kills and problem:
            kills[-1] |= {"went_on": False, "problem": problem}
        yield kills


def kill_once(side: Side, run: Path, seconds: float, draw: random.Random, *, in_save: bool) -> dict[str, Any] | str:
    """Starts the side and kills it; when it ended first, why it should not have, or ""."""
    process = start(side, run)
    started = time.monotonic()
    earliest, delay = draw.uniform(0, seconds), draw.uniform(0, SAVE_DELAY)
    before = set(run.glob(side.saving))
    while process.poll() is None:
        now = time.monotonic() - started
        if now > LIMIT:
            break
        if not in_save and now >= earliest:
            break
        # into a save: the first one from a moment drawn over the first half, so that there still is one
        if in_save and now >= earliest / 2 and set(run.glob(side.saving)) - before:
            time.sleep(delay)
            break
        if in_save and now < earliest / 2:
            before = set(run.glob(side.saving))
        time.sleep(0.0005 if in_save else 0.005)
    if process.poll() is not None:
        return f"exit code {process.returncode}" if process.returncode else ""
    after = time.monotonic() - started
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    left = sorted(str(path.relative_to(run)) for path in run.glob(side.saving)) if in_save else []
    return {"in_save": in_save, "after_seconds": round(after, 3), "half_written": left}


def start(side: Side, run: Path) -> subprocess.Popen[bytes]:
    with open(run.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            side.command(run), env=environment(), cwd=ROOT, stdout=log, stderr=log, start_new_session=True
        )


def outcome(side: Side, run: Path) -> str:
    path = run / side.result
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "nothing"


def fresh(run: Path) -> Path:
    shutil.rmtree(run, ignore_errors=True)
    run.with_suffix(".log").unlink(missing_ok=True)
    return run


if __name__ == "__main__":
    main()
