"""The instruction data: disjoint from the test, messy to the row, the same from the same seed, as committed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fitout.demo import instructions, make, world
from fitout.demo.instructions import CONVERSATIONS_FILE, MESS, QUESTIONS, QUESTIONS_FILE, TEST_FILE


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    instructions.write_data(path)
    return path


@pytest.fixture(scope="module")
def questions(folder) -> list[dict]:
    return json.loads((folder / QUESTIONS_FILE).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lines(folder) -> list[str]:
    return (folder / CONVERSATIONS_FILE).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def conversations(lines) -> list[list[dict]]:
    return [row["messages"] for row in _readable(lines)]


@pytest.fixture(scope="module")
def tests(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / TEST_FILE).read_text(encoding="utf-8").splitlines()]


def _readable(lines: list[str]) -> list[dict]:
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def test_committed_files_are_what_the_generator_writes(folder):
    for path in folder.iterdir():
        assert (make.DATA / path.name).read_bytes() == path.read_bytes(), path.name


def test_size(questions, lines, tests):
    assert 580 <= len(questions) + len(lines) <= 620
    assert 110 <= len(tests) <= 150


def test_subjects_of_training_and_test_are_disjoint(tests):
    held_out = world.held_out_subjects()
    trained = {item.subject for part in instructions.training_items().values() for item in part}
    tested = {row["subject"] for row in tests}
    assert tested <= held_out and not trained & held_out
    # families too: the pair of a word, the mirror of a sum
    assert not {world.family(s) for s in trained} & {world.family(s) for s in tested}


def test_no_tested_question_stands_in_the_training_files(questions, conversations, tests):
    """By the text itself, whatever the generator believes."""
    seen = {row["instruction"] for row in questions}
    seen |= {m["content"] for messages in conversations for m in messages if m["role"] == "user"}
    folded = {"".join(text.lower().split()) for text in seen}
    for row in tests:
        question = row["messages"][0]["content"]
        assert "".join(question.lower().split()) not in folded
    # and no tested name occurs as a subject: a country that is tested is never asked about
    names = {f.name for f in world.facts() if f.relation == "capital" and f.subject in world.held_out_subjects()}
    for text in seen:
        assert not any(name in text for name in names), text


def test_every_relation_is_trained_and_tested_in_both_languages(tests):
    parts = instructions.training_items()
    trained = Counter((i.language, i.relation) for part in parts.values() for i in part)
    tested = Counter((row["language"], row["relation"]) for row in tests)
    for language, relations in QUESTIONS.items():
        for relation in relations:
            assert trained[language, relation] >= 5, (language, relation)
            assert tested[language, relation] >= 5, (language, relation)


def test_the_questions_to_choose_by_are_not_the_tests(tests):
    others = instructions.other_items()
    asked = {(item.relation, item.subject, item.language) for item in others}
    assert len(others) > 400 and not asked & {(row["relation"], row["subject"], row["language"]) for row in tests}
    trained = {item.subject for part in instructions.training_items().values() for item in part}
    assert not {item.subject for item in others} & trained


def test_of_each_pair_one_answer_is_right_and_the_other_is_another_ones():
    right = {(item.question, item.subject): item.answer for item in instructions.other_items()}
    pairs = list(make.preference_pairs())
    assert len(pairs) == len(instructions.other_items())
    for pair in pairs:
        assert right[pair["prompt"], pair["subject"]] == pair["chosen"] != pair["rejected"]
        assert pair["rejected"] in {other["chosen"] for other in pairs if other["language"] == pair["language"]
                                    and other["relation"] == pair["relation"]}  # fmt: skip


def test_every_fact_of_the_trained_half_is_asked_about():
    """But for sums: a part of them is enough."""
    asked = {
        (item.language, item.relation, item.subject) for part in instructions.training_items().values() for item in part
    }
    known = {(item.language, item.relation, item.subject) for item in instructions.items(0, held_out=False)}
    missed = [key for key in known - asked if key[1] not in ("sum", "difference")]
    assert len(missed) <= 3  # what is left over when talks of four are filled in one language


def test_answers_are_right(tests):
    known = {(f.relation, f.subject, f.language): f for f in world.facts()}
    for row in tests:
        question, answer = (message["content"] for message in row["messages"])
        inverse = row["relation"] == "country"
        fact = known["capital" if inverse else row["relation"], row["subject"], row["language"]]
        assert answer == (fact.name if inverse else fact.value)
        if row["relation"] in ("sum", "difference"):
            assert all(term in question for term in fact.name.split()[::2])
        else:
            assert (fact.value if inverse else fact.name) in question
        assert len(answer) <= 24


def test_mess_of_the_questions(questions):
    mess = MESS[QUESTIONS_FILE]
    assert sum(not row["output"].strip() for row in questions) == mess["empty_answer"]
    assert [len(row["instruction"]) for row in questions if len(row["instruction"]) > 200] == [5000]
    same = Counter(json.dumps(row, sort_keys=True) for row in questions)
    assert sum(n - 1 for n in same.values()) == mess["exact_duplicate"]
    near = Counter((_folded(row["instruction"]), row["output"]) for row in questions)
    assert sum(n - 1 for n in near.values()) == mess["exact_duplicate"] + mess["near_duplicate"]


def test_mess_of_the_conversations(lines, conversations):
    mess = MESS[CONVERSATIONS_FILE]
    assert len(lines) - len(conversations) == mess["broken"]
    assert sum(not m[-1]["content"].strip() for m in conversations) == mess["empty_answer"]
    assert sum(not _alternates(m) for m in conversations) == mess["role_order"]
    same = Counter(json.dumps(m, sort_keys=True) for m in conversations)
    assert sum(n - 1 for n in same.values()) == mess["exact_duplicate"]
    near = Counter(tuple(_folded(message["content"]) for message in m) for m in conversations)
    assert sum(n - 1 for n in near.values()) == mess["exact_duplicate"] + mess["near_duplicate"]


def test_duplicates_do_not_cross_the_files(questions, conversations):
    """So that the counts of duplicates hold for the whole data set as well."""
    single = {_folded(m[0]["content"]) for m in conversations if len(m) == 2}
    assert not single & {_folded(row["instruction"]) for row in questions}


def test_kinds_of_conversations(conversations):
    assert sum(m[0]["role"] == "system" for m in conversations) == 20
    assert sum([message["role"] for message in m] == ["user", "assistant"] * 4 for m in conversations) == 80
    chinese = sum(not m[-2]["content"].isascii() for m in conversations)
    assert chinese > len(conversations) / 2


def _folded(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum() or c in "+-")


def _alternates(messages: list[dict]) -> bool:
    roles = [m["role"] for m in messages if m["role"] != "system"]
    return roles == ["user", "assistant"] * (len(roles) // 2)
