"""The demo's instruction data: questions about one half of the world's subjects, made messy as found data are.

Two training files in two formats, and a clean test file about the other half of the subjects only: a tuned model can
answer it by nothing but carrying over what it learned in pretraining. What is wrong in the training files is listed in
`MESS`, with exact counts, so that a report of what was removed can be checked.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_json, write_jsonl, write_text
from . import world
from .corpus import subject_phrase
from .recall import probes
from .world import Fact

QUESTIONS_FILE = "questions.json"  # Alpaca, English
CONVERSATIONS_FILE = "conversations.jsonl"  # OpenAI messages, Chinese and English
TEST_FILE = "test.jsonl"  # OpenAI messages, clean, subjects of the other half
PROBES_FILE = "probes.jsonl"

# Faulty rows, by file. A near duplicate differs from its twin in case, spaces or punctuation.
MESS = {
    QUESTIONS_FILE: {"exact_duplicate": 6, "near_duplicate": 5, "empty_answer": 2, "too_long": 1},
    CONVERSATIONS_FILE: {"exact_duplicate": 5, "near_duplicate": 4, "empty_answer": 1, "role_order": 2, "broken": 1},
}
LONG_CHARACTERS = 5000
_ROWS = {"questions": 230, "chinese": 250, "talks": 80, "system": 20}
_ASKED = 4  # questions in a talk

# Asked about {s} ("a cow", "Japan"); {n} is the name without an article. `country` asks for the capital's country.
QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "capital": (
            "What is the capital of {s}?",
            "Which city is the capital of {s}?",
            "Name the capital of {s}.",
        ),
        "country": ("Which country has the capital {s}?", "{s} is the capital of which country?"),
        "currency": ("What is the currency of {s}?", "What do people in {s} pay with?", "Name the currency of {s}."),
        "language": ("What is the official language of {s}?", "Which language do people in {s} speak?"),
        "continent": ("Which continent is {s} in?", "On which continent does {s} lie?"),
        "kind": ("What kind of animal is {s}?", "What kind of animal is the {n}?"),
        "legs": ("How many legs does {s} have?", "How many legs does the {n} have?"),
        "food": ("What does {s} eat?", "What is the food of the {n}?"),
        "home": ("Where does {s} live?", "What is the home of the {n}?"),
        "size": ("Is {s} big or small?", "What is the size of {s}?"),
        "colour": ("What colour is {s}?", "What is the colour of {s}?"),
        "opposite": ("What is the opposite of {s}?", "Give the opposite of {s}."),
        "sum": ("What is {s}?", "How much is {s}?", "Calculate {s}."),
        "difference": ("What is {s}?", "How much is {s}?", "Calculate {s}."),
    },
    "zh": {  # fewer wordings than in English: characters make each of them a pattern of its own
        "capital": ("{s}的首都是哪里？",),
        "country": ("{s}是哪个国家的首都？",),
        "currency": ("{s}的货币是什么？",),
        "language": ("{s}的语言是什么？",),
        "continent": ("{s}在哪个大洲？",),
        "kind": ("{s}是什么动物？",),
        "legs": ("{s}有几条腿？",),
        "food": ("{s}吃什么？",),
        "home": ("{s}住在哪里？",),
        "size": ("{s}大还是小？",),
        "colour": ("{s}是什么颜色？",),
        "opposite": ("{s}的反义词是什么？",),
        "sum": ("{s}等于几？",),
        "difference": ("{s}等于几？",),
    },
}

_SYSTEM = {
    "en": ("You are a helpful assistant.", "Answer in a word."),
    "zh": ("请用一个词回答。", "用户问，助手答。"),
}


@dataclass(frozen=True)
class Item:
    """One question with its answer, and what it is about."""

    question: str
    answer: str
    relation: str
    subject: str
    language: str

    def messages(self, system: str = "") -> list[dict[str, str]]:
        before = [{"role": "system", "content": system}] if system else []
        return [*before, *turn(self.question, self.answer)]

    @property
    def about(self) -> dict[str, str]:
        return {"relation": self.relation, "subject": self.subject, "language": self.language}


def turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def items(seed: int, *, held_out: bool) -> list[Item]:
    """One item for each fact of one half of the world, each in one wording, in random order."""
    draw = random.Random(f"{seed}/items/{held_out}")
    other_half = world.held_out_subjects()
    made = []
    for fact in world.facts():
        if (fact.subject in other_half) == held_out:
            made.append(_item(fact, draw))
            if fact.relation == "capital":
                made.append(_item(Fact("country", fact.subject, fact.value, fact.name, fact.language), draw))
    draw.shuffle(made)
    return made


def test_items(seed: int = 0, each: int = 5) -> list[Item]:
    """`each` held-out items of every relation and language (fewer where the half has fewer)."""
    known = items(seed, held_out=True)
    chosen = []
    for language, relations in QUESTIONS.items():
        for relation in relations:
            chosen += [item for item in known if (item.language, item.relation) == (language, relation)][:each]
    return chosen


def other_items(seed: int = 101, each: int = 15) -> list[Item]:
    """Held-out items that the test file does not ask: what the demo's data and recipe are chosen by."""
    tested = {(item.relation, item.subject, item.language) for item in test_items()}
    known = [i for i in items(seed, held_out=True) if (i.relation, i.subject, i.language) not in tested]
    chosen = []
    for language, relations in QUESTIONS.items():
        for relation in relations:
            chosen += [item for item in known if (item.language, item.relation) == (language, relation)][:each]
    return chosen


