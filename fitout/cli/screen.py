"""What people see: lines, a progress bar with the time left, result tables. Machines get one JSON object (--json)."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..files import read_json
from ..rundir import RunDir
from ..verbs import Screen

if TYPE_CHECKING:
    from ..export.bundle import Exported
    from .advise import Advice
    from .peers import Carried


class Terminal:
    """A screen for one verb. With `machine` everything but the last JSON object goes to standard error."""

    def __init__(self, machine: bool):
        self.machine = machine
        quiet = os.environ.get("RANK", "0") != "0"  # under torchrun only the first rank draws
        self.console = Console(stderr=machine, highlight=False, quiet=quiet)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        self.verbs = Screen(
            say=self.say,
            listeners=lambda: [TrainingBar(self)],
            data_progress=self._data,
            evaluation_progress=self._evaluation,
        )
        self._tasks: dict[str, Any] = {}

    def say(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)

    def bar(self, name: str, total: int | None, done: int, note: str = "") -> None:
        """Moves the bar `name`, making it first when it is not there; a full one is taken away."""
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(name, total=total, note=note)
        self.progress.update(self._tasks[name], completed=done, note=note)
        if total is not None and done >= total:
            self.progress.remove_task(self._tasks.pop(name))

    def _data(self, stage: str, done: int) -> None:
        if done >= 10_000:
            self.bar(stage, None, done)

    def _evaluation(self, what: str, done: int, total: int) -> None:
        self.bar(what, total, done)

    # results

    def show_run(self, directory: RunDir) -> None:
        """Where everything is, the scores when there are any, and what to do next."""
        status = directory.read_status()
        if self.machine:
            if self.console.quiet:  # another rank than the first
                return
            print(json.dumps({"run": str(directory.path), **status, **_scores(directory)}, ensure_ascii=False))
            return
        if directory.evaluation_report.exists():
            from ..evaluate.report import summary_table
            from ..evaluate.suite import from_report

            self.console.print(summary_table(from_report(read_json(directory.evaluation_report))))
        table = Table(show_header=False, box=None, pad_edge=False)
        for what, path in (
            ("report", directory.evaluation_page),
            ("data report", directory.data_page),
            ("quarantine", directory.quarantine),
            ("adapter", directory.adapter),
            ("model", directory.model),
            ("merged model", directory.merged),
        ):
            if path.exists():
                table.add_row(what, Text(str(path)))
        if directory.adapter.exists() or directory.model.exists():
            table.add_row("talk with it", Text(f"fitout chat {directory.path}"))
            table.add_row("serve it", Text(f"fitout serve {directory.path}"))
        self.console.print(table)

    def show_carried(self, carried: Carried, to: Path) -> None:
        """What of another tool's configuration became a recipe, and what did not."""
        if self.machine:
            left = [{"key": key, "value": value, "why": why} for key, value, why in carried.left]
            told = {"recipe": str(to), "tool": carried.tool, "not_carried": left, "needless": carried.needless}
            print(json.dumps({**told, "notes": carried.notes}, ensure_ascii=False))
            return
        for line in carried.notes:
            self.say(line)
        for key, value, why in carried.left:
            self.say(f"not carried over: {key}: {value} - {why}")
        if carried.needless:
            self.say(f"without meaning here: {', '.join(carried.needless)}")
        self.say(f"recipe {to} (from {carried.tool}); go on: fitout plan {to}")

    def show_draft(self, advice: Advice, to: Path) -> None:
        """What the recipe goes by, and what to do next."""
        if self.machine:
            facts = {"recipe": str(to), "method": advice.method, "aim": advice.aim, "fits": advice.fits}
            print(json.dumps({**facts, "about": advice.about}, ensure_ascii=False))
            return
        for line in advice.about:
            self.say(line)
        self.say(f"Method: {advice.method}: {advice.why}.")
        if advice.fits is False:
            self.say("warning: no way of training fits there; the recipe is a beginning for a larger machine")
        self.say(f"wrote {to}; next: fitout run {shlex.quote(str(to))}")

    def show_comparison(self, result: dict[str, Any]) -> None:
        """What was shown, each method's scores and costs, and what could not be done."""
        if self.machine:
            print(json.dumps(result, ensure_ascii=False))
            return
        from ..evaluate.compare_page import lines
        from ..evaluate.page import label

        count = len(result["seeds"])
        title = (
            f"{result['budget']} for each, {count} seed{'s' if count > 1 else ''}; below each score its 95 % interval"
        )
        table = Table(title=title, title_justify="left", padding=(0, 1, 0, 0))
        table.add_column("")
        score = label(result["task"][0]["name"])
        for name in ("place", score, "kept", "memory", "time", "on disk", "trained", "rate"):
            table.add_column(name, justify="right")
        for row in lines(result):
            table.add_row(*map(Text, row))
        self.console.print(table)
        for sentence in result["verdicts"]:
            self.say(sentence)
        for name, one in result["methods"].items():
            for what, failure in one["failed"].items():
                self.say(f"{name}, {'every run' if what == 'all' else f'seed {what}'} failed: {failure['reason']}")
        self.say(f"page: {result['folder']}/compare.html")

    def show_data(self, directory: RunDir) -> None:
        if self.machine:
            print(json.dumps({"run": str(directory.path), **read_json(directory.data_report)}, ensure_ascii=False))
        else:
            self.say(f"report: {directory.data_page}")

    def show_engines(self, found: dict[str, list[str]]) -> None:
        """Which engine can load a model; the reasons where one cannot."""
        if self.machine:
            print(json.dumps(found, ensure_ascii=False))
            return
        for engine, reasons in found.items():
            self.say(f"{engine}: {'no' if reasons else 'yes'}")
            for reason in reasons:
                self.say(f"  {reason}")

    def show_export(self, exported: Exported) -> None:
        """Where it is, what was checked, what to know, and the commands that start it."""
        if self.machine:
            print(json.dumps({**asdict(exported), "folder": str(exported.folder)}, ensure_ascii=False))
            return
        self.say(f"written to {exported.folder}")
        for what, found in exported.checked.items():
            self.say(f"  checked: {what}: {found}")
        for note in exported.notes:
            self.say(f"  note: {note}")
        for command in exported.commands:
            self.say(command)

    def show_plan(self, plan: Any) -> None:
        if self.machine:
            print(json.dumps(plan.as_dict(), ensure_ascii=False))
            return
        from .plan_view import draw_plan

        for piece in draw_plan(plan):
            self.console.print(piece)

    def show_facts(self, facts: dict[str, str]) -> None:
        """Names and values, a line each."""
        if self.machine:
            print(json.dumps(facts, ensure_ascii=False))
            return
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in facts.items():
            table.add_row(name, Text(value))
        self.console.print(table)


