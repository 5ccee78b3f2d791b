"""The report: four files in a run's `evaluation/`, and a short table for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..files import write_json, write_jsonl, write_text
from ..rundir import RunDir
from . import page
from .scores import Comparison
from .suite import EvaluationResult, plain

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text


def write_report(
    result: EvaluationResult,
    run: RunDir,
    *,
    title: str,
    recipe_summary: Mapping[str, Any],
    training_log: Sequence[Mapping[str, Any]],
    data_counts: Mapping[str, Any] | None = None,
    command: str = "",
) -> None:
    """Writes predictions.jsonl, retention.jsonl (where retention was measured), report.json and report.html, each
    atomically.

    `training_log` are the rows of log.jsonl: `{"step", "loss"}` and `{"event": "evaluated", "step",
    "validation_loss"}`. `data_counts` and `recipe_summary` are shown as they are given; `command` is how to do it
    again.
    """
    command = command or f"fitout evaluate {shlex.quote(str(run.path))}"
    counts = dict(data_counts or {})
    write_jsonl(run.predictions, result.rows)
    if result.retention:
        write_jsonl(run.retention, map(plain, result.retention.rows))
    else:
        run.retention.unlink(missing_ok=True)  # of an evaluation before this one
    write_json(
        run.evaluation_report,
        {
            "title": title,
            **result.as_dict(),
            "data_counts": counts,
            "recipe": dict(recipe_summary),
            "command": command,
        },
    )
    write_text(
        run.evaluation_page,
        page.render(result, title=title, recipe=recipe_summary, log=training_log, data_counts=counts, command=command),
    )


def summary_table(result: EvaluationResult) -> Table | Text:
    """Base against tuned in a few lines: scores, then retention by group. Fits 80 columns. Only the notes when there is
    nothing to compare."""
    from rich.table import Table
    from rich.text import Text

    kept = result.retention
    notes = [*result.notes, *(kept.notes if kept else [])]
    if not result.scores and kept is None:
        return Text("\n".join(notes))
    table = Table(title="Base against tuned", title_justify="left", caption_justify="left", padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for name in ("n", "base", "tuned", "change", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for score in result.scores:
        table.add_row(*_line(page.label(score.name), score))
    if kept and (kept.overall or kept.perplexity):
        table.add_section()
        for group, score in kept.groups.items() if len(kept.groups) > 1 else ():
            table.add_row(*_line(f"kept: {group}", score))
        if kept.overall:
            table.add_row(*_line("kept: all probes", kept.overall))
        if kept.perplexity:
            table.add_row(*_line("Perplexity (lower is better)", kept.perplexity))
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def _line(name: str, score: Comparison) -> list[Any]:
    """Cells as plain text: names come from data and must not be read as markup."""
    from rich.text import Text

    change, low, high = page.signed(score.difference)
    word, style = {"better": ("better", "green"), "worse": ("worse", "red")}.get(score.verdict, ("not shown", "dim"))
    return [
        Text(name),
        str(score.base.n),
        f"{score.base.value:.1f}",
        f"{score.tuned.value:.1f}",
        change,
        f"{low} to {high}",
        Text(word, style=style),
    ]
