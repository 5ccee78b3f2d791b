"""The data report as one HTML page that stands alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_text

STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#8881;--one:#2f6f9f;--two:#c77d2e}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{margin-bottom:0}h2{margin-top:2.2rem}table{border-collapse:collapse;width:100%}
td,th{padding:.3rem .6rem;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.lead{font-size:1.15rem}
pre{white-space:pre-wrap;background:var(--soft);padding:.5rem;margin:0;font-size:.8rem;max-height:9rem;overflow:auto}
svg text{fill:currentColor;font-size:11px}.bar{fill:var(--one)}
"""


def write_page(path: Path, report: dict[str, Any], quarantine: list[dict[str, Any]]) -> None:
    write_text(path, render(report, quarantine))


def render(report: dict[str, Any], quarantine: list[dict[str, Any]]) -> str:
    """The page; every text from the data is escaped."""
    kept, quarantined, removed = (sum(report[key].values()) for key in ("kept", "quarantined", "removed"))
    body = [
        "<h1>Data report</h1>",
        f"<p class=lead><b>{report['samples']:,}</b> samples = <b>{kept:,}</b> kept + <b>{quarantined:,}</b> "
        f"quarantined + <b>{removed:,}</b> removed by a named rule</p>",
        "<h2>Sources</h2>",
        _table(
            ("source", "format", "samples", "bad rows", "files skipped"),
            ((s["path"], s["format"], s["samples"], s["bad_rows"], len(s["skipped_files"])) for s in report["sources"]),
        ),
        "<h2>Parts</h2>",
        _table(
            ("part", "samples", "rows", "tokens", "trained", "share", "without a trained end"),
            (
                (name, p["samples"], p["rows"], p["tokens"], p["supervised"], _share(p), p["no_end"])
                for name, p in report["parts"].items()
            ),
        ),
        f"<p>Template: {escape(report['template'])}. Longest sample: {report['max_length']:,} tokens; longer ones: "
        f"{escape(report['too_long'])}.</p>",
        *(f"<p>{escape(note)}</p>" for note in report["notes"]),
        "<h2>Lengths of training samples, in tokens</h2>",
        _bars(report["parts"]["train"]["lengths"]),
        "<h2>What was removed, repaired or set aside</h2>",
        _table(
            ("what", "why", "samples"),
            (
                (what, why, count)
                for what, key in (("removed", "removed"), ("quarantined", "quarantined"), ("repaired", "repaired"))
                for why, count in report[key].items()
            ),
        ),
    ]
    if quarantine:
        body += [
            f"<h2>Quarantine ({len(quarantine):,})</h2><p>The first 50; all are in quarantine.jsonl.</p>",
            "<table><tr><th>where<th>why<th>row</tr>",
            *(_quarantined(row) for row in quarantine[:50]),
            "</table>",
        ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Data report</title><style>{STYLE}</style>" + "\n".join(body) + "</html>\n"
    )


def _share(part: dict[str, Any]) -> str:
    return f"{100 * part['supervised'] / part['tokens']:.0f} %" if part["tokens"] else "-"


def _table(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    def cell(value: Any) -> str:
        return f"<td class=n>{value:,}" if isinstance(value, int) else f"<td>{escape(str(value))}"

    body = list(rows)
    number = [bool(body) and isinstance(value, int) for value in (body[0] if body else heads)]
    head = "".join(f"<th{' class=n' if n else ''}>{escape(h)}" for h, n in zip(heads, number, strict=True))
    lines = ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in body]
    return f"<table><tr>{head}</tr>" + "".join(lines) + "</table>"


def _bars(histogram: list[list[int]]) -> str:
    most = max((count for _, _, count in histogram), default=0) or 1
    width, height = 760, 150
    step = width / max(1, len(histogram))
    drawn = []
    for at, (low, high, count) in enumerate(histogram):
        tall = count / most * (height - 20)
        drawn.append(
            f'<rect class=bar x="{at * step + 2:.1f}" y="{height - tall:.1f}" '
            f'width="{step - 4:.1f}" height="{tall:.1f}">'
            f"<title>{low} to {high} tokens: {count:,}</title></rect>"
            f'<text x="{at * step + step / 2:.1f}" y="{height + 14}" text-anchor="middle">{high}</text>'
            + (
                f'<text x="{at * step + step / 2:.1f}" y="{height - tall - 3:.1f}" text-anchor="middle">{count}</text>'
                if count
                else ""
            )  # fmt: skip
        )
    return f'<svg viewBox="0 0 {width} {height + 20}" role="img" aria-label="lengths">{"".join(drawn)}</svg>'


def _quarantined(row: dict[str, Any]) -> str:
    text = row["row"] if isinstance(row["row"], str) else json.dumps(row["row"], ensure_ascii=False)
    place = f"{row['file']}:{row['line']}"
    return f"<tr><td>{escape(place)}<td>{escape(row['reason'])}<td><pre>{escape(text[:600])}</pre></tr>"