def _scores(directory: RunDir) -> dict[str, Any]:
    if not directory.evaluation_report.exists():
        return {}
    report = read_json(directory.evaluation_report)
    return {"scores": report["scores"], "retention": report["retention"]}


def _rewarded(figures: dict[str, float]) -> bool:
    """Whether rewards differ by more than rounding: a model that is its own reference gives none."""
    return any(abs(figures.get(key, 0.0)) > 1e-4 for key in ("reward_chosen", "reward_rejected"))


class TrainingBar:
    """The training's progress: steps, time left, loss. A listener."""

    def __init__(self, screen: Terminal):
        self.screen = screen
        self.total = 0
        self.loss = ""

    def start(self, info: dict[str, Any]) -> None:
        self.total = info["total_steps"]
        self.screen.bar("training", self.total, min(info["from_step"], self.total - 1))

    def row(self, row: dict[str, Any]) -> None:
        event = row.get("event")
        if event is None:
            note = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s  {row['memory_mb']:,} MB"
            self.screen.bar("training", self.total, row["step"], note)
        elif event == "evaluated":
            best = " (best)" if row["best"] else ""
            figures = row.get("figures", {})
            told = f", reward accuracy {100 * figures['reward_accuracy']:.0f} %" if _rewarded(figures) else ""
            self.screen.say(f"step {row['step']}: validation loss {row['validation_loss']:.4f}{told}{best}")
        elif event == "referred":
            self.screen.say(f"what the model gives {row['pairs']:,} pairs as training begins: {row['seconds']:.0f} s")
        elif event == "resumed":
            for problem in row["passed_over"]:
                self.screen.say(f"passed over a damaged checkpoint: {problem}")
            self.screen.say(f"going on from step {row['step']}" if row["step"] else "starting from the beginning")
        elif event == "oom":
            if "saving" in row:
                done = "what was free is given back, and the checkpoint written again"
            elif "micro_batch_tokens" in row:
                done = f"micro-batches of {row['micro_batch_tokens']:,} tokens from here (same steps, same order)"
            else:
                share = row["gradient_checkpointing"]
                done = f"activations of {100 * share:.0f} % of the layers are recomputed from here"
            self.screen.say(f"memory ran out: {done}")
        elif event == "profiled":
            from .profile_view import draw_profile

            self.screen.console.print(draw_profile(row))
        elif event == "skipped":
            self.screen.say(f"step {row['step']} skipped, {row['reason']}: {', '.join(row['rows'][:3])}")

    def close(self) -> None:
        pass


@contextmanager
def open_screen(machine: bool = False) -> Iterator[Terminal]:
    """A screen whose bars end with the block."""
    terminal = Terminal(machine)
    if terminal.console.is_terminal:
        with terminal.progress:
            yield terminal
    else:
        yield terminal


def draw_findings(findings: Sequence[Any], file: str) -> Table:
    """Findings by severity, as `fitout data check` shows them below the name of the file or folder."""
    table = Table(box=None, pad_edge=False)
    for head in ("severity", "rows", "finding", "for example"):
        table.add_column(head)
    styles = {"error": "red", "warning": "yellow", "info": "dim"}
    for one in findings:
        table.add_row(
            Text(one.severity, style=styles[one.severity]),
            str(one.count),
            Text(one.message.replace(f"{file}:", "line ").replace(f"{file}/", "")),
            Text(", ".join(_within(str(origin), file) for origin in one.origins[:2]), overflow="fold"),
        )
    return table


def _within(origin: str, file: str) -> str:
    """Where a row is in the file or folder that was named."""
    line = origin.removeprefix(f"{file}:")
    return f"line {line}" if line != origin else origin.removeprefix(f"{file.rstrip('/')}/")
