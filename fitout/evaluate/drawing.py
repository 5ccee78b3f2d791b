"""Small SVG drawings for the pages: dots with whiskers, curves, quality against cost. Colours are the style sheet's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from .scores import Comparison, Score

Points = list[tuple[float, float]]


def dots(comparison: Comparison, *, width: int = 240) -> str:
    """Base (hollow) above tuned (filled) on a scale of 0 to 100, each with its 95 % interval as a whisker."""
    height, margin = 36, 8

    def x(value: float) -> float:
        return margin + (width - 2 * margin) * min(max(value, 0.0), 100.0) / 100.0

    def mark(score: Score, y: int, kind: str) -> str:
        return (
            f'<line class="whisker {kind}" x1="{x(score.low):.1f}" x2="{x(score.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="dot {kind}" cx="{x(score.value):.1f}" cy="{y}" r="4.5"/>'
        )

    grid = "".join(
        f'<line class="grid" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="2" y2="{height - 2}"/>'
        for at in (0, 25, 50, 75, 100)
    )
    label = f"base {comparison.base.value:.1f}, tuned {comparison.tuned.value:.1f}, on a scale from 0 to 100"
    return (
        f'<svg class="dots" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">{grid}{mark(comparison.base, 11, "base")}'
        f"{mark(comparison.tuned, 25, 'tuned')}</svg>"
    )


def curves(log: Sequence[Mapping[str, Any]]) -> tuple[Points, Points, int]:
    """Training and validation loss by step from log rows, and how many losses were not finite numbers.

    A step that was run twice (after going on from a checkpoint) counts as it was run last.
    """
    training: dict[float, float] = {}
    validation: dict[float, float] = {}
    broken = 0
    for row in log:
        for key, into in (("validation_loss", validation), ("loss", training)):
            step, value = row.get("step"), row.get(key)
            if key == "loss" and "event" in row or value is None or step is None:
                continue
            if isinstance(value, int | float) and isinstance(step, int | float) and math.isfinite(value):
                into[float(step)] = float(value)
            else:
                broken += 1
    return sorted(training.items()), sorted(validation.items()), broken


def figure_curves(log: Sequence[Mapping[str, Any]], name: str) -> tuple[Points, Points]:
    """A figure of the objective by step, of training and validation; of a step that was run twice the last."""
    training, validation = ({
        float(row["step"]): float(row["figures"][name])
        for row in log
        if name in row.get("figures", {}) and (row.get("event") == "evaluated") == held_out
    } for held_out in (False, True))  # fmt: skip
    return sorted(training.items()), sorted(validation.items())


def thin(points: Points, most: int = 300) -> tuple[Points, int]:
    """At most `most` points, each the mean of as many neighbours; and how many neighbours that is."""
    width = max(1, math.ceil(len(points) / most))
    groups = [points[at : at + width] for at in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups], width


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(training: Points, validation: Points, name: str, *, width: int = 760, height: int = 260) -> str:
    """What `name` says: of training as a line, of validation as a line with a dot at each evaluation."""
    left, right, top, bottom = 52, 14, 12, 30
    training, _ = thin(training)
    everything = training + validation
    x_low, x_high = _range([x for x, _ in everything], 0.0)
    y_low, y_high = _range([y for _, y in everything], 0.06)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        return (
            left + (width - left - right) * (point[0] - x_low) / (x_high - x_low),
            top + (height - top - bottom) * (y_high - point[1]) / (y_high - y_low),
        )

    def line(points: Points, kind: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
        return f'<polyline class="curve {kind}" points="{path}"/>' if len(points) > 1 else ""

    marks = []
    for value in ticks(y_low, y_high):
        _, y = place((x_low, value))
        marks.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        marks.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(x_low, x_high, 6):
        x, _ = place((value, y_low))
        marks.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{value:.6g}</text>')
    seen = []
    for point in validation:
        x, y = place(point)
        title = f"step {point[0]:g}: validation {name} {point[1]:.4f}"
        seen.append(f'<circle class="dot tuned" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
    if len(training) == 1:
        x, y = place(training[0])
        seen.append(f'<circle class="dot base" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    about = f'role="img" aria-label="{name.capitalize()} by step"'
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" {about}>{"".join(marks)}'
        f"{line(training, 'base')}{line(validation, 'tuned')}{''.join(seen)}</svg>"
    )


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The range of values, widened by a share of it on both sides; never empty."""
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)


# Methods against each other


@dataclass(frozen=True)
class Mark:
    """A method in the picture: (x, y) with the interval of y, its single seeds, and whether it leads."""

    name: str
    x: float
    score: Score
    seeds: Points
    leads: bool


