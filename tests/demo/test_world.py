"""The world, its text and its probes: one right answer each, drawn from seeds, no question answered."""

from __future__ import annotations

import itertools
import re

from fitout.demo import corpus, recall, world

FACTS = world.facts()


def test_facts_are_unambiguous():
    assert len({(f.relation, f.subject, f.language) for f in FACTS}) == len(FACTS)
    assert len({(f.relation, f.name, f.language) for f in FACTS}) == len(FACTS)  # a name means one subject
    for language in world.LANGUAGES:
        capitals = [f.value for f in FACTS if (f.relation, f.language) == ("capital", language)]
        assert len(set(capitals)) == len(capitals) == 64  # so "which country has the capital X" has one answer


def test_both_languages_know_the_same():
    keys = {language: {(f.relation, f.subject) for f in FACTS if f.language == language} for language in ("en", "zh")}
    assert keys["en"] == keys["zh"]
    for fact in FACTS:
        if fact.relation not in ("sum", "difference", "legs"):
            assert fact.value.isascii() == fact.name.isascii() == (fact.language == "en"), fact


def test_values_translate_one_to_one_where_they_are_shared():
    """A kind, colour, home, ... has one name in each language (currencies do not: a dollar is 加元 or 澳元)."""
    english = {(f.relation, f.subject): f.value for f in FACTS if f.language == "en"}
    for relation in ("continent", "kind", "food", "home", "size", "colour", "language"):
        pairs = {
            (english[f.relation, f.subject], f.value) for f in FACTS if (f.relation, f.language) == (relation, "zh")
        }
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}), (relation, sorted(pairs))


def test_known_facts():
    """From an atlas and a zoo, not from the tables."""
    known = {(f.relation, f.name): f.value for f in FACTS}
    assert known["capital", "Kenya"] == "Nairobi" and known["capital", "肯尼亚"] == "内罗毕"
    assert known["capital", "Australia"] == "Canberra" and known["capital", "巴西"] == "巴西利亚"
    assert known["currency", "Poland"] == "zloty" and known["language", "Angola"] == "Portuguese"
    assert known["continent", "Fiji"] == "Oceania" and known["legs", "bee"] == "6" and known["kind", "鲸"] == "哺乳动物"
    assert known["opposite", "cold"] == "hot" and known["opposite", "hot"] == "cold" and known["opposite", "远"] == "近"


def test_arithmetic_is_right():
    for fact in FACTS:
        if fact.relation == "sum":
            one, other = map(int, fact.name.split(" + "))
            assert one + other == int(fact.value)
        if fact.relation == "difference":
            one, other = map(int, fact.name.split(" - "))
            assert one - other == int(fact.value)


def test_opposites_are_mutual():
    words = {(f.language, f.name): f.value for f in FACTS if f.relation == "opposite"}
    assert all(words[language, value] == name for (language, name), value in words.items())


def test_split_is_halved_and_keeps_families_together():
    held_out = world.held_out_subjects()
    assert held_out == world.held_out_subjects()
    for relation in world.RELATIONS:
        subjects = {f.subject for f in FACTS if f.relation == relation}
        assert 0.4 < len(subjects & held_out) / len(subjects) < 0.6, relation
    for relation, apart in (("sum", " + "), ("opposite", "")):
        for fact in (f for f in FACTS if f.relation == relation and f.language == "en"):
            twin = fact.value if relation == "opposite" else apart.join(reversed(fact.subject.split(apart)))
            assert (fact.subject in held_out) == (twin in held_out)
    assert ("3 + 4" in held_out) == ("7 - 4" in held_out) == ("7 - 3" in held_out)


def test_every_relation_has_many_wordings_in_both_directions():
    for language, relations in corpus.WORDINGS.items():
        assert set(relations) == set(world.RELATIONS)
        for relation, wordings in relations.items():
            assert len(set(wordings)) == len(wordings) >= 8, (language, relation)
            value_first = [w for w in wordings if w.replace("{a}", "{v}").find("{v}") < _subject_at(w)]
            assert 1 < len(value_first) < len(wordings) - 2, (language, relation)


def _subject_at(wording: str) -> int:
    return min(wording.find(slot) for slot in ("{s}", "{n}", "{x}") if slot in wording)


def test_documents_are_deterministic_and_streamable():
    first = list(corpus.documents(3, 50))
    assert first == list(corpus.documents(3, 50)) == list(itertools.islice(corpus.documents(3), 50))
    assert first != list(corpus.documents(4, 50))


def test_documents_tell_every_fact():
    text = "\n".join(corpus.documents(0, 20_000))
    for fact in FACTS:
        told = sum(corpus.state(fact, w) in text for w in corpus.WORDINGS[fact.language][fact.relation])
        assert told >= 6, (fact, told)


def test_no_question_is_answered():
    """A question is followed by silence or by the next event of the story, never by its answer."""
    answers = {
        question.format(s=corpus.subject_phrase(f), n=f.name): f.value
        for f in FACTS
        for question in corpus.STORIES[f.language]["questions"].get(f.relation, ())
        if question.endswith(("?", "？"))
    }
    found = 0
    for document in corpus.documents(0, 6000):
        for match in re.finditer(r"[^:：?？]*[?？]", document):
            answer = answers.get(match[0].strip())
            if answer:
                found += 1
                assert not document[match.end() :].lstrip().startswith(answer)
    assert found > 50


def test_pieces_of_a_chat_occur_without_a_chat():
    text = "\n".join(corpus.documents(0, 6000))
    for piece in ("User", "user", "Assistant", "assistant", "System", "Tool", "User:", "Assistant:", "用户", "助手"):
        assert text.count(piece) > 10, piece


def test_probes_agree_with_the_world():
    rows = recall.probes()
    assert rows == recall.probes() and len(rows) == 168
    assert {row["group"] for row in rows} == {"facts_en", "facts_zh", "arithmetic"}
    assert len({row["prompt"] for row in rows}) == len(rows)
    told = {corpus.state(f, corpus.WORDINGS[f.language][f.relation][0]) for f in FACTS}
    for row in rows:
        assert {row["prompt"] + row["answer"] + end for end in ".。"} & told, row
        assert not row["prompt"].endswith(" ")
    assert recall.probe(next(f for f in FACTS if f.value == "Tokyo")) == {
        "prompt": "The capital of Japan is",
        "answer": " Tokyo",
        "group": "facts_en",
    }
