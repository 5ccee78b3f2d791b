"""Near-duplicates and leaks against comparing all with all, and against what others say of real files."""

from __future__ import annotations

import json
import random
import string

import numpy as np
import pytest

from fitout.data.leakage import certify, contained
from fitout.data.near import Groups, Near, keep_best
from fitout.data.shingles import Weights, likeness, shingles


def slow_set(text, width=5):
    plain = " ".join(text.casefold().split()).ljust(width)
    return {plain[at : at + width] for at in range(len(plain) - width + 1)}


def words(draw, count):
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=draw.randrange(2, 9))) for _ in range(count))


def changed(draw, text, share):
    """The text with a share of its words replaced."""
    parts = text.split()
    for at in draw.sample(range(len(parts)), max(1, round(share * len(parts)))):
        parts[at] = words(draw, 1)
    return " ".join(parts)


def planted(count=300, twins=80, seed=0):
    draw = random.Random(seed)
    texts = [words(draw, draw.randrange(8, 60)) for _ in range(count)]
    texts += [changed(draw, draw.choice(texts[:count]), draw.choice([0.01, 0.05, 0.1, 0.2, 0.4])) for _ in range(twins)]
    draw.shuffle(texts)
    return texts


def test_likeness_is_the_jaccard_index_of_sets_of_characters():
    """Where every shingle is rare, that of the sets spelled out."""
    texts = planted(60, 20)
    weights = Weights([])
    for one, other in zip(texts, reversed(texts), strict=True):
        a, b = slow_set(one), slow_set(other)
        found = likeness(weights.weighed(one), weights.weighed(other))
        assert found == pytest.approx(len(a & b) / len(a | b), abs=1e-6)


def test_shingles_of_a_batch_are_those_of_each_text():
    texts = ["", "a", "hello world", "Hello   WORLD", "你好，世界，今天怎么样", "x" * 50, "mixed 中文 text"]
    flat, offsets = shingles(texts)
    for at, text in enumerate(texts):
        alone, _ = shingles([text])
        assert flat[offsets[at] : offsets[at + 1]].tolist() == alone.tolist()
    assert shingles(["hello world"])[0].tolist() == shingles(["Hello   WORLD"])[0].tolist()
    assert len(set(shingles(["x" * 50])[0].tolist())) == 1


@pytest.mark.parametrize("seed", range(3))
def test_every_pair_that_all_with_all_finds_is_in_one_cluster(seed):
    texts = planted(seed=seed)
    near = Near(len(texts), texts.__getitem__)
    truth = Groups(len(texts))
    found = Groups(len(texts))
    pairs = 0
    for one in range(len(texts)):
        for other in range(one):
            if near.likeness(one, other) >= 0.8:
                truth.join(one, other)
                pairs += 1
    for one, other, value in near.pairs(0.8):
        assert value >= 0.8 and value == near.likeness(one, other)
        found.join(one, other)
    assert pairs > 10 and found.members() == truth.members()


def test_a_template_alone_does_not_make_twins():
    """Long instructions around a short question: what all rows share says nothing; a reworded row is found."""
    draw = random.Random(1)
    frame = words(draw, 60)
    asked = [words(draw, 6) for _ in range(200)]
    texts = [f"{frame} {question}" for question in asked]
    texts.append(f"{frame} {asked[7]} please")
    plain = [len(slow_set(texts[0]) & slow_set(text)) / len(slow_set(texts[0]) | slow_set(text)) for text in texts[1:9]]
    assert min(plain) > 0.75  # by the letters alone all are nearly the same
    near = Near(len(texts), texts.__getitem__)
    assert [(one, other) for one, other, _ in near.pairs(0.8)] == [(7, 200)]


def test_two_questions_about_one_passage_are_not_twins():
    draw = random.Random(2)
    passage = words(draw, 200)
    texts = [f"{passage}\n{words(draw, 12)}?\n{words(draw, 1)}" for _ in range(5)]
    texts += [words(draw, 200) for _ in range(200)]
    texts.append(texts[3].replace("?", ", please?"))
    near = Near(len(texts), texts.__getitem__, by_line=True)
    assert [(one, other) for one, other, _ in near.pairs(0.8)] == [(3, 205)]
    assert len(list(Near(len(texts), texts.__getitem__).pairs(0.8))) == 5


