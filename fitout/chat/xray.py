"""The token view: what is trained, what is context, what was cut; for the terminal and as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..chat.render import Chat

TRAINED, CONTEXT, CUT = "trained", "context", "cut"


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one kind, as text, with their ids."""

    kind: str
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One prepared row: where it came from and its tokens as pieces."""

    number: int
    origin: str
    pieces: tuple[Piece, ...]


def pieces(chat: Chat, ids: Sequence[int], train_on: Sequence[int], cut: Sequence[int] = ()) -> tuple[Piece, ...]:
    """Tokens as runs of one kind; `cut` are the ids that truncation left out.

    A character whose bytes are spread over several tokens is shown at the last of them, so kinds stay exact per token.
    """
    kinds = [TRAINED if on and at else CONTEXT for at, on in enumerate(train_on)] + [CUT] * len(cut)
    shown, runs = "", []
    everything = [*map(int, ids), *map(int, cut)]
    tokenizer: Any = chat.tokenizer
    start = 0
    for at in range(1, len(everything) + 1):
        if at < len(everything) and kinds[at] == kinds[start]:
            continue
        whole = tokenizer.decode(everything[:at], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if at < len(everything):
            whole = whole.rstrip("\ufffd")  # the rest of a character comes with the next run
        runs.append(Piece(kinds[start], whole[len(shown) :], tuple(everything[start:at])))
        shown, start = whole, at
    return tuple(runs)


def as_markup(row: Row) -> Iterator[tuple[str, str]]:
    """(text, style) for rich: trained green, context dim, cut struck out in red."""
    styles = {TRAINED: "bold green", CONTEXT: "dim", CUT: "strike red"}
    for piece in row.pieces:
        yield piece.text, styles[piece.kind]


STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
.row{border:1px solid #8884;border-radius:.4rem;padding:.6rem .8rem;margin:1rem 0}
.row h2{font-size:.85rem;font-weight:400;margin:0 0 .4rem;opacity:.7}
.tokens{white-space:pre-wrap;font-family:ui-monospace,monospace;font-size:.9rem}
.trained{background:#2e9e5b44;border-radius:2px}.context{opacity:.75}
.cut{background:#c0392b33;text-decoration:line-through}
.key span{padding:0 .4rem;margin-right:.6rem}table{border-collapse:collapse}td{padding:.15rem 1rem .15rem 0}
"""


def page(rows: Iterable[Row], figures: dict[str, str]) -> str:
    """The view as a page that stands alone; hovering a run shows its token ids."""
    body = [
        "<h1>Tokens as trained</h1>",
        "<p class=key>" + "".join(f"<span class={kind}>{kind}</span>" for kind in (TRAINED, CONTEXT, CUT)) + "</p>",
        "<table>" + "".join(f"<tr><td>{escape(k)}<td>{escape(v)}</tr>" for k, v in figures.items()) + "</table>",
    ]
    for row in rows:
        runs = "".join(
            f'<span class={p.kind} title="{" ".join(map(str, p.ids[:200]))}">{escape(p.text)}</span>'
            for p in row.pieces
        )
        body.append(
            f"<div class=row><h2>row {row.number}, {escape(row.origin)}</h2><div class=tokens>{runs}</div></div>"
        )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Tokens as trained</title><style>{STYLE}</style>" + "\n".join(body) + "</html>\n"
    )
