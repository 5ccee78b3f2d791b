"""How far past plans were off: one JSON line a run, in the user's data folder, shown with later plans."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from statistics import median
from typing import Any

from ..files import home


def remember(row: dict[str, Any]) -> None:
    """Adds one run's predicted and measured figures."""
    path = home() / "plans.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = size and file.read(1) != b"\n"
        file.write(b"\n" * bool(torn) + json.dumps(row, ensure_ascii=False).encode() + b"\n")


def past(machine: str, last: int = 20) -> list[dict[str, Any]]:
    """The newest runs on `machine`."""
    path = home() / "plans.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with suppress(ValueError):  # torn by a kill or a full disk: one plan less
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and row.get("machine") == machine][-last:]


def past_error(machine: str) -> str | None:
    """One line: the median error of past plans on `machine`, and the largest."""
    rows = past(machine)
    parts = []
    for what, key in (("memory", "peak_mb"), ("time", "step_seconds")):
        pairs = [(row["predicted"][key], row["measured"][key]) for row in rows]
        errors = [abs(p / m - 1) for p, m in pairs if p and m]
        if errors:
            parts.append(f"{what} by {100 * median(errors):.0f} % (at most {100 * max(errors):.0f} %)")
    count = f"the last {len(rows)} runs" if len(rows) > 1 else "the last run"
    return f"plans for {count} on this machine were off: {', '.join(parts)}" if parts else None
