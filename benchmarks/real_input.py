"""Fitout on data and really pretrained models that others made: `python -m benchmarks.real_input --out FILE`.

Every case is a recipe run by the real command line in a process of its own (`fitout run RECIPE`). Afterwards

- its counts are compared with a count of the rows in the source files and of the lines in quarantine and removed,
- plain transformers and peft judge its files (`side_plain.py`),
- for two cases the same recipe is run again, killed with SIGKILL at random steps, run once more, and the final weights
  are compared byte by byte with those of the run that was left alone.

`--only NAME` (again and again) does single cases and keeps the others in FILE. Exit code 1 when a check fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .small import environment, machine, write

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("FITOUT_SHARED", ROOT.parent / "shared"))
DATA, MODELS = SHARED / "data", SHARED / "models"
BATCH, STEPS, SAVE_EVERY, KILLS = 16, 150, 20, 3
RATES = {"lora": 3e-3, "full": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 8, "alpha": 16, "targets": "all-linear"},
    "full": {"kind": "full"},
}
BIG = {"train": 0.96, "validation": 0.02, "test": 0.02}  # of thousands of rows; the validation should take seconds
SMALL = {"train": 0.8, "validation": 0.1, "test": 0.1}
SAME_LOGITS = 1e-5  # largest difference over the largest logit, fp32
FREE = ["evaluate.limit=2", "evaluate.retention=off", "evaluate.metrics=[f1]"]  # does not touch the training


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    sources: list[dict[str, Any]]
    base: str = "stories260K"
    objective: str = "sft"
    max_length: int = 512
    steps: int = STEPS
    split: dict[str, float] = field(default_factory=lambda: SMALL)
    killed: bool = False


def cases() -> list[Case]:
    gsm8k = [
        {"path": str(DATA / "gsm8k" / "train.jsonl"), "columns": {"prompt": "question", "completion": "answer"}},
        {"path": str(DATA / "gsm8k" / "test.jsonl"), "columns": {"prompt": "question", "completion": "answer"},
         "split": "test"},
    ]  # fmt: skip
    sets: dict[str, tuple[list[dict[str, Any]], dict[str, float]]] = {
        "alpaca-en": ([{"path": str(DATA / "llamafactory" / "alpaca_en_demo.json")}], SMALL),
        "alpaca-zh": ([{"path": str(DATA / "llamafactory" / "alpaca_zh_demo.json")}], SMALL),
        "gpteacher": ([{"path": str(DATA / "gpteacher" / "codegen-instruct.json")}], BIG),
        "gsm8k": (gsm8k, {"train": 0.98, "validation": 0.02, "test": 0}),
    }
    killed = {"alpaca-en-lora", "alpaca-zh-full"}
    made = [
        Case(f"{name}-{method}", method, sources, split=split, killed=f"{name}-{method}" in killed)
        for name, (sources, split) in sets.items()
        for method in METHODS
    ]
    text = [
        {"path": "train.txt", "format": "text"},
        {"path": "validation.txt", "format": "text", "split": "validation"},
    ]
    return [
        *made,
        Case("shakespeare-full", "full", text, "babyllama", "pretrain", max_length=256, steps=100),
    ]


def main() -> None:
    arguments = _arguments()
    known = cases()
    wanted = [case for case in known if not arguments.only or case.name in arguments.only]
    if unknown := set(arguments.only) - {case.name for case in known}:
        sys.exit(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in known)}")
    out = Path(arguments.out)
    done = json.loads(out.read_text())["cases"] if out.exists() and arguments.only else {}
    work = Path(arguments.work or tempfile.mkdtemp(prefix="real-input-"))
    for case in wanted:
        print(f"{case.name} ...", flush=True)
        done[case.name] = _run_case(case, work, arguments.threads)
        for what, held in done[case.name]["checks"].items():
            print(f"  {'ok  ' if held else 'FAIL'} {what}", flush=True)
        ordered = {known_case.name: done[known_case.name] for known_case in known if known_case.name in done}
        write(out, {"machine": machine(arguments.threads), "cases": ordered})
    if not arguments.work:
        shutil.rmtree(work)
    failed = [f"{case.name}: {what}" for case in wanted for what, held in done[case.name]["checks"].items() if not held]
    sys.exit("\n".join(failed) or 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_input", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "real-input.json"))
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="one case; may be given again")
    parser.add_argument("--work", help="where the runs are made, and kept (default: a folder that is removed)")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


# one case


def _run_case(case: Case, work: Path, threads: int) -> dict[str, Any]:
    folder = work / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write_texts(folder, case)
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(case), sort_keys=False))
    run, started = folder / "run", time.perf_counter()
    _fitout(recipe, run, threads)
    seconds = time.perf_counter() - started
    result = {
        "method": case.method,
        "base": case.base,
        "seconds": round(seconds, 1),
        "rows": _rows(case, run, folder),
        "training": _training(run),
        **_evaluation(run),
        "plain": _judged_by_plain_tools(case, run),
        "kills": _kills(case, recipe, run, threads) if case.killed else [],
    }
    result["checks"] = _checks(case, result)
    return result


def _recipe(case: Case) -> dict[str, Any]:
    return {
        "name": case.name,
        "model": {"base": str(MODELS / case.base)},
        "data": {"sources": case.sources, "split": case.split, "max_length": case.max_length},
        "method": METHODS[case.method],
        "objective": {"kind": case.objective},
        "train": {
            "max_steps": case.steps, "lr": RATES[case.method], "batch_size": BATCH, "precision": "fp32", "seed": 0,
            "save_every": SAVE_EVERY, "evaluate_every": 50, "listeners": [],
        },
        "evaluate": {"limit": 32, "max_new_tokens": 48, "retention": "retention.txt"},
    }  # fmt: skip


def _write_texts(folder: Path, case: Case) -> None:
    """The text that retention is measured on; of plain text: a book cut at line ends into three parts."""
    if case.objective != "pretrain":
        (folder / "retention.txt").write_text((DATA / "text" / "wizard_of_oz.txt").read_text()[2_000:22_000])
        return
    lines = (DATA / "text" / "tiny_shakespeare.txt").read_text().splitlines(keepends=True)
    last, middle = int(len(lines) * 0.98), int(len(lines) * 0.96)
    for name, part in (("train", lines[:middle]), ("validation", lines[middle:last]), ("retention", lines[last:])):
        (folder / f"{name}.txt").write_text("".join(part))


def _fitout(recipe: Path, run: Path, threads: int, changes: list[str] | None = None) -> None:
    done = subprocess.run(
        _command(recipe, run, changes), env=environment(threads, COLUMNS="120"), capture_output=True, text=True
    )
    run.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"fitout run {recipe} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def _command(recipe: Path, run: Path, changes: list[str] | None = None) -> list[str]:
    sets = [word for change in changes or [] for word in ("--set", change)]
    return [sys.executable, "-m", "fitout.cli.app", "run", str(recipe), "--out", str(run), *sets]


# what a run says, and what the files say


def _rows(case: Case, run: Path, folder: Path) -> dict[str, Any]:
    report = json.loads((run / "data" / "report.json").read_text())
    return {
        "in_files": sum(_count_rows(folder / source["path"]) for source in case.sources),
        "read": report["samples"],
        "kept": report["kept"],
        "removed": report["removed"],
        "removed_lines": _lines(run / "data" / "removed.jsonl"),
        "quarantined": report["quarantined"],
        "quarantined_lines": _lines(run / "data" / "quarantine.jsonl"),
        "trained_tokens": report["parts"]["train"]["supervised"],
        "tokens": report["parts"]["train"]["tokens"],
        "unknown_tokens": report["parts"]["train"]["unknown"],
    }


def _count_rows(path: Path) -> int:
    """Rows of a source, counted without Fitout; a plain text is one."""
    if path.suffix == ".txt":
        return 1
    return len(json.loads(path.read_text())) if path.suffix == ".json" else _lines(path)


def _lines(path: Path) -> int:
    return sum(1 for line in path.read_text().split("\n") if line.strip()) if path.exists() else 0


def _training(run: Path) -> dict[str, Any]:
    status = json.loads((run / "run.json").read_text())
    wanted = ("steps", "base_loss", "best_loss", "best_step", "step_seconds", "tokens_per_second", "skipped_steps")
    return {key: status["training"][key] for key in wanted}


def _evaluation(run: Path) -> dict[str, Any]:
    report = json.loads((run / "evaluation" / "report.json").read_text())

    def pair(score: dict[str, Any]) -> dict[str, Any]:
        return {
            "base": score["base"]["value"], "tuned": score["tuned"]["value"], "n": score["base"]["n"],
            "difference": [score["difference"][key] for key in ("value", "low", "high")],
        }  # fmt: skip

    return {
        "scores": {score["name"]: pair(score) for score in report["scores"]},
        "retention": {"perplexity": pair(report["retention"]["perplexity"]), "tokens": report["retention"]["tokens"]},
    }


def _judged_by_plain_tools(case: Case, run: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.side_plain", str(MODELS / case.base), str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment(COLUMNS="120"), capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr[-1000:]}
    return json.loads(done.stdout.splitlines()[-1])


# kill -9


def _kills(case: Case, recipe: Path, run: Path, threads: int) -> list[dict[str, Any]]:
    """The recipe again, killed at a random step of each of KILLS stretches (seeded by the case's name), each
    then run to its end."""
    draw = random.Random(case.name)
    kills = []
    first, span = SAVE_EVERY + 1, case.steps - SAVE_EVERY - 1
    for step in [first + draw.randrange(span * n // KILLS, span * (n + 1) // KILLS) for n in range(KILLS)]:
        other = run.with_name(f"killed-{step}")
        seen = _kill_at(step, recipe, other, threads)
        _fitout(recipe, other, threads, FREE)
        resumed = [row["step"] for row in _log(other) if row.get("event") == "resumed"]
        steps = {row["step"]: row["loss"] for row in _log(other) if "event" not in row}
        whole = {row["step"]: row["loss"] for row in _log(run) if "event" not in row}
        kills.append({
            "killed_at": seen, "went_on_from": resumed, "same_weights": _weights(other) == _weights(run),
            "same_losses": steps == whole, "sha256": _weights(other),
        })  # fmt: skip
        shutil.rmtree(other)
    return kills


def _kill_at(step: int, recipe: Path, run: Path, threads: int) -> int:
    """Starts a run, kills it when its log shows `step`, and says at which step it really was."""
    with open(run.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(
            _command(recipe, run, FREE), env=environment(threads, COLUMNS="120"), stdout=log, stderr=log
        )
        while _last_step(run) < step:
            if process.poll() is not None:
                sys.exit(f"the run ended by itself before step {step}: see {log.name}")
            time.sleep(0.01)
        process.kill()
        process.wait()
    return _last_step(run)


def _last_step(run: Path) -> int:
    return max((row["step"] for row in _log(run)), default=0)


def _log(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's log so far."""
    path = run / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def _weights(run: Path) -> str:
    files = [*run.glob("adapter/adapter_model.safetensors"), *run.glob("model/model.safetensors")]
    return hashlib.sha256(files[0].read_bytes()).hexdigest()


# checks


def _checks(case: Case, result: dict[str, Any]) -> dict[str, bool]:
    rows, training, plain = result["rows"], result["training"], result["plain"]
    removed, quarantined = sum(rows["removed"].values()), sum(rows["quarantined"].values())
    checks = {
        "every row of the files was read": rows["in_files"] == rows["read"],
        "rows add up": rows["read"] == sum(rows["kept"].values()) + removed + quarantined,
        "removed and quarantined rows are in their files": (rows["removed_lines"], rows["quarantined_lines"])
        == (removed, quarantined),
        "validation loss fell": training["best_loss"] < training["base_loss"],
        "no step was skipped": training["skipped_steps"] == 0,
        "plain transformers loads it": plain.get("finite", False) and not plain["loading_problems"],
    }
    if case.method == "lora":
        checks["merged = base + adapter in peft"] = plain.get("max_relative", 1) <= SAME_LOGITS
    if case.killed:
        kills = result["kills"]
        checks["killed and run again = left alone, byte by byte"] = all(kill["same_weights"] for kill in kills)
        checks["killed and run again: the same losses"] = all(kill["same_losses"] for kill in kills)
    return checks


if __name__ == "__main__":
    main()
