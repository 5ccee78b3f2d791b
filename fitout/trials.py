"""The runs of a comparison: each a process of its own over its own run directory, started, watched and recognised.

A process of its own, because the peak of memory that a run reports is its process's, and because a run that does not
fit, lacks a package or is killed must not take the others with it. The parent stays small (no torch): on Linux a
process starts with its parent's peak. Runs that are finished are recognised, a half-done one is gone on with by the
same `fitout run` that anybody would type; so a comparison that was stopped or killed is gone on with by itself.

What the runs do, and with which settings, is not decided here: a recipe comes in as text (`verbs.compare`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import FitoutError, RequestError, RunExistsError, Stopped
from .files import read_json, read_jsonl, write_json, write_text
from .lock import is_held
from .rundir import RunDir

TIMED_STEPS = 10  # of a timing run; the first two, which warm up, do not count
SWEEP_SHARE = 3  # a learning rate is first tried for a third of the steps
REACH = 5  # half decades that a sweep may go from the default rate, to either side

# ---------------------------------------------------------------------------------------------------------------------
# What is asked for


@dataclass(frozen=True)
class Budget:
    """What every run of every method may use: optimizer steps, tokens trained on, or minutes of optimizer steps."""

    kind: Literal["steps", "tokens", "minutes"]
    amount: float

    def __str__(self) -> str:
        return f"{self.amount:,g} {self.kind}"


def parse_budget(text: str) -> Budget:
    """`steps=200`, `tokens=1e6` or `minutes=10`."""
    kind, equals, amount = text.partition("=")
    try:
        value = float(amount)
    except ValueError:
        value = math.nan
    whole = kind == "minutes" or value.is_integer()
    if kind not in ("steps", "tokens", "minutes") or not equals or not 0 < value < math.inf or not whole:
        raise RequestError(
            f"--budget does not understand {text!r}", hint="For example: steps=200, tokens=1e6 or minutes=10"
        )
    return Budget(kind, value)  # type: ignore[arg-type]


def parse_rates(texts: Sequence[str], known: Sequence[str]) -> dict[str, list[float]]:
    """`1e-4,3e-4` for every method, `lora=1e-4,3e-4` for one; {method: rates in ascending order}, "" for every one."""
    rates: dict[str, list[float]] = {}
    for text in texts:
        method, equals, listed = text.rpartition("=")
        if equals and method not in known:
            raise RequestError(f"--lrs names {method!r}", hint=f"Methods of this comparison: {', '.join(known)}")
        try:
            values = sorted({float(one) for one in listed.split(",")})
        except ValueError:
            values = [math.nan]
        if not all(0 < value < math.inf for value in values):
            raise RequestError(
                f"--lrs does not understand {text!r}", hint="For example: --lrs 1e-4,3e-4 or --lrs lora=1e-4,3e-4"
            )
        rates[method] = values
    return rates


# ---------------------------------------------------------------------------------------------------------------------
# The learning rate


@dataclass(frozen=True)
class Sweep:
    """The rates that were tried with their validation losses (infinite where training diverged), and the lowest's.

    `at_edge` says that the best is the lowest or highest rate tried, so that a better one may lie beyond. `whole` are
    the losses of rates that were tried again for all steps.
    """

    tried: dict[float, float]
    chosen: float
    at_edge: bool
    whole: dict[float, float] = field(default_factory=dict)


def sweep(rates: Sequence[float], loss_of: Callable[[float], float]) -> Sweep:
    """Tries all of the given rates; the lowest validation loss is chosen, of equal ones the lowest rate."""
    return _chosen({rate: loss_of(rate) for rate in rates})


def climb(default: float, loss_of: Callable[[float], float]) -> Sweep:
    """Tries the default rate and its neighbours half a decade (about a factor of 3) away, then goes on to the side that
    is still falling, until the best has a worse one on both sides or REACH is used up."""
    losses: dict[int, float] = {}
    todo = [0, 1, -1]
    while todo:
        losses.update({step: loss_of(rate_at(default, step)) for step in todo})
        best = min(losses, key=lambda step: (losses[step], step))
        beyond = best + 1 if best == max(losses) else best - 1
        todo = [beyond] if beyond not in losses and abs(beyond) <= REACH else []
    return _chosen({rate_at(default, step): loss for step, loss in losses.items()})


def settle(found: Sweep, loss_of: Callable[[float], float]) -> Sweep:
    """A part of the steps favours larger rates than all of them do: the best rate and those below it are tried for all
    steps, downwards until the loss gets worse, and the lowest loss is chosen."""
    whole: dict[float, float] = {}
    for rate in sorted((rate for rate in found.tried if rate <= found.chosen), reverse=True):
        whole[rate] = loss_of(rate)
        if whole[rate] > min(whole.values()):
            break
    chosen = _chosen(whole).chosen
    return Sweep(found.tried, chosen, chosen in (min(found.tried), max(found.tried)), whole)


def rate_at(default: float, step: int) -> float:
    """`step` half decades from the default, in round figures: 2e-5, 6e-5, 2e-4, ..."""
    return float(f"{default * 10 ** (step // 2) * (3 if step % 2 else 1):.3g}")


def _chosen(tried: dict[float, float]) -> Sweep:
    best = min(tried, key=lambda rate: (tried[rate], rate))
    if math.isinf(tried[best]):
        raise TrialFailed("training diverged at every learning rate tried: " + ", ".join(f"{r:g}" for r in tried))
    return Sweep(dict(sorted(tried.items())), best, len(tried) > 1 and best in (min(tried), max(tried)))


# ---------------------------------------------------------------------------------------------------------------------
# Trials


class TrialFailed(FitoutError):
    """One run could not be done; the others go on."""


@dataclass(frozen=True)
class Trial:
    """One run: `timing` measures a step, `sweep` tries a learning rate for a part of the steps, `whole` for all, `runs`
    is what counts. Only `runs` are evaluated; the others have no test question in their folder."""

    stage: Literal["timing", "sweep", "whole", "runs"]
    method: str
    steps: int
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        return {
            "timing": f"timing/{self.method}",
            "sweep": f"sweep/{self.method}/lr-{self.lr or 0:g}",
            "whole": f"whole/{self.method}/lr-{self.lr or 0:g}",
            "runs": f"runs/{self.method}/seed-{self.seed}",
        }[self.stage]

    @property
    def told(self) -> str:
        rate = f"learning rate {self.lr or 0:g}"
        what = {"timing": "timing", "sweep": rate, "whole": f"{rate}, all steps", "runs": f"seed {self.seed}"}
        return f"{self.method}, {what[self.stage]}"


@dataclass(frozen=True)
class Entry:
    """A method in the race: its settings, and the learning rates to choose from (None: around its default)."""

    kind: str
    settings: dict[str, Any]
    default_lr: float
    rates: list[float] | None


class Trials:
    """A comparison's folder.

    request.json             what is compared; another request is refused
    prepared/                the data, prepared once, hard-linked into every run
    timing/ sweep/ whole/ runs/   run directories: METHOD, METHOD/lr-RATE (both), METHOD/seed-N
    recipes/ logs/           what each run was given, and what it said
    compare.html compare.json
    """

    def __init__(
        self,
        folder: Path,
        recipe_of: Callable[[Trial], str],
        say: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ):
        self.folder, self.recipe_of, self.say, self.progress = folder, recipe_of, say, progress
        self.prepared = RunDir(folder / "prepared")
        self.page, self.result = folder / "compare.html", folder / "compare.json"
        self._request = folder / "request.json"
        self._stopping: str | None = None

    # the request and the data

    @contextmanager
    def owned(self, request: dict[str, Any]) -> Iterator[None]:
        """Holds the folder for this process; refuses a request that the runs in it were not made for."""
        with RunDir(self.folder).owned():
            before = read_json(self._request) if self._request.exists() else {}
            asked = json.loads(json.dumps(request))
            differs = [key for key in asked if before and before["request"].get(key) != asked[key]]
            if differs:
                raise RunExistsError(
                    f"this comparison was begun with another {', another '.join(differs)}",
                    where=str(self.folder),
                    harm="Runs under different conditions would stand side by side.",
                    hint="Undo the change, or choose another --out. More methods and more seeds may be added.",
                )
            write_json(self._request, {"data": before.get("data"), "request": asked})
            yield

    def prepare(self, recipe: str) -> None:
        """The data of all runs, prepared in a process of its own; refused when they changed since the first time."""
        self._call("prepared", ["data", "prepare"], recipe, self.prepared, lambda: None)
        for line in (self.folder / "logs" / "prepared.txt").read_text(encoding="utf-8").splitlines():
            self.say(line)
        known, now = read_json(self._request), read_json(self.prepared.data / "fingerprint.json")["fingerprint"]
        if known["data"] not in (None, now):
            raise RunExistsError(
                "the data are not those this comparison was begun with",
                where=str(self.folder),
                harm="Methods would be compared on different data.",
                hint="Put the data back, or choose another --out.",
            )
        write_json(self._request, {**known, "data": now})

    def _give_data(self, trial: Trial, run: RunDir) -> None:
        """Links the prepared data into a run's folder; for all but `runs` without a single test question.

        The fingerprint comes last: without it the folder counts as unfinished.
        """
        from .data.store import write_part

        if (run.data / "fingerprint.json").exists():
            return
        run.data.mkdir(parents=True, exist_ok=True)
        files = [file for file in self.prepared.data.iterdir() if not file.name.startswith(".")]
        for file in sorted(files, key=lambda file: file.name == "fingerprint.json"):
            target = run.data / file.name
            target.unlink(missing_ok=True)
            if trial.stage == "runs" or not file.name.startswith(("test.", "details.", "report.html")):
                _link(file, target)
            elif file.suffix == ".arrow":
                write_part(target, [])

    # one method

    def race(self, entry: Entry, seeds: Sequence[int], steps: int | None, minutes: float) -> dict[str, Any]:
        """Everything one method does: timing (where `steps` is None, minutes are what is given), sweep, seeds.

        Always comes back: `failed` says what could not be done and why, `runs` holds the seeds that could.
        """
        told: dict[str, Any] = {
            "kind": entry.kind,
            "settings": entry.settings,
            "default_lr": entry.default_lr,
            "steps": steps,
            "rates": {},
            "whole": {},
            "lr": None,
            "at_edge": False,
            "runs": {},
            "failed": {},
        }
        try:
            if steps is None:
                told["steps"] = steps = self._steps_in(minutes, entry, seeds[0])
            found = self._sweep(entry, steps, seeds[0])
        except TrialFailed as failure:
            self._note_failure(told, "all", failure)
            return told
        told.update(rates=_named(found.tried), whole=_named(found.whole), lr=found.chosen)
        told["at_edge"] = found.at_edge
        for seed in seeds:
            try:
                run = self.do(Trial("runs", entry.kind, steps, seed, found.chosen))
                told["runs"][str(seed)] = figures(run)
            except TrialFailed as failure:
                self._note_failure(told, str(seed), failure)
        return told

    def _steps_in(self, minutes: float, entry: Entry, seed: int) -> int:
        seconds = self.step_seconds(Trial("timing", entry.kind, TIMED_STEPS, seed, entry.default_lr))
        steps = max(1, int(60 * minutes / seconds))
        self.say(f"{entry.kind}: {seconds:.3g} s a step, so {steps:,} steps in {minutes:g} minutes")
        return steps

    def _sweep(self, entry: Entry, steps: int, seed: int) -> Sweep:
        """The learning rate, chosen on the validation part with one seed: for a third of the steps, then for all."""
        shorter = math.ceil(steps / SWEEP_SHARE)
        if entry.rates and len(entry.rates) == 1:
            return Sweep({}, entry.rates[0], False)

        def loss_of(rate: float) -> float:
            return self.loss(Trial("sweep", entry.kind, shorter, seed, rate))

        found = sweep(entry.rates, loss_of) if entry.rates else climb(entry.default_lr, loss_of)
        found = settle(found, lambda rate: self.loss(Trial("whole", entry.kind, steps, seed, rate)))
        edge = "; it is at the edge of what was tried" if found.at_edge else ""
        self.say(f"{entry.kind}: learning rate {found.chosen:g} of {len(found.tried)} (validation loss){edge}")
        return found

    def _note_failure(self, told: dict[str, Any], what: str, failure: TrialFailed) -> None:
        told["failed"][what] = {"reason": failure.message, "log": failure.where}
        self.say(f"{told['kind']}{'' if what == 'all' else f', seed {what}'} failed: {failure.message}")

    # one run

    def run_of(self, trial: Trial) -> RunDir:
        return RunDir(self.folder / trial.name)

    def finished(self, trial: Trial) -> bool:
        """Whether this very run is done; one with another learning rate (of an earlier version's choice) is not it."""
        run = self.run_of(trial)
        status = run.read_status()
        wanted = "done" if trial.stage == "runs" else "trained"
        if status.get("status") != wanted or status.get("trained_steps") != trial.steps:
            return False
        return trial.lr is None or _train_settings(run)["lr"] == trial.lr

    def do(self, trial: Trial) -> RunDir:
        """The run of a trial, done or gone on with where that is needed. Raises TrialFailed with the reason, Stopped
        when this process was asked to stop."""
        run = self.run_of(trial)
        self._wait_until_free(run, trial)
        if self.finished(trial):
            self.say(f"{trial.told}: done already")
            return run
        self._give_data(trial, run)
        began = time.monotonic()
        verb = ["run"] if trial.stage == "runs" else ["train", "--resume"]
        self._call(trial.name, verb, self.recipe_of(trial), run, lambda: self._tell_progress(trial, run))
        self._drop_checkpoints(trial, run)
        loss = validation_loss(run)
        told = "" if loss is None else f"validation loss {loss:.4f}, "
        self.say(f"{trial.told}: {told}{time.monotonic() - began:.0f} s")
        return run

    def loss(self, trial: Trial) -> float:
        """The validation loss of a trial; infinite when training diverged."""
        try:
            loss = validation_loss(self.do(trial))
        except TrialFailed:
            if not _diverged(self.run_of(trial)):
                raise
            self.say(f"{trial.told}: diverged")
            return math.inf
        return loss if loss is not None and math.isfinite(loss) else math.inf

    def step_seconds(self, trial: Trial) -> float:
        """Seconds of one optimizer step, the median of a short training."""
        rows = [row for row in read_jsonl(self.do(trial).log) if "event" not in row]
        return statistics.median(row["tokens"] / row["tokens_per_second"] for row in rows[2:])

    def _drop_checkpoints(self, trial: Trial, run: RunDir) -> None:
        """A finished run needs no checkpoint (they hold the optimizer as well), a sweep's not even its weights."""
        dropped = [run.checkpoints] if trial.stage == "runs" else [run.checkpoints, run.adapter, run.model]
        for folder in dropped:
            shutil.rmtree(folder, ignore_errors=True)

    def _wait_until_free(self, run: RunDir, trial: Trial) -> None:
        """A run whose parent was killed works on; it is waited for, not begun a second time."""
        told = False
        while is_held(run.lock_file):
            if not told:
                self.say(f"{trial.told}: a process of an earlier call still works on it; waiting for it to end")
                told = True
            time.sleep(0.5)

    def _tell_progress(self, trial: Trial, run: RunDir) -> None:
        step = _last_step(run.log)
        if step:
            self.progress(trial.told, min(step, trial.steps - 1), trial.steps)

    # processes

    def _call(self, name: str, verb: list[str], recipe: str, run: RunDir, watch: Callable[[], None]) -> None:
        """`fitout VERB RECIPE --out RUN` in a process of its own, which says what it says into logs/."""
        if self._stopping:
            raise self._stopped()
        flat = name.replace("/", "-")
        asked, said = self.folder / "recipes" / f"{flat}.yaml", self.folder / "logs" / f"{flat}.txt"
        write_text(asked, recipe)
        said.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-P", "-m", "fitout.cli.app", *verb, str(asked), "--out", str(run.path)]
        with open(said, "wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # a Ctrl-C reaches it once, through this process
            )
            with self._signals_to(process):
                code = _wait(process, watch)
        if self._stopping:
            raise self._stopped()
        if code:
            failure = TrialFailed(_reason(said.read_text(encoding="utf-8", errors="replace"), code), where=str(said))
            failure.exit_code = max(1, code)
            raise failure

    @contextmanager
    def _signals_to(self, process: subprocess.Popen) -> Iterator[None]:
        """Passes stop signals on to the running process, which then saves a checkpoint; ends it if we end."""

        def stop(number: int, frame: object) -> None:
            self._stopping = signal.Signals(number).name
            process.send_signal(signal.SIGTERM)

        ours = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if ours else ()
        before = {number: signal.signal(number, stop) for number in caught}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if process.poll() is None:
                process.terminate()
                process.wait()

    def _stopped(self) -> Stopped:
        return Stopped(
            f"stopped by {self._stopping}; finished runs are kept, the one at work saved a checkpoint if it could",
            hint="Go on with the same command.",
        )


def _named(losses: dict[float, float]) -> dict[str, float]:
    return {f"{rate:g}": loss for rate, loss in losses.items()}


def figures(run: RunDir) -> dict[str, Any]:
    """What a finished run cost: its peak of memory while training, its time, its size on disk."""
    status, report = run.read_status(), read_json(run.evaluation_report)
    training = status["training"]
    rows = [row for row in read_jsonl(run.log) if "event" not in row]
    trained = run.adapter if run.adapter.exists() else run.model
    return {
        "run": str(run.path),
        "memory_mb": max(row["memory_mb"] for row in rows),
        "train_seconds": training["step_seconds"],
        "step_seconds": training["step_seconds"] / max(1, training["steps"]),
        "tokens": training["tokens"],
        "answer_seconds": report["counts"]["tuned"]["seconds"],
        "disk_bytes": sum(file.stat().st_size for file in trained.glob("*.safetensors")),
        "trained_parameters": training["trained_parameters"],
        "parameters": training["parameters"],
        "validation_loss": validation_loss(run),
        "best_step": training["best_step"],
        "skipped_steps": training["skipped_steps"],
        "device": status["device"],
        "precision": status["precision"],
    }


def validation_loss(run: RunDir) -> float | None:
    """The validation loss of the weights that the run ended with; None where there is no validation part."""
    training = run.read_status().get("training", {})
    points = training.get("validation") or []
    best = _train_settings(run)["keep"] == "best"
    kept = [loss for step, loss in points if best and step == training["best_step"]]
    return (kept or [loss for _, loss in points[-1:]] or [None])[0]


def _train_settings(run: RunDir) -> dict[str, Any]:
    return yaml.safe_load(run.recipe.read_text(encoding="utf-8"))["train"]


def _diverged(run: RunDir) -> bool:
    """Whether the last step that a run wrote down had no finite gradient."""
    rows = [row for row in read_jsonl(run.log) if "event" not in row] if run.log.exists() else []
    return bool(rows) and rows[-1]["grad_norm"] is None


def _wait(process: subprocess.Popen, watch: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            watch()


def _environment() -> dict[str, str]:
    """This process's, with the package this process runs first on the path."""
    here = str(Path(__file__).resolve().parents[1])
    paths = [here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def _reason(said: str, code: int) -> str:
    """Why a process failed, in its own words: its `error` lines, else its last one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [at for at, line in enumerate(lines) if line.startswith("error ")]
    if errors:
        first, *rest = lines[errors[-1] :]
        return " ".join([first.removeprefix("error ") + ("." if rest and first[-1].isalnum() else ""), *rest])
    if code == -signal.SIGKILL:
        return "the system killed it (SIGKILL), most likely because memory ran out"
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return lines[-1] if lines else f"it ended with exit code {code} and said nothing"


def _last_step(log: Path) -> int:
    """The last step in a log that is being written."""
    if not log.exists():
        return 0
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().split(b"\n")[1:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def _link(file: Path, target: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)
