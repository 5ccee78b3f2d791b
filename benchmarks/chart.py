"""The benchmarks as drawings (SVG), written by `python -m benchmarks.table` beside their JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from statistics import median

INK, SOFT, OURS, THEIRS = "#1b1f24", "#8a929c", "#0b6e4f", "#c0c7d0"
Series = list[tuple[float, float]]


def speeds(bars: Sequence[tuple[str, str, list[float]]]) -> str:
    """Horizontal bars, one a (work, peer, ratios of the rounds): how many times as fast Fitout is, median, with the
    smallest and largest as a whisker. The line is at one: as fast."""
    left, width, row, gap = 300, 380, 22, 26
    most = max(max(ratios) for *_, ratios in bars) * 1.05

    def x(ratio: float) -> float:
        return left + width * ratio / most

    parts, y, before = [], 12.0, ""
    for work, peer, ratios in bars:
        if work != before:
            y += gap if before else 8
            parts.append(_text(8, y, work, weight="600"))
            y, before = y + 12, work
        low, mid, high = min(ratios), median(ratios), max(ratios)
        parts.append(_text(left - 8, y + 11, peer, anchor="end"))
        parts.append(f'<rect x="{left}" y="{y:.0f}" width="{x(mid) - left:.1f}" height="14" fill="{OURS}" rx="2"/>')
        parts.append(_line(x(low), y + 7, x(high), y + 7, INK))
        parts.append(_text(max(x(high), x(mid)) + 8, y + 11, f"{mid:.2f} times"))
        y += row
    one = _line(x(1), 8, x(1), y, SOFT, dashed=True)
    return _svg(left + width + 90, y + 12, [one, *parts], "How many times as fast Fitout is as other programs")


def curves(panels: Sequence[tuple[str, str, dict[str, Series]]]) -> str:
    """Panels, two in a row, each (title, unit of x, series by name): values over a logarithmic x, from zero up."""
    width, height, left, tall = 330, 190, 62, 272
    parts: list[str] = []
    for number, (title, unit, series) in enumerate(panels):
        at, top = (number % 2) * (width + left + 28), 34 + number // 2 * tall
        xs = [x for points in series.values() for x, _ in points]
        low, high = math.log(min(xs)), math.log(max(xs))
        most = max(y for points in series.values() for _, y in points) * 1.08

        def place(
            x: float, y: float, at: int = at, top: int = top, low: float = low, high: float = high, most: float = most
        ):
            across = (math.log(x) - low) / (high - low)
            return at + left + width * across, top + height * (1 - y / most)

        parts.append(_text(at + left, top - 16, title, weight="600"))
        for share in (0, 0.5, 1):
            y = place(math.exp(low), most * share)[1]
            parts.append(_line(at + left, y, at + left + width, y, THEIRS))
            parts.append(_text(at + left - 6, y + 4, f"{most * share:,.0f}", anchor="end"))
        for x in sorted(set(xs)):
            parts.append(_text(place(x, 0)[0], top + height + 18, f"{x:,.0f}", anchor="middle"))
        parts.append(_text(at + left + width, top + height + 36, unit, anchor="end"))
        for name, points in series.items():
            colour = OURS if name.startswith("Fitout") else SOFT
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        names = [_text(at + left + width - 60 * n, top - 16, name, anchor="end", colour=OURS if n else SOFT)
                 for n, name in enumerate(reversed(series))]  # fmt: skip
        parts += names
    rows = -(-len(panels) // 2)
    return _svg(2 * (width + left + 28), rows * tall + 12, parts, "How speed and memory change")


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(label)}" font-family="system-ui, sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400", colour: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}">'
        f"{escape(text)}</text>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="3 3"' if dashed else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"{dash}/>'
