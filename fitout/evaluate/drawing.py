"""Small SVG drawings for the report: dots with whiskers, and loss curves. Colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


def loss_chart(training: Points, validation: Points, *, width: int = 760, height: int = 260) -> str:
    """Training loss as a line, validation loss as a line with a dot at each evaluation."""
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
        title = f"step {point[0]:g}: validation loss {point[1]:.4f}"
        seen.append(f'<circle class="dot tuned" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
    if len(training) == 1:
        x, y = place(training[0])
        seen.append(f'<circle class="dot base" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    return (
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="Loss by step">{"".join(marks)}'
        f"{line(training, 'base')}{line(validation, 'tuned')}{''.join(seen)}</svg>"
    )


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    """The range of values, widened by a share of it on both sides; never empty."""
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    return low - margin * (high - low), high + margin * (high - low)
