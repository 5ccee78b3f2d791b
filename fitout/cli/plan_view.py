"""The plan as people read it: the recipe's method by term, a table of all methods, what to turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..plan import duration

if TYPE_CHECKING:
    from ..plan.planner import Plan, Row

MB = 2**20


def draw_plan(plan: Plan) -> Iterator[RenderableType]:
    """What to print, in order."""
    shape, work, machine = plan.shape, plan.work, plan.machine
    yield Text(
        f"{shape.family}, {shape.parameters / 1e6:,.1f} M parameters, {shape.layers} layers of width {shape.hidden}, "
        f"vocabulary {shape.vocab:,}"
    )
    yield Text(
        f"{work.samples:,} training samples, {work.steps_per_epoch:,.0f} steps an epoch, {work.total_steps:,} in all; "
        f"{work.tokens_per_step:,.0f} tokens a step, micro-batches up to {work.largest.tokens:,}"
    )
    speed = "speed measured" if machine.measured else "speed from the data sheet: an estimate, not measured here"
    yield Text(f"{machine.name}: {machine.memory / MB:,.0f} MB; {speed}\n")
    yield _terms(plan.chosen)
    yield Text()
    yield _methods(plan)
    yield Text()
    for line in plan.advice:
        yield Text(line)
    if plan.past:
        yield Text(plan.past)


def _terms(row: Row) -> Table:
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold",
                  title=f"{row.kind} in {row.precision}, at its fullest: {row.memory.moment}")  # fmt: skip
    table.add_column("term")
    table.add_column("MB", justify="right")
    table.add_column("")
    peak = row.memory.peak
    for name, size in row.memory.terms.items():
        table.add_row(name, f"{size / MB:,.0f}", Text("█" * round(30 * size / peak), style="cyan"))
    table.add_row("peak", Text(f"{peak / MB:,.0f}", style="bold"), "")
    return table


def _methods(plan: Plan) -> Table:
    many = plan.chosen.devices > 1
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    table.add_column("precision")
    if many:
        table.add_column("ZeRO")
    for head in ("trained", "peak MB", "step", "epoch"):
        table.add_column(head, justify="right")
    table.add_column("fits")
    for row in plan.rows:
        own = "bold" if row is plan.chosen else ""
        stage = {0: "0", 1: "1", 2: "2", 3: "3 / FSDP"}[row.stage]
        table.add_row(
            row.kind,
            row.precision,
            *([stage] if many else []),
            f"{row.trained:,}",
            f"{row.memory.peak / MB:,.0f}",
            duration(row.step_seconds),
            duration(row.epoch_seconds),
            _fits(row),
            style=own,
        )
    return table


def _fits(row: Row) -> Text:
    if row.fits:
        return Text("yes", style="green")
    if row.change:
        from ..plan.planner import told

        return Text(f"with {told(row.change)}", style="yellow")
    return Text(f"no: {row.lightest.largest}", style="red")
