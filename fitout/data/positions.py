"""Where in a prompt the key information stands, and samples with it moved elsewhere.

Models read the head and the tail of a long prompt better than its middle (Liu et al. 2023, Lost in the Middle), and
training data whose evidence always stands in one place teach them to look only there.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

from ..chat.types import Conversation, Pair
from .content import opening
from .taxonomy import look_up

CLASSES = ("head", "middle", "tail", "spread", "none", "short")
PLACES = ("head", "middle", "tail")
SHORTEST = 240  # characters of a prompt; a shorter one has no head and tail worth telling apart
ANSWER = 400  # characters of an answer that are looked for
OFTEN = 5  # times in the prompt; a word that stands there more often says nothing of a place
SURE = 0.5  # of the evidence that must stand in one third
PIECE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{2}|[^\W_]+")
BLANK_LINE = re.compile(r"\n[ \t]*\n\s*")
SENTENCE = re.compile(r"(?<=[.!?。！？])\s*")


def place_of(sample: Any, field: str | None) -> str:
    """One of CLASSES for a conversation, or a pair's chosen one: from the column where it says, else measured."""
    if isinstance(sample, Pair):
        sample, _ = sample.answered
    if not isinstance(sample, Conversation):
        return "none"
    turns = opening(sample)
    prompt = "\n".join(turn.content for turn in turns)
    if field is not None:
        value = look_up(sample.meta, field)
        if value in PLACES:
            return str(value)
        if isinstance(value, str) and value.strip():
            at = prompt.find(value.strip())
            return "none" if at < 0 else third(at + len(value.strip()) / 2, len(prompt))
    return measured(prompt, sample.messages[len(turns)].content)


def measured(prompt: str, answer: str) -> str:
    """By what prompt and answer have in common. An answer that stands in the prompt word for word, once, is where it
    is; otherwise each word of it counts where it stands, the less the more often it does, and the third of the prompt
    that holds more than half of that is the place. `spread` where none does, `none` where nothing is in common."""
    if len(prompt) < SHORTEST:
        return "short"
    answer = answer.strip()[:ANSWER]
    folded, wanted = prompt.casefold(), answer.casefold()
    if len(wanted) > 2 and folded.count(wanted) == 1:
        return third(folded.index(wanted) + len(wanted) / 2, len(folded))
    words = set(_pieces(wanted))
    found = [(piece, at) for piece, at in _placed(folded) if piece in words]
    times = Counter(piece for piece, _ in found)
    mass: Counter[str] = Counter()
    for piece, at in found:
        if times[piece] <= OFTEN:
            mass[third(at, len(folded))] += 1 / times[piece]  # type: ignore[assignment]
    if not mass:
        return "none"
    place, most = mass.most_common(1)[0]
    return place if most > SURE * sum(mass.values()) else "spread"


def third(at: float, length: int) -> str:
    return PLACES[min(2, int(3 * at / max(1, length)))]


def _placed(text: str) -> list[tuple[str, int]]:
    found = []
    for match in PIECE.finditer(text):
        found.append((match[0], match.start()))
    return found


def _pieces(text: str) -> list[str]:
    """Words, and pairs of Chinese, Japanese and Korean characters at both alignments."""
    return PIECE.findall(text) + PIECE.findall(text[1:])


def moved(sample: Conversation, field: str) -> list[tuple[str, Conversation]]:
    """(place, sample) for each other place that the key passage could stand in; [] where no turn holds it.

    `field` is the column that holds the passage. It is taken out of the turn of the user that it stands in, and put
    before its first paragraph, after its last, or at the boundary nearest to the middle.
    """
    passage = look_up(sample.meta, field)
    if not isinstance(passage, str) or not passage.strip() or passage in PLACES:
        return []
    passage = passage.strip()
    number = next(
        (at for at, m in enumerate(sample.messages) if m.role == "user" and m.content.count(passage) == 1), None
    )
    if number is None:
        return []
    text = sample.messages[number].content
    before, after = text.split(passage)
    here = third(len(before) + len(passage) / 2, len(text))
    rest = "\n\n".join(part.strip() for part in (before, after) if part.strip())
    if not rest:
        return []
    pieces, joint = [piece for piece in BLANK_LINE.split(rest) if piece.strip()], "\n\n"
    if len(pieces) == 1:
        pieces, joint = [piece for piece in SENTENCE.split(rest) if piece.strip()], " "
    made = []
    for place, at in (("head", 0), ("middle", _middle(pieces)), ("tail", len(pieces))):
        if place == here or (place == "middle" and at in (0, len(pieces))):
            continue
        head, tail = joint.join(pieces[:at]), joint.join(pieces[at:])
        content = "\n\n".join(part for part in (head, passage, tail) if part)
        messages = list(sample.messages)
        messages[number] = replace(messages[number], content=content)
        made.append((place, replace(sample, messages=tuple(messages), meta={**sample.meta, field: passage})))
    return made


def _middle(pieces: list[str]) -> int:
    """The boundary between pieces that is nearest to the middle of their text."""
    whole = sum(map(len, pieces))
    sizes = [sum(map(len, pieces[:at])) for at in range(len(pieces) + 1)]
    return min(range(len(sizes)), key=lambda at: abs(sizes[at] - whole / 2))
