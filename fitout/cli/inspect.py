"""`fitout data check` and `fitout data xray`: looking at data without changing them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..files import write_text

if TYPE_CHECKING:
    from ..data import SourceSettings
    from ..verbs import Xray
    from ..verbs.preparing import Repaired
    from .screen import Terminal


def check_files(files: list[str], format: str | None, screen: Terminal) -> int:
    """Findings of each file, of a recipe's for each of its sources; returns how many are errors."""
    import json

    from ..data.lint import check_source
    from .screen import draw_findings

    errors, told = 0, {}
    for source in _sources(files, format):
        file, found = source.path, check_source(source, Path())
        errors += sum(one.count for one in found if one.severity == "error")
        told[file] = [
            {
                "severity": f.severity,
                "code": f.code,
                "count": f.count,
                "message": f.message,
                "origins": list(map(str, f.origins)),
            }
            for f in found
        ]
        if not screen.machine:
            screen.console.print(Text(file, style="bold"))
            screen.console.print(draw_findings(found, file))
    if screen.machine:
        print(json.dumps({"errors": errors, "files": told}, ensure_ascii=False))
    return errors


def _sources(files: list[str], format: str | None) -> Iterator[SourceSettings]:
    from ..config import load
    from ..data.sources import named

    for file in files:
        if Path(file).suffix in (".yaml", ".yml") and format is None:
            yield from load(Path(file)).data.sources
        else:
            yield named(file, format)


def show_repairs(done: Repaired, screen: Terminal) -> None:
    """The rules that rows are quarantined under, what could be repaired, and how to accept it."""
    import json
    from dataclasses import asdict

    if screen.machine:
        print(json.dumps({**asdict(done), "path": str(done.path)}, ensure_ascii=False))
        return
    for rule in done.rules:
        screen.say(
            f"{rule['rule']}: {rule['quarantined']:,} quarantined, {rule['suggested']:,} with a suggested repair"
        )
        if rule["example"]:
            for name in ("where", "how", "before", "after"):
                screen.say(f"  {name:<7}{rule['example'][name]}")
    if done.admitted:
        screen.say(f"{done.admitted:,} accepted repairs went in again")
    if done.rules:
        screen.say("accept suggestions with --accept RULE or --accept all; or one by one, in your own words, in")
        screen.say(f"{done.path} (`accept`: true, and the row under `row`), then run this command again")


def show_xray(view: Xray, row: int | None, rows: int, html: Path | None, screen: Terminal) -> None:
    """Draws rows (numbered from 1) with their tokens coloured, and the figures of the whole set."""
    from ..chat.xray import Row, as_markup, page, pieces

    numbers = [row] if row else list(range(1, min(rows, len(view.part)) + 1))
    if row and row > len(view.part):
        from ..errors import RequestError

        raise RequestError(f"--row {row}: the training part has {len(view.part):,} rows")
    part = view.part
    shown = [
        Row(
            n,
            str(part.origin(n - 1)) + ", the rejected answer" * bool(part.rejected[n - 1]),
            pieces(view.chat, part.ids(n - 1), part.train_on(n - 1), part.cut(n - 1)),
        )
        for n in numbers
    ]
    figures = _figures(view.report)
    for one in shown:
        screen.console.print(Text(f"row {one.number}, {one.origin}", style="bold"), soft_wrap=True)
        screen.console.print(Text.assemble(*as_markup(one)))
    for name, value in figures.items():
        screen.say(f"{name}: {value}")
    if html:
        write_text(html, page(shown, figures))
        screen.say(f"page: {html}")


def _figures(report: dict[str, Any]) -> dict[str, str]:
    part = report["parts"]["train"]
    return {
        "training rows": f"{part['rows']:,}",
        "tokens": f"{part['tokens']:,}",
        "supervised": f"{part['supervised']:,} ({100 * part['supervised'] / max(1, part['tokens']):.1f} %)",
        "samples cut": f"{report['repaired'].get('cut to max_length', 0):,}",
        "rows without a supervised end": f"{part['no_end']:,}",
        "samples too long, removed": f"{report['removed'].get('too long', 0):,}",
    }