def scatter(marks: Sequence[Mark], *, x_name: str, y_name: str, width: int = 760, height: int = 380) -> str:
    """Quality against cost: a dot with a whisker for each method, a small dot for each of its seeds."""
    left, right, top, bottom = 58, 110, 26, 46
    xs = [mark.x for mark in marks] + [x for mark in marks for x, _ in mark.seeds]
    ys = [y for mark in marks for y in (mark.score.low, mark.score.high)] + [y for m in marks for _, y in m.seeds]
    x_low, x_high = _at_least(*_range(xs, 0.12), 0.1 * max(xs))
    y_low, y_high = _range(ys, 0.08)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * (x - x_low) / (x_high - x_low),
            top + (height - top - bottom) * (y_high - y) / (y_high - y_low),
        )

    parts = [
        f'<text x="{left}" y="14">{escape(y_name)}</text>',
        f'<text x="{(left + width - right) / 2:.0f}" y="{height - 6}" text-anchor="middle">{escape(x_name)}</text>',
    ]
    for value in ticks(y_low, y_high, 8):
        _, y = place(x_low, value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(x_low, x_high, 6):
        x, _ = place(value, y_low)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{height - bottom}" y2="{height - bottom + 5}"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{value:,.6g}</text>')
    at = [place(mark.x, mark.score.value) for mark in marks]
    labels = _apart([y for _, y in at], 16)
    for mark, (x, y), label_y in zip(marks, at, labels, strict=True):
        kind = "tuned" if mark.leads else "base"
        low, high = place(mark.x, mark.score.low)[1], place(mark.x, mark.score.high)[1]
        title = f"{mark.name}: {mark.score.value:.1f} ({mark.score.low:.1f} to {mark.score.high:.1f}), {mark.x:,.0f}"
        parts += [
            f'<circle class="seed {kind}" cx="{sx:.1f}" cy="{sy:.1f}" r="2.5"/>'
            for sx, sy in (place(*point) for point in mark.seeds)
        ]
        parts.append(
            f'<line class="whisker {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="6"><title>{escape(title)}</title></circle>'
        )
        if abs(label_y - y) > 3:
            ends = f'x1="{x + 8:.1f}" y1="{y:.1f}" x2="{x + 16:.1f}" y2="{label_y:.1f}"'
            parts.append(f'<line class="grid" {ends}/>')
        shift = 18 if abs(label_y - y) > 3 else 11
        parts.append(f'<text class="mark" x="{x + shift:.1f}" y="{label_y + 4:.1f}">{escape(mark.name)}</text>')
    label = f"{y_name} against {x_name}"
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _at_least(low: float, high: float, span: float) -> tuple[float, float]:
    """A range not narrower than `span`: what hardly differs should not look far apart."""
    missing = max(0.0, span - (high - low)) / 2
    return low - missing, high + missing


def _apart(ys: Sequence[float], gap: float) -> list[float]:
    """Places for labels near `ys`, none closer than `gap` to the next."""
    order = sorted(range(len(ys)), key=lambda at: ys[at])
    found = [0.0] * len(ys)
    before = -math.inf
    for at in order:
        found[at] = before = max(ys[at], before + gap)
    return found


def span(value: float, low: float, high: float, reach: float, shown: bool, *, width: int = 220) -> str:
    """A difference with its interval on a scale of -reach to reach, zero marked."""
    height, margin = 22, 8

    def x(at: float) -> float:
        return width / 2 + (width / 2 - margin) * min(max(at / reach, -1.0), 1.0)

    kind = "tuned" if shown else "base"
    label = f"{value:+.1f}, interval {low:+.1f} to {high:+.1f}, on a scale from {-reach:.3g} to {reach:.3g}"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}"><line class="grid" x1="{margin}" x2="{width - margin}" y1="11" y2="11"/>'
        f'<line class="zero" x1="{width / 2}" x2="{width / 2}" y1="2" y2="{height - 2}"/>'
        f'<line class="whisker {kind}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="11" y2="11"/>'
        f'<circle class="dot {kind}" cx="{x(value):.1f}" cy="11" r="4.5"/></svg>'
    )


def rate_curve(tried: Points, chosen: float, *, width: int = 250, height: int = 150) -> str:
    """Validation loss by learning rate (logarithmic), the chosen one filled; a cross on top is a rate that diverged."""
    left, right, top, bottom = 46, 16, 14, 30
    finite = [(x, y) for x, y in tried if math.isfinite(y)]
    x_low, x_high = _range([math.log10(x) for x, _ in tried], 0.05)
    y_low, y_high = _range([y for _, y in finite], 0.1)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * (math.log10(x) - x_low) / (x_high - x_low),
            top + (height - top - bottom) * (y_high - min(y, y_high)) / (y_high - y_low),
        )

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in finite))
    parts = [f'<polyline class="curve base" points="{line}"/>']
    for value in ticks(y_low, y_high, 3):
        _, y = place(tried[0][0], value)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for at, (rate, loss) in enumerate(tried):
        x, y = place(rate, loss)
        title = f"{rate:g}: {f'validation loss {loss:.4f}' if math.isfinite(loss) else 'diverged'}"
        if math.isfinite(loss):
            kind = "tuned" if rate == chosen else "base"
            parts.append(f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
        else:
            parts.append(f'<text x="{x:.1f}" y="{top + 4}" text-anchor="middle">×<title>{title}</title></text>')
        if at in (0, len(tried) - 1) or rate == chosen:
            parts.append(f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{rate:g}</text>')
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="Validation loss by learning rate">{"".join(parts)}</svg>'
    )