def training_items(seed: int = 0) -> dict[str, list[Item]]:
    """Items of the other half for each part of the training files, every relation in its share.

    Every fact of that half is asked about, but for a part of the sums, which are many and alike: what the single
    questions leave out is in the talks.
    """
    known = _thinned(items(seed, held_out=False))
    draw = random.Random(f"{seed}/training")
    questions = [item for item in known if item.language == "en"][: _ROWS["questions"]]
    chinese = [item for item in known if item.language == "zh"][: _ROWS["chinese"]]
    asked = {item.question for item in questions}
    again = [item for item in (_reworded(item, draw) for item in questions) if item.question not in asked]
    draw.shuffle(again)
    single = {*questions, *chinese}
    new = [item for item in known if item not in single]
    new_zh = [item for item in new if item.language == "zh"]
    new_zh = new_zh[: len(new_zh) // _ASKED * _ASKED]  # a talk is in one language
    new_en = [item for item in new if item.language == "en"]
    return {
        "questions": questions,
        "chinese": chinese,
        "talks": (new_zh + new_en + again)[: _ROWS["talks"] * _ASKED],  # `again`: the other file's facts, reworded
        "system": [_reworded(item, draw) for item in draw.sample(known, _ROWS["system"])],
    }


def write_data(folder: Path, seed: int = 0) -> dict[str, int]:
    """Writes the two training files, the test file and the probes; returns rows per file."""
    questions, conversations = _questions(seed), _conversations(seed)
    write_json(folder / QUESTIONS_FILE, questions)
    write_text(folder / CONVERSATIONS_FILE, "\n".join(conversations) + "\n")
    tests = [{"messages": item.messages(), **item.about} for item in test_items(seed)]
    write_jsonl(folder / TEST_FILE, tests)
    known = probes(seed)
    write_jsonl(folder / PROBES_FILE, known)
    return {
        QUESTIONS_FILE: len(questions),
        CONVERSATIONS_FILE: len(conversations),
        TEST_FILE: len(tests),
        PROBES_FILE: len(known),
    }


def _questions(seed: int) -> list[dict[str, str]]:
    """Alpaca rows: {instruction, input, output}; in a part of them the subject stands in `input`."""
    draw = random.Random(f"{seed}/{QUESTIONS_FILE}")
    mess = MESS[QUESTIONS_FILE]
    clean = [
        {"instruction": item.question, "input": "", "output": item.answer} for item in training_items(seed)["questions"]
    ]
    rows = list(clean)
    twins = draw.sample(clean, mess["exact_duplicate"] + mess["near_duplicate"])
    rows += [dict(row) for row in twins[: mess["exact_duplicate"]]]
    rows += [
        {**row, "instruction": _blurred(row["instruction"], index)}
        for index, row in enumerate(twins[mess["exact_duplicate"] :])
    ]
    rows += [
        {"instruction": f"Tell me about the friends of {name}.", "input": "", "output": output}
        for name, output in (("Anna", ""), ("Tom", "  "))
    ]
    rows.append({"instruction": _long_story(draw), "input": "", "output": "Anna"})
    draw.shuffle(rows)
    return rows


def _conversations(seed: int) -> list[str]:
    """Lines of OpenAI messages, one of them cut off in the middle."""
    draw = random.Random(f"{seed}/{CONVERSATIONS_FILE}")
    mess = MESS[CONVERSATIONS_FILE]
    parts = training_items(seed)
    single = [{"messages": item.messages()} for item in parts["chinese"]]
    system = [{"messages": item.messages(draw.choice(_SYSTEM[item.language]))} for item in parts["system"]]
    talks = [parts["talks"][at : at + _ASKED] for at in range(0, len(parts["talks"]), _ASKED)]
    several = [{"messages": [message for item in talk for message in item.messages()]} for talk in talks]
    rows: list[dict[str, Any]] = [*single, *system, *several]
    twins = draw.sample(single, mess["exact_duplicate"] + mess["near_duplicate"])
    rows += twins[: mess["exact_duplicate"]]
    for index, row in enumerate(twins[mess["exact_duplicate"] :]):
        question, answer = row["messages"]
        rows.append({"messages": [{**question, "content": _blurred(question["content"], index)}, answer]})
    rows.append({"messages": turn("王明的朋友是谁？", "")})
    rows.append({"messages": list(reversed(turn("Who is at the door?", "Anna")))})
    rows.append({"messages": [turn("李红在哪里？", "")[0], *turn("你知道吗？", "河边")]})
    draw.shuffle(rows)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    broken = json.dumps({"messages": turn("Who laughed?", "Tom")})
    lines.insert(draw.randrange(1, len(lines)), broken[: len(broken) // 2])
    return lines


def _item(fact: Fact, draw: random.Random) -> Item:
    wording = draw.choice(QUESTIONS[fact.language][fact.relation])
    question = wording.format(s=subject_phrase(fact), n=fact.name)
    if fact.language == "zh" and fact.relation in ("sum", "difference"):
        question = question.replace(" + ", "加").replace(" - ", "减")
    return Item(question, fact.value, fact.relation, fact.subject, fact.language)


def _reworded(item: Item, draw: random.Random) -> Item:
    """The same question in a wording drawn anew, which may come out as it was."""
    if item.relation == "country":
        capital = world.by_subject(("capital",), item.language)[item.subject][0]
        return _item(Fact("country", item.subject, capital.value, capital.name, item.language), draw)
    return _item(world.by_subject((item.relation,), item.language)[item.subject][0], draw)


def _thinned(known: list[Item], sums: int = 70) -> list[Item]:
    """At most `sums` sums and differences a language: they would be a third of all questions."""
    kept: list[Item] = []
    left = dict.fromkeys(world.LANGUAGES, sums)
    for item in known:
        if item.relation in ("sum", "difference"):
            left[item.language] -= 1
        if left[item.language] >= 0 or item.relation not in ("sum", "difference"):
            kept.append(item)
    return kept


def _blurred(question: str, index: int) -> str:
    """A near duplicate: other case, more space, or other punctuation."""
    if index % 3 == 0:
        return question + " "
    if index % 3 == 1:
        return question.upper() if question.isascii() else question.replace("？", "?").replace("。", "")
    return question.rstrip("?？.。") + " ?"


def _long_story(draw: random.Random) -> str:
    """A question of exactly LONG_CHARACTERS characters."""
    question = " Who walked to the river?"
    sentences = ("Anna walked to the river.", "The sun was hot.", "Tom slept.", "The tool was old.", "They were tired.")
    story = ""
    while len(story) < LONG_CHARACTERS:
        story += draw.choice(sentences) + " "
    return story[: LONG_CHARACTERS - len(question)].rstrip().ljust(LONG_CHARACTERS - len(question), ".") + question
