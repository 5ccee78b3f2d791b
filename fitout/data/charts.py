"""Small SVG drawings for the data report; colours are the style sheet's. Texts are given ready, in both languages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


def say(english: str, chinese: str) -> str:
    """A text in both languages, of which the page shows one; escaped here."""
    return f"<span lang=en>{escape(english)}</span><span lang=zh>{escape(chinese)}</span>"


def columns(
    bars: Sequence[tuple[str, int]],
    *,
    label: str,
    width: int = 520,
    height: int = 150,
    mark: tuple[float, str] | None = None,
    warm: int | None = None,
) -> str:
    """Upright bars with their counts above and names below; `mark` is (place among the bars, name) of an upright line,
    from bar `warm` on bars are drawn in the second colour."""
    most = max((count for _, count in bars), default=0) or 1
    step = width / max(1, len(bars))
    drawn = []
    for at, (name, count) in enumerate(bars):
        tall = max(1.5, count / most * (height - 22)) if count else 0
        kind = "two" if warm is not None and at >= warm else "one"
        drawn.append(
            f'<rect class="{kind}" x="{at * step + 1.5:.1f}" y="{height - tall:.1f}" width="{step - 3:.1f}" '
            f'height="{tall:.1f}" rx="1.5"><title>{escape(name)}: {count:,}</title></rect>'
        )
        drawn.append(_centred(at * step + step / 2, height + 14, name))
        if count:
            drawn.append(_centred(at * step + step / 2, height - tall - 4, short(count), "count"))
    if mark:
        x = mark[0] * step
        drawn.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
        drawn.append(f'<text class="marked" x="{x - 5:.1f}" y="10" text-anchor="end">{escape(mark[1])}</text>')
    return (
        f'<svg viewBox="0 -2 {width} {height + 22}" role="img" aria-label="{escape(label)}">'
        f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>{"".join(drawn)}</svg>'
    )


def stripe(parts: Sequence[tuple[str, int, str]], *, label: str, height: int = 26) -> str:
    """One bar divided by counts: (class, count, title). What there is a little of is still seen."""
    total = sum(count for _, count, _ in parts) or 1
    shown = [(kind, max(count / total, 0.004), title) for kind, count, title in parts if count]
    whole = sum(share for _, share, _ in shown) or 1
    drawn, x = [], 0.0
    for kind, share, title in shown:
        wide = 1000 * share / whole
        drawn.append(
            f'<rect class="{kind}" x="{x:.1f}" y="0" width="{wide:.1f}" height="{height}">'
            f"<title>{escape(title)}</title></rect>"
        )
        x += wide
    return (
        f'<svg class="stripe" viewBox="0 0 1000 {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{"".join(drawn)}</svg>'
    )


def bar(share: float, kind: str = "one") -> str:
    """A share of a table's cell, as a bar behind nothing: for rows that are to be compared by eye."""
    return f'<span class="bar"><i class="{kind}" style="width:{100 * min(1.0, max(0.0, share)):.1f}%"></i></span>'


def prompt_strip(places: Sequence[tuple[str, str, int]], *, label: str, width: int = 520) -> str:
    """A prompt drawn as a page in three thirds, each the darker the more of the key information stands there:
    (English name, Chinese name, count)."""
    total = sum(count for _, _, count in places) or 1
    third = width / 3
    drawn = []
    for at, (english, chinese, count) in enumerate(places):
        x, share = at * third, count / total
        drawn.append(
            f'<rect class="page" x="{x + 2:.1f}" y="2" width="{third - 4:.1f}" height="64" rx="4"/>'
            f'<rect class="one" x="{x + 2:.1f}" y="2" width="{third - 4:.1f}" height="64" rx="4" '
            f'opacity="{0.08 + 0.92 * share:.2f}"/>'
        )
        ink = "inverse" if share > 0.5 else "plain"
        drawn.append(_centred(x + third / 2, 32, f"{share:.0%}", f"big {ink}"))
        for lang, name in (("en", english), ("zh", chinese)):
            drawn.append(_centred(x + third / 2, 52, f"{name} ({count:,})", f"{lang} {ink}"))
    return f'<svg viewBox="0 0 {width} 68" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg>'


def short(count: int) -> str:
    """A count that fits over a bar."""
    if count >= 1_000_000:
        return f"{count / 1e6:.1f}M"
    return f"{count / 1000:.0f}k" if count >= 10_000 else f"{count:,}"


def _centred(x: float, y: float, text: str, kind: str = "name") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{escape(text)}</text>'
