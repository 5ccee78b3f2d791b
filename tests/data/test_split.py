"""Splits add up, are exact to a row, keep prompts together, and hardly move when rows come or go."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitout.chat.types import Conversation, Message, Origin, Text
from fitout.data import SplitSettings
from fitout.data.split import PARTS, quotas, split, straddling, weighted, weighting


def talk(question, answer="a", file="f", line=1):
    return Conversation((Message("user", question), Message("assistant", answer)), Origin(file, line))


def many(count, file="f", start=0):
    return [talk(f"question {number}", file=file, line=number) for number in range(start, start + count)]


def where(parts):
    return {id(sample): part for part in PARTS for sample in parts[part]}


@pytest.mark.parametrize("count", [*range(0, 60), 999, 1000, 1001])
def test_counts_are_exact(count):
    parts = split(many(count), SplitSettings(), seed=0)
    sizes = {part: len(parts[part]) for part in PARTS}
    assert sum(sizes.values()) == count
    for part, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert abs(sizes[part] - share * count) < 1 + 1e-9
    assert count == 0 or sizes["train"] >= 1
    if count % 10 == 0:
        assert sizes == {"train": count * 8 // 10, "validation": count // 10, "test": count // 10}


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 100), st.integers(0, 100))
def test_quotas_are_whole_and_within_one(count, validation, test):
    if validation + test > 100:
        validation, test = validation // 2, test // 2
    shares = {"train": 1 - (validation + test) / 100, "validation": validation / 100, "test": test / 100}
    given_out = quotas(count, shares)
    assert sum(given_out.values()) == count and all(number >= 0 for number in given_out.values())
    spare = 1 if shares["train"] > 0 else 0  # the one that training is given
    assert all(abs(given_out[part] - count * shares[part]) < 1 + spare + 1e-6 for part in PARTS)
    assert not (count and shares["train"] > 1e-9) or given_out["train"] >= 1


def test_seed_decides_and_order_does_not():
    samples = many(300)
    shuffled = samples[:]
    random.Random(0).shuffle(shuffled)
    one, two, other = (
        where(split(rows, SplitSettings(), seed)) for rows, seed in ((samples, 1), (shuffled, 1), (samples, 2))
    )
    assert one == two
    assert one != other
    assert split(shuffled, SplitSettings(), 1)["train"] == [s for s in shuffled if one[id(s)] == "train"]


def test_new_rows_hardly_move_old_ones():
    samples = many(1000)
    before = where(split(samples, SplitSettings(), 0))
    after = where(split(samples + many(50, start=1000), SplitSettings(), 0))
    moved = sum(before[id(sample)] != after[id(sample)] for sample in samples)
    assert moved <= 30  # by chance it would be about 340


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 15), max_size=80), st.integers(0, 3))
def test_a_prompt_is_in_one_part_only(prompts, seed):
    samples = [
        talk(f"  Prompt\n{number}" if at % 2 else f"prompt {number}", str(at)) for at, number in enumerate(prompts)
    ]
    parts = split(samples, SplitSettings(train=0.5, validation=0.25, test=0.25), seed)
    assert sum(map(len, parts.values())) == len(samples)
    prompts_of = [{" ".join(s.messages[0].content.split()).casefold() for s in parts[part]} for part in PARTS]
    assert not prompts_of[0] & prompts_of[1] and not prompts_of[0] & prompts_of[2] and not prompts_of[1] & prompts_of[2]
    assert straddling(parts) == 0
    assert not samples or parts["train"]


def test_longer_conversations_with_one_beginning_stay_together():
    samples = []
    for line in range(200):
        beginning = (Message("user", f"q{line // 2}"), Message("assistant", str(line)))
        samples.append(
            Conversation((*beginning, Message("user", "go on"), Message("assistant", "a")), Origin("f", line))
        )
    found = where(split(samples, SplitSettings(), 0))
    assert all(found[id(one)] == found[id(two)] for one, two in zip(samples[::2], samples[1::2], strict=True))


def test_a_system_turn_makes_another_prompt():
    samples = [
        Conversation(
            (Message("system", f"document {n}"), Message("user", "Summarise."), Message("assistant", "a")),
            Origin("f", n),
        )
        for n in range(100)
    ]
    assert Counter(where(split(samples, SplitSettings(), 0)).values()) == {"train": 80, "validation": 10, "test": 10}


def test_fixed_files_go_where_they_say():
    free, tested = many(100), many(20, file="test.json", start=1000)
    twin = talk("QUESTION  1005", "another answer", line=500)
    parts = split([*free, twin, *tested], SplitSettings(), 0, {"test.json": "test"})
    assert all(sample in parts["test"] for sample in tested)
    assert (
        twin in parts["test"] and len(parts["test"]) == 21
    )  # and no other row: a test file of its own serves the part
    assert (len(parts["train"]), len(parts["validation"])) == (90, 10)
    assert straddling(parts) == 0


def test_only_what_fixed_files_repeat_themselves_can_straddle():
    samples = [talk("same", file="train.json"), talk("same", file="test.json"), talk("other", file="train.json")]
    parts = split(samples, SplitSettings(), 0, {"train.json": "train", "test.json": "test"})
    assert [len(parts[part]) for part in PARTS] == [2, 0, 1]
    assert straddling(parts) == 1


def test_no_training_share_puts_nothing_there():
    parts = split(many(7), SplitSettings(train=0, validation=0, test=1), 0)
    assert [len(parts[part]) for part in PARTS] == [0, 0, 7]


def test_texts_can_be_split():
    samples = [Text(f"text {number}", Origin("f", number)) for number in range(50)]
    assert [len(part) for part in split(samples, SplitSettings(), 0).values()] == [40, 5, 5]


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "times"), [(0.5, {1: 5}), (2, {2: 10}), (1.5, {1: 5, 2: 5}), (0.01, {1: 1}), (3.2, {3: 8, 4: 2})]
)
def test_weights_are_counts(weight, times):
    heavy, plain = many(10, file="heavy"), many(7, file="plain")
    result = weighted([*plain, *heavy], {"heavy": weight}, seed=0)
    assert result[:7] == plain
    counts = Counter(id(sample) for sample in result[7:])
    assert Counter(counts.values()) == times
    assert counts.keys() <= {id(sample) for sample in heavy}
    assert result == weighted([*plain, *heavy], {"heavy": weight}, seed=0)
    assert weighting([*plain, *heavy], result) == {"heavy": (10, sum(counts.values()))}


def test_a_half_differs_by_seed_and_not_by_order():
    samples = many(100, file="f")

    def chosen(rows, seed):
        return {sample.origin.line for sample in weighted(rows, {"f": 0.5}, seed)}

    assert chosen(samples, 1) == chosen(samples[::-1], 1) != chosen(samples, 2)


def test_files_of_one_source_are_weighed_together():
    samples = [talk(f"q{number}", file=f"part-{number}", line=1) for number in range(10)]
    assert len(weighted(samples, {f"part-{number}": 0.5 for number in range(10)}, 0)) == 5
