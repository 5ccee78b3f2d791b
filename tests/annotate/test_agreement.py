"""Kappa against the values of the papers' and textbooks' own tables; the rules against cases written out by hand."""

from __future__ import annotations

import math

import pytest

from fitout.data.annotate.agreement import (
    Undecided,
    agreement,
    cohen_kappa,
    decide,
    fleiss_kappa,
    latest,
    text_overlap,
)
from fitout.data.annotate.annotation import Annotation


def table(**cells):
    """Two lists of labels from a table {ab: count}: `a` by the first annotator, `b` by the second."""
    pairs = [(cell[0], cell[1]) for cell, count in cells.items() for _ in range(count)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def test_cohen_published_values():
    # 50 grant proposals, two readers: 20 both yes, 5 and 10 split, 15 both no: kappa 0.40 (Cohen's kappa, Wikipedia)
    assert cohen_kappa(*table(yy=20, yn=5, ny=10, nn=15)) == pytest.approx(0.40, abs=1e-12)
    # the two tables of equal agreement and unequal kappa (Smeeton 1985): 0.1304 and 0.2593
    assert cohen_kappa(*table(yy=45, yn=15, ny=25, nn=15)) == pytest.approx(0.1304, abs=5e-5)
    assert cohen_kappa(*table(yy=25, yn=35, ny=5, nn=35)) == pytest.approx(0.2593, abs=5e-5)
    assert cohen_kappa("abc", "abc") == 1 and math.isnan(cohen_kappa("aa", "aa"))


# Fleiss, Levin & Paik's worked example as it is often printed: ten subjects, 14 raters, five categories: 0.210
FLEISS = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
    (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip


def test_fleiss_published_value():
    items = [[label for label, count in enumerate(row) for _ in range(count)] for row in FLEISS]
    assert fleiss_kappa(items) == pytest.approx(0.210, abs=5e-4)
    assert fleiss_kappa([["a", "a"], ["b", "b"]]) == 1
    assert math.isnan(fleiss_kappa([["a"], ["b"]])) and math.isnan(fleiss_kappa([["a", "a"]]))


def test_fleiss_of_unequal_numbers_counts_pairs():
    """Against a slow count of all pairs of labels given to one item."""
    items = [["a", "a", "b"], ["a", "b"], ["b", "b", "b", "a"], ["c"], ["a", "a"]]
    agreeing = pairs = 0
    for labels in items:
        for i, one in enumerate(labels):
            for j, other in enumerate(labels):
                if i != j:
                    pairs += 1
                    agreeing += one == other
    given = [label for labels in items if len(labels) > 1 for label in labels]
    chance = sum((given.count(label) / len(given)) ** 2 for label in set(given))
    assert fleiss_kappa(items) == pytest.approx((agreeing / pairs - chance) / (1 - chance))


def test_text_overlap():
    assert text_overlap("The heron wades.", "the HERON wades") == 1
    assert text_overlap("a b c d", "a b") == pytest.approx(2 * 2 / 6)
    assert text_overlap("白鹭涉水", "白鹭飞") == pytest.approx(2 * 2 / 7)
    assert text_overlap("a", "b") == 0 and text_overlap("!", "!") == 1 and text_overlap("!", "?") == 0
    assert text_overlap("x y", "y z z") == text_overlap("y z z", "x y")


def one(who, text=None, created="", review="", truth=False, stars=None, **labels):
    return Annotation(
        who,
        texts={"response": [text]} if text else {},
        labels={name: (label,) for name, label in labels.items()},
        ratings={} if stars is None else {"quality": stars},
        created=created,
        review=review,
        truth=truth,
    )


def why(annotations, rule):
    with pytest.raises(Undecided) as caught:
        decide(annotations, rule)
    return str(caught.value)


def test_majority():
    a, b, c = one("1", task="x"), one("2", task="y"), one("3", task="y")
    assert decide([a, b, c], "majority") is b
    assert why([a, b], "majority") == "a tie in `task`: 'x' and 'y', 1 each"
    assert decide([a], "majority") is a
    assert "nobody" in why([], "majority")
    assert decide([a, one("2", task="y", review="rejected")], "majority") is a
    assert "rejected every" in why([one("1", review="rejected")], "majority")
    same = [one("1", "Yes."), one("2", "No."), one("3", "Yes. ")]
    assert decide(same, "majority") is same[0]
    assert "2 different answers" in why(same[:2], "majority")
    near = [one("1", "a heron wades"), one("2", "a heron wades here"), one("3", "no idea")]
    assert decide(near, "majority") in near[:2]
    mixed = [one("1", "p", task="x", sub="1"), one("2", "q", task="x", sub="2"), one("3", "r", task="y", sub="2")]
    assert decide(mixed, "majority") is mixed[1]
    crossed = [one("1", a="x", b="1"), one("2", a="x", b="2"), one("3", a="y", b="1")]
    assert decide(crossed, "majority") is crossed[0]
    nobody = [one("1", a="x", b="1", c="p"), one("2", a="x", b="2", c="q"), one("3", a="y", b="1", c="q")]
    assert "in every field" in why(nobody, "majority")


def test_the_last_word_of_an_annotator_counts():
    early, late = one("1", task="x", created="2026-01-01"), one("1", task="y", created="2026-01-02")
    assert latest([late, early]) == [late]
    assert decide([early, late, one("2", task="y")], "majority") is late


def test_best_rated_and_reviewer():
    poor, good, even = one("1", "a", stars=2), one("2", "b", stars=5), one("3", "c", stars=5)
    assert decide([poor, good], "best_rated") is good
    assert "2 different answers share the best rating, 5" in why([poor, good, even], "best_rated")
    assert "none of the 2" in why([one("1", "a"), one("2", "b")], "best_rated")
    first, second = one("1", "a", review="accepted", created="1"), one("2", "b", truth=True, created="2")
    assert decide([poor, first, second], "reviewer") is second
    assert "no reviewer" in why([poor], "reviewer")


def test_agreement_of_a_project():
    tasks = [
        [one("1", "a b", task="x"), one("2", "a c", task="x")],
        [one("1", "d", task="x"), one("2", "d", task="y"), one("3", "e", task="y")],
        [one("1", "f", task="y")],
    ]
    found = agreement(tasks)
    assert found.tasks == {2: 1, 3: 1, 1: 1}
    assert found.overlap == pytest.approx((0.5 + 1 + 0 + 0) / 4)
    assert found.fleiss["task"] == pytest.approx(fleiss_kappa(["xx", "xyy", "y"]))
    assert found.cohen["task", "1", "2"] == (cohen_kappa("xx", "xy"), 2)
    assert found.as_dict()["annotators_per_task"] == {"1": 1, "2": 1, "3": 1}
    assert found.as_dict()["cohen"][1]["kappa"] == 0.0  # 1 said x, 3 said y, of one task
    nothing = agreement([]).as_dict()
    assert nothing["answer_overlap"] is None and nothing["fleiss"] == {}
