"""A long run: does its memory grow, do its files stay open, do its checkpoints stay what they were told to keep?

    python -m benchmarks.long --seconds 7200 --out benchmarks/results/long.json

One process of the command line trains LoRA on the embedded model, with dropout, validation, TensorBoard and checkpoints
every SAVE_EVERY steps, and is looked at from outside every EVERY seconds: resident memory and open files (`/proc`),
the step it has come to, the checkpoints that lie there. After `--seconds` it is told to stop (SIGTERM), which
must end in exit code 3 within ten seconds with a checkpoint of the last step.

The slope is that of the straight line with the least squares through what was seen after the first fifth of the steps,
in MB per 1,000 steps. Exit code 1 when it is 1 or more, when open files grew, or when the end was another one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from .small import ROOT, environment, machine, recipe, write

EVERY = 5.0  # seconds
SAVE_EVERY, EVALUATE_EVERY, KEEP = 50, 500, 3
RECIPE = recipe(
    "long",
    "rank: 8, alpha: 16, dropout: 0.05",
    f"max_steps: 1000000, lr: 1e-5, save_every: {SAVE_EVERY}, keep_last: {KEEP}, evaluate_every: {EVALUATE_EVERY}, "
    "listeners: [tensorboard]",
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("--seconds", type=float, default=7200)
    arguments.add_argument("--out", type=Path, required=True)
    arguments.add_argument("--work", type=Path, default=Path("build/long"))
    asked = arguments.parse_args()
    work = asked.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "recipe.yaml").write_text(RECIPE)
    run = work / "run"
    command = [sys.executable, "-m", "fitout.cli.app", "run", str(work / "recipe.yaml"), "--out", str(run)]
    with open(work / "run.log", "ab") as log:
        process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=log, stderr=log)
    seen = watch(process, run, asked.seconds)
    if process.poll() is not None or len(seen) < 10:
        process.kill()
        sys.exit(f"the run ended by itself, or hardly began: see {work / 'run.log'}")
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    stopped = round(time.monotonic() - told, 1)
    result = {"machine": machine(1), "seen": seen, **judged(seen), **stood(run), "exit_code": code}
    result |= {"stop_seconds": stopped, "steps_behind": last_step(run) - last_checkpoint(run)}
    write(asked.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "seen"}, indent=2))
    steady = result["slope_mb_per_1000_steps"] < 1 and result["open_files_last"] <= result["open_files_first"]
    good = steady and code == 3 and result["stop_seconds"] <= 10 and not result["steps_behind"]
    sys.exit(0 if good else 1)


def watch(process: subprocess.Popen[bytes], run: Path, seconds: float) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []
    started = time.monotonic()
    while time.monotonic() - started < seconds and process.poll() is None:
        time.sleep(EVERY)
        step = last_step(run)
        if step:
            with suppress(OSError):  # it has just ended
                status = Path(f"/proc/{process.pid}/status").read_text()
                resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
                seen.append({
                    "seconds": round(time.monotonic() - started), "step": step, "mb": round(resident / 1024, 2),
                    "open_files": len(os.listdir(f"/proc/{process.pid}/fd")),
                    "checkpoints": len(list(run.glob("checkpoints/step-*"))),
                })  # fmt: skip
    return seen


def judged(seen: list[dict[str, Any]]) -> dict[str, Any]:
    """Of what was seen after the first fifth of the steps."""
    settled = [one for one in seen if one["step"] >= seen[-1]["step"] / 5]
    line = statistics.linear_regression([one["step"] / 1000 for one in settled], [one["mb"] for one in settled])
    tenth = max(len(settled) // 10, 1)
    return {
        "steps": seen[-1]["step"],
        "seconds": seen[-1]["seconds"],
        "checkpoints_kept_at_most": max(one["checkpoints"] for one in seen),
        "slope_mb_per_1000_steps": round(line.slope, 4),
        "mb_first": round(statistics.median(one["mb"] for one in settled[:tenth]), 1),
        "mb_last": round(statistics.median(one["mb"] for one in settled[-tenth:]), 1),
        "open_files_first": max(one["open_files"] for one in settled[:tenth]),
        "open_files_last": max(one["open_files"] for one in settled[-tenth:]),
    }


def stood(run: Path) -> dict[str, Any]:
    """How long the training stood for its checkpoints."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = [row["seconds"] for row in rows if row.get("event") == "saved"]
    return {
        "checkpoints_written": len(seconds),
        "checkpoint_seconds": {
            "median": statistics.median(seconds),
            "longest": max(seconds),
            "all": round(sum(seconds), 1),
        },
    }


def last_step(run: Path) -> int:
    log = run / "log.jsonl"
    if not log.exists():
        return 0
    with open(log, "rb") as stream:
        stream.seek(max(log.stat().st_size - 4096, 0))
        lines = stream.read().decode("utf-8", "replace").splitlines()
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # cut by the beginning of what was read, or being written
    return 0


def last_checkpoint(run: Path) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.glob("checkpoints/step-*")), default=-1)


if __name__ == "__main__":
    main()