def test_short_texts_are_twins_only_when_equal():
    """A horse and a zebra differ by one character."""
    draw = random.Random(3)
    texts = [
        "马是什么动物？\n哺乳动物",
        "斑马是什么动物？\n哺乳动物",
        "斑马是什么动物？ \n哺乳动物",
        *(words(draw, 20) for _ in range(60)),
    ]
    assert [pair[:2] for pair in Near(len(texts), texts.__getitem__, by_line=True).pairs(0.8)] == [(1, 2)]


def test_the_best_stays_and_a_chain_does_not_pull_all_after_it():
    value = {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.5}
    like = lambda a, b: value[tuple(sorted((a, b)))]  # noqa: E731
    assert keep_best([0, 1, 2], lambda at: (at,), like, 0.8) == {1: (0, 0.9)}
    assert keep_best([0, 1, 2], lambda at: (at != 1, at), like, 0.8) == {0: (1, 0.9), 2: (1, 0.9)}


def test_group_names_do_not_depend_on_places():
    keys = np.array([b"a" * 16, b"b" * 16, b"c" * 16, b"d" * 16], "S16")
    one, two = Groups(4), Groups(4)
    one.join(0, 2)
    two.join(3, 1)
    first, second = one.names(keys), two.names(keys[::-1])
    assert first[0] == first[2] and first == second[::-1]


def test_the_certificate_is_that_of_all_with_all():
    texts = planted(250, 120, seed=4)
    weights = Weights(texts)
    held_out, training = list(range(0, 370, 5)), [at for at in range(370) if at % 5]
    found = certify(training, held_out, texts.__getitem__, weights, least=0.4, limit=0.8)
    sets = [weights.weighed(text) for text in texts]
    near = 0
    for at, (one, value) in zip(held_out, found.nearest, strict=True):
        best = max(likeness(sets[row], sets[at]) for row in training)
        if best >= 0.4:
            near += 1
            assert value == pytest.approx(best) and likeness(sets[one], sets[at]) == pytest.approx(best)
        else:
            assert (one, value) == (-1, 0.0)
    slow = {(row, at) for at in held_out for row in training if likeness(sets[row], sets[at]) >= 0.8}
    assert near > 15 and slow and {(row, at) for row, at, _ in found.too_near} == slow


def test_all_planted_benchmark_items_are_found_and_no_other():
    draw = random.Random(5)
    texts = [words(draw, 60) for _ in range(400)]
    items = [words(draw, 15) for _ in range(100)]
    planted_at = {at: at * 3 for at in range(0, 100, 4)}
    for item, row in planted_at.items():
        texts[row] = f"{words(draw, 20)} {changed(draw, items[item], 0.05)} {words(draw, 20)}"
    found = list(contained(range(400), texts.__getitem__, items, Weights([*texts, *items]), overlap=0.6))
    assert {(row, item) for row, item, _ in found} == {(row, item) for item, row in planted_at.items()}


# real files


def toolformer(shared, name):
    rows = json.loads((shared / "data" / "gpteacher" / name).read_text(encoding="utf-8"))
    return [f"{row['instruction']}\n{row['input']}\n{row['response']}" for row in rows]


def test_a_real_set_and_its_cleaned_form(shared):
    """GPTeacher's Toolformer set before and after its maker's clean-up at 0.9 similarity, which counted the long frame
    that all rows share: it left 22 % out. Of the pairs that are alike without the frame, it has kept at most one row
    each far more often than chance."""
    before = toolformer(shared, "toolformer-dedupe-only-dataset.json")[:2500]
    after = set(toolformer(shared, "toolformer-similarity-0.9-dataset.json"))
    near = Near(len(before), before.__getitem__)
    pairs = list(near.pairs(0.8))
    both_kept = sum(before[one] in after and before[other] in after for one, other, _ in pairs)
    kept = sum(text in after for text in before) / len(before)
    assert len(pairs) > 100 and both_kept < 0.5 * kept * kept * len(pairs)
