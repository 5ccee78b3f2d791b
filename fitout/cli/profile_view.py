"""Where a step's time goes, as people read it."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def draw_profile(report: dict[str, Any]) -> Group:
    """The table of parts, then what the products reach and what was computed in vain."""
    table = Table(box=None, pad_edge=False, title_justify="left", title_style="bold",
                  title=f"Where the time goes: {report['steps']} steps of {report['step_seconds']:.3g} s")  # fmt: skip
    table.add_column("part")
    for head in ("ms a step", "share", "GFLOP/s", "of peak"):
        table.add_column(head, justify="right")
    for name, one in report["parts"].items():
        table.add_row(name, f"{1000 * one['seconds']:,.1f}", f"{100 * one['share']:.1f} %", *_rate(one))
    whole = report["whole"]
    table.add_row("whole step", f"{1000 * report['step_seconds']:,.1f}", "100 %", *_rate(whole or {}), style="bold")
    lines = [f"padding {100 * report['padding']:.1f} % of the computed tokens"]
    if report["recomputed"] is not None:
        lines.append(f"recomputed {100 * report['recomputed']:.1f} % of the FLOPs")
    if whole:
        lines.append(f"peak: {whole['peak'] / 1e9:,.0f} GFLOP/s, measured in this model's own sizes")
    return Group(table, Text("; ".join(lines)), Text(f"trace: {report['trace']} (open in https://ui.perfetto.dev)"))


def _rate(one: dict[str, float]) -> tuple[str, str]:
    if "peak" not in one:
        return "", ""
    return f"{one['flops_per_second'] / 1e9:,.1f}", f"{100 * one['of_peak']:.0f} %"
