"""Retention probes: the beginning of a plain sentence and the one right way to end it.

They ask nothing in chat form, so they measure what the base knew before fine-tuning and what is left of it after.
"""

from __future__ import annotations

import random

from . import world
from .corpus import WORDINGS, state
from .world import Fact

# How many probes each relation gets, in each language.
_COUNTS = {
    "capital": 16,
    "currency": 8,
    "language": 8,
    "continent": 6,
    "kind": 4,
    "legs": 4,
    "food": 4,
    "home": 4,
    "size": 2,
    "colour": 4,
    "opposite": 4,
    "sum": 10,
    "difference": 10,
}


def probes(seed: int = 0) -> list[dict[str, str]]:
    """Rows of {prompt, answer, group}; `answer` follows `prompt` character for character (its space included).

    Groups: facts_en, facts_zh, arithmetic. A completion is right when it begins with `answer` and goes on with
    anything but a letter or digit.
    """
    rows = []
    facts = world.facts()
    for language in world.LANGUAGES:
        for relation, count in _COUNTS.items():
            known = [fact for fact in facts if (fact.relation, fact.language) == (relation, language)]
            chosen = random.Random(f"{seed}/{relation}/{language}").sample(known, count)
            rows += [probe(fact) for fact in chosen]
    return rows


def probe(fact: Fact) -> dict[str, str]:
    """The relation's first wording, cut before the value it ends with."""
    sentence = state(fact, WORDINGS[fact.language][fact.relation][0])
    prompt = sentence.rstrip(".。").removesuffix(fact.value)
    spaced = prompt.endswith(" ")
    arithmetic = fact.relation in ("sum", "difference")
    return {
        "prompt": prompt.rstrip(),
        "answer": " " * spaced + fact.value,
        "group": "arithmetic" if arithmetic else f"facts_{fact.language}",
    }
