"""Retention: what counts as remembered, perplexity by definition, and files that cannot be read."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitout.errors import CheckError, DataError
from fitout.evaluate import retention
from fitout.evaluate.retention import Piece, Probe, Retention


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (" Tokyo. The capital", "Tokyo", True),
        ("Tokyo", "Tokyo", True),
        ("\n Tokyo, which", " Tokyo ", True),
        ("New\nYork is", "New York", True),
        ("tokyo", "Tokyo", False),
        ("Parisian", "Paris", False),
        ("The answer is Paris", "Paris", False),
        ("12", "12", True),
        ("12. Then", "12", True),
        ("12, 13", "12", True),
        ("123", "12", False),
        ("12.5", "12", False),
        ("12,500", "12", False),
        ("东京。日本", "东京", True),
        ("东京是首都", "东京", True),
        ("12个", "12", True),
        ("南京", "东京", False),
        ("", "Tokyo", False),
    ],
)
def test_begins_with(completion, answer, right):
    assert retention.begins_with(completion, answer) is right


def test_probes_by_group_with_what_changed():
    probes = tuple(Probe(f"p{at}", "yes", "first" if at < 3 else "second") for at in range(5))
    base, tuned = ["yes", "yes", "no", "no", "yes"], ["yes", "no", "no", "yes", "yes"]
    result = retention.compare_probes(Retention("here", probes), base, tuned, samples=200, seed=0)
    assert result.overall.base.value == result.overall.tuned.value == pytest.approx(60)
    assert result.groups["first"].base.value == pytest.approx(200 / 3)
    assert result.groups["first"].tuned.value == pytest.approx(100 / 3)
    assert (result.groups["second"].base.value, result.groups["second"].tuned.n) == (50, 2)
    assert result.forgotten == [{"prompt": "p1", "answer": "yes", "group": "first", "base": "yes", "tuned": "no"}]
    assert [row["prompt"] for row in result.gained] == ["p3"]


def test_perplexity_is_weighted_by_tokens():
    base = [[-1.0, -2.0, -3.0], [-0.5], []]
    tuned = [[-1.0, -1.0, -1.0], [-4.0], []]
    asked = Retention("a text", pieces=("x", "y", "z"))
    result = retention.compare_perplexity(
        asked, *([retention.piece(row) for row in rows] for rows in (base, tuned)), 200, 0
    )
    assert result.tokens == 4
    assert result.perplexity.base.value == pytest.approx(math.exp((1 + 2 + 3 + 0.5) / 4))
    assert result.perplexity.tuned.value == pytest.approx(math.exp((1 + 1 + 1 + 4) / 4))
    assert not result.perplexity.higher_is_better
    assert len(result.notes) == 1 and "1 of 3 pieces" in result.notes[0]


def test_a_lower_perplexity_is_better():
    asked = Retention("a text", pieces=("x",) * 30)
    result = retention.compare_perplexity(
        asked, [Piece(-20.0 - at, 10) for at in range(30)], [Piece(-10.0 - at, 10) for at in range(30)], 200, 0
    )
    assert result.perplexity.difference.high < 0 and result.perplexity.verdict == "better"


def test_a_broken_model_is_refused():
    with pytest.raises(CheckError):
        retention.piece([-1.0, float("nan")])


@given(st.text(alphabet="ab \n东", max_size=5000))
def test_pieces_are_the_whole_text(text):
    pieces = retention.cut(text)
    assert all(piece.strip() and len(piece) <= retention.PIECE_CHARACTERS for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_what_the_setting_asks_for(tmp_path):
    assert retention.load("off", [Probe("a", "b")]) is None
    assert retention.load("default", None) is None
    assert retention.load("default", [Probe("a", "b"), {"prompt": "c", "answer": "d", "group": "g"}]).probes == (
        Probe("a", "b"),
        Probe("c", "d", "g"),
    )
    probes = tmp_path / "probes.jsonl"
    probes.write_text(
        json.dumps({"prompt": "日本的首都是", "answer": "东京", "group": "首都"}, ensure_ascii=False) + "\n\n"
    )
    assert retention.load(str(probes)).probes == (Probe("日本的首都是", "东京", "首都"),)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time.\n")
    assert retention.load(str(text)).pieces == ("Once upon a time.\n",)


@pytest.mark.parametrize(
    ("name", "content", "cause", "where"),
    [
        ("missing.jsonl", None, "No such file", "missing.jsonl"),
        ("empty.txt", b" \n", "empty", "empty.txt"),
        ("latin.txt", b"caf\xe9", "not UTF-8 (byte 3)", "latin.txt"),
        ("broken.jsonl", b'{"prompt": "a", "answer": "b"}\n{"prompt"', "not JSON", "broken.jsonl:2"),
        ("list.jsonl", b"[1]\n", "not an object", "list.jsonl:1"),
        ("keys.jsonl", b'{"prompt": "a"}\n', "'answer' is missing", "keys.jsonl:1"),
        ("blank.jsonl", b'{"prompt": " ", "answer": "b"}\n', "'prompt' is missing or empty", "blank.jsonl:1"),
    ],
)
def test_a_file_that_cannot_be_used_is_said(tmp_path, name, content, cause, where):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        retention.load(str(tmp_path / name))
    assert cause in caught.value.message and caught.value.where.endswith(where) and caught.value.hint
