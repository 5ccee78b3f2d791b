"""Splits add up, are exact to a row, keep prompts together, and hardly move when rows come or go."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitout.chat.types import Conversation, Message, Origin, Text
from fitout.data import SplitSettings
from fitout.data.content import content_key, prompt_key
from fitout.data.split import PARTS, label_quotas, quotas, straddling, times_seen
from fitout.data.split import split as split_groups


def talk(question, answer="a", file="f", line=1):
    return Conversation((Message("user", question), Message("assistant", answer)), Origin(file, line))


def many(count, file="f", start=0):
    return [talk(f"question {number}", file=file, line=number) for number in range(start, start + count)]


def split(samples, settings, seed, fixed=None):
    """Samples split by their prompts, as samples."""
    files = [(fixed or {}).get(sample.origin.file) for sample in samples]
    parts = split_groups([prompt_key(sample) for sample in samples], settings, seed, files)
    return {part: [samples[at] for at in numbers] for part, numbers in parts.items()}


def straddle(parts):
    samples = [sample for part in PARTS for sample in parts[part]]
    at = {id(sample): number for number, sample in enumerate(samples)}
    numbers = {part: [at[id(sample)] for sample in parts[part]] for part in PARTS}
    return straddling([prompt_key(sample) for sample in samples], numbers)


def weighted(samples, weights, seed):
    weight = np.array([weights.get(sample.origin.file, 1.0) for sample in samples])
    names = [f"{content_key(sample).hex()} {sample.origin}" for sample in samples]
    times = times_seen(weight, names, seed)
    return [sample for sample, count in zip(samples, times, strict=True) for _ in range(count)]


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
    assert straddle(parts) == 0
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
    assert straddle(parts) == 0


def test_only_what_fixed_files_repeat_themselves_can_straddle():
    samples = [talk("same", file="train.json"), talk("same", file="test.json"), talk("other", file="train.json")]
    parts = split(samples, SplitSettings(), 0, {"train.json": "train", "test.json": "test"})
    assert [len(parts[part]) for part in PARTS] == [2, 0, 1]
    assert straddle(parts) == 1


def test_no_training_share_puts_nothing_there():
    parts = split(many(7), SplitSettings(train=0, validation=0, test=1), 0)
    assert [len(parts[part]) for part in PARTS] == [0, 0, 7]


def test_texts_can_be_split():
    samples = [Text(f"text {number}", Origin("f", number)) for number in range(50)]
    assert [len(part) for part in split(samples, SplitSettings(), 0).values()] == [40, 5, 5]


# --- labels and groups -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(["x", "y", "z"])), min_size=1, max_size=120),
    st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.98, 0.01, 0.01), (0.34, 0.33, 0.33)]),
)
def test_every_label_gets_its_share(labels, shares):
    """Task and sub-task each within a sample of their share for each level of rounding, and the whole exactly."""
    chosen = dict(zip(PARTS, shares, strict=True))
    sizes = Counter(labels)
    given_out = label_quotas(sizes, chosen)
    whole = quotas(len(labels), chosen)
    for part in ("test", "validation"):
        assert sum(mine[part] for mine in given_out.values()) <= whole[part]
        assert all(0 <= mine[part] <= sizes[label] for label, mine in given_out.items())
        assert all(abs(mine[part] - chosen[part] * sizes[label]) <= 2 for label, mine in given_out.items())
        for task in {label[0] for label in sizes}:
            mine = sum(one[part] for label, one in given_out.items() if label[0] == task)
            exact = chosen[part] * sum(size for label, size in sizes.items() if label[0] == task)
            assert mine - exact < 1 + 1e-6
    assert all(sum(mine.values()) == sizes[label] for label, mine in given_out.items())


def test_two_levels_are_exact_where_they_can_be():
    labels = [(f"task {n % 3}", f"sub {n % 6}") for n in range(600)]
    parts = split_groups([f"g{n}" for n in range(600)], SplitSettings(), 0, labels=labels)
    for part, size in (("train", 80), ("validation", 10), ("test", 10)):
        assert Counter(labels[at] for at in parts[part]) == dict.fromkeys(set(labels), size)


def test_groups_stay_together_and_totals_stay_exact_with_labels():
    draw = random.Random(0)
    groups = [f"author {draw.randrange(150)}" for _ in range(1000)]
    label = {name: (f"task {draw.randrange(4)}",) for name in groups}
    parts = split_groups(groups, SplitSettings(), 3, labels=[label[name] for name in groups])
    assert straddling(groups, parts) == 0
    assert not {groups[at] for at in parts["test"]} & {groups[at] for at in parts["validation"]}
    assert abs(len(parts["test"]) - 100) <= 6 and abs(len(parts["validation"]) - 100) <= 6
    for task in set(label.values()):
        rows = sum(label[name] == task for name in groups)
        assert abs(sum(label[groups[at]] == task for at in parts["test"]) - rows / 10) <= 8


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


def test_a_half_differs_by_seed_and_not_by_order():
    samples = many(100, file="f")

    def chosen(rows, seed):
        return {sample.origin.line for sample in weighted(rows, {"f": 0.5}, seed)}

    assert chosen(samples, 1) == chosen(samples[::-1], 1) != chosen(samples, 2)


def test_files_of_one_source_are_weighed_together():
    samples = [talk(f"q{number}", file=f"part-{number}", line=1) for number in range(10)]
    assert len(weighted(samples, {f"part-{number}": 0.5 for number in range(10)}, 0)) == 5
