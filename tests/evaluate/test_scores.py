"""Scores against published vectors, the packages they come from, and slow obvious computations."""

import json
import math
import random
import re
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics import BLEU

from fitout.evaluate import scores

VECTORS = Path(__file__).parents[3] / "shared/data/rouge/rouge_vectors.json"

# ---------------------------------------------------------------------------------------------------------------------
# ROUGE


@pytest.mark.skipif(not VECTORS.exists(), reason="needs ../shared")
def test_rouge_equals_the_published_vectors_of_rouge_1_5_5():
    checked = 0
    for case in json.loads(VECTORS.read_text())["cases"]:
        rows = scores.rouge_rows([case["prediction"]], [case["target"]])
        for name, expected in case["expect"].items():
            if name in rows:  # stemmed and summary-level forms are other scores
                wanted = expected["fmeasure"] if isinstance(expected, dict) else expected
                assert rows[name][0] == pytest.approx(wanted, abs=1e-5), (name, case["target"][:60])
                checked += 1
    assert checked >= 12


@given(st.text(alphabet=string.printable + "“”’—é"))
def test_tokens_are_rouge_scores_own_where_all_letters_are_ascii(text):
    if not scores.has_other_letters(text):
        assert scores.Tokenizer().tokenize(text) == DefaultTokenizer().tokenize(text)


def test_tokens_of_other_scripts_are_not_lost():
    tokenize = scores.Tokenizer().tokenize
    assert DefaultTokenizer().tokenize("東京 Москва") == []
    assert tokenize("Москва, café!") == ["москва", "café"]
    assert tokenize("cafe\u0301") == ["café"]
    assert tokenize("我爱北京2008年 Olympics") == ["我", "爱", "北", "京", "2008", "年", "olympics"]
    assert tokenize("नमस्ते दुनिया") == ["नमस्ते", "दुनिया"]
    assert scores.Tokenizer("jieba").tokenize("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]


def test_chinese_rouge_is_by_character():
    rows = scores.rouge_rows(["东京是首都"], ["东京是日本的首都"])
    assert rows["rouge1"][0] == pytest.approx(2 * 5 / (5 + 8))
    assert rows["rouge2"][0] == pytest.approx(2 * 3 / (4 + 7))  # 东京 京是 首都
    assert rows["rougeL"][0] == pytest.approx(2 * 5 / (5 + 8))


# ---------------------------------------------------------------------------------------------------------------------
# Exact match and F1


def test_exact_match():
    assert scores.exact_match(" New  York\n", "New York") == 1
    assert scores.exact_match("cafe\u0301", "café") == 1
    assert scores.exact_match("new york", "New York") == 0
    assert scores.exact_match("New York.", "New York") == 0
    assert scores.exact_match(" ", "") == 0  # an empty answer is never right


def squad_f1(answer, reference):
    """The SQuAD definition, written out: normalise, count shared tokens, harmonic mean."""

    def tokens(text):
        text = "".join(c for c in text.lower() if c not in string.punctuation)
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    found, wanted = tokens(answer), tokens(reference)
    shared = 0
    for token in set(found):
        shared += min(found.count(token), wanted.count(token))
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


words = st.lists(
    st.sampled_from(["The", "cat", "sat.", "a", "mat", "don't", "on", "(on)", "cat"]), min_size=1, max_size=8
)


@given(words.map(" ".join), words.map(" ".join))
def test_f1_is_squads(answer, reference):
    if scores.f1_tokens(answer) and scores.f1_tokens(reference):
        assert scores.token_f1(answer, reference) == pytest.approx(squad_f1(answer, reference))


def test_f1_by_hand():
    assert scores.token_f1("The cat sat.", "a cat sat down") == pytest.approx(0.8)
    assert scores.token_f1("东京", "东京市。") == pytest.approx(0.8)
    assert scores.token_f1("", "Tokyo") == 0
    assert scores.token_f1("+", "+") == 1 and scores.token_f1("-", "+") == 0  # nothing left: exact match decides
    assert scores.token_f1("北京大学", "北京 大学", words="jieba") == 0  # one word against two


# ---------------------------------------------------------------------------------------------------------------------
# BLEU


@pytest.mark.parametrize(
    ("sums", "documented"),
    [([17, 18, 14, 7, 5, 3, 17, 14, 11, 8], 48.53), ([17, 19, 14, 6, 3, 1, 17, 14, 11, 8], 29.44)],
)
def test_bleu_of_the_counts_in_sacrebleus_readme(sums, documented):
    assert float(scores.bleu_value(np.array(sums))) == pytest.approx(documented, abs=0.005)


def random_sentences(seed, count, vocabulary, joiner):
    draw = random.Random(seed)
    return [joiner.join(draw.choices(vocabulary, k=draw.randint(0, 9))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("tokenizer", "vocabulary", "joiner"),
    [("13a", ["cat", "sat", "mat,", "on.", "it's", "the"], " "), ("zh", "东京是首都。a", "")],
)
def test_corpus_bleu_is_sacrebleus(seed, tokenizer, vocabulary, joiner):
    rows = 1 + seed * 2
    answers, references = (random_sentences(2 * seed + at, rows, vocabulary, joiner) for at in (0, 1))
    statistics, signature = scores.bleu_statistics(answers, references, tokenizer)
    metric = BLEU(tokenize=tokenizer)
    wanted = metric.corpus_score(answers, [references])
    assert float(scores.bleu_value(statistics.sum(axis=0))) == pytest.approx(wanted.score, abs=1e-9)
    assert signature == str(metric.get_signature()) and f"tok:{tokenizer}" in signature


def test_chinese_bleu_by_hand():
    """Papineni's formula over characters, written out."""
    answers, references = ["东京是日本的首都", "北京很大"], ["东京是日本国的首都", "北京很大很美"]
    log, length, wanted = 0.0, sum(map(len, answers)), sum(map(len, references))
    for order in range(1, 5):
        matches = total = 0
        for answer, reference in zip(answers, references, strict=True):
            grams = [
                Counter(text[at : at + order] for at in range(len(text) - order + 1)) for text in (answer, reference)
            ]
            matches += sum((grams[0] & grams[1]).values())
            total += sum(grams[0].values())
        log += math.log(matches / total) / 4
    by_hand = 100 * math.exp(min(0.0, 1 - wanted / length) + log)
    statistics, _ = scores.bleu_statistics(answers, references, "zh")
    assert float(scores.bleu_value(statistics.sum(axis=0))) == pytest.approx(by_hand)


def test_the_references_choose_the_bleu_tokenizer():
    assert scores.bleu_tokenizer("Tokyo") == "13a"
    assert scores.bleu_tokenizer("日本的首都是 Tokyo") == "zh"
    assert scores.bleu_tokenizer("The character 京 means capital") == "13a"
    assert scores.bleu_tokenizer("東京です") == "char"
    assert scores.bleu_tokenizer("12", prompt="三乘四等于几？") == "zh"
    assert scores.bleu_tokenizer("12", prompt="3 times 4?") == "13a"
    found = scores.measures(
        ["bleu"], ["Tokyo it is", "东京", "7"], ["x", "y", "7"], ["Tokyo it is", "东京", "7"], prompts=["", "", "几？"]
    )
    assert [(measure.name, measure.rows.tolist()) for measure in found] == [("bleu:13a", [0]), ("bleu:zh", [1, 2])]


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def slow_macro_f1(answers, references):
    values = []
    for label in set(references):
        right = sum(a == r == label for a, r in zip(answers, references, strict=True))
        wrong = sum(a == label != r for a, r in zip(answers, references, strict=True))
        missed = sum(r == label != a for a, r in zip(answers, references, strict=True))
        precision = right / (right + wrong) if right + wrong else 0
        recall = right / (right + missed)
        values.append(2 * precision * recall / (precision + recall) if precision + recall else 0)
    return 100 * sum(values) / len(values)


labels = st.sampled_from(["a", "b", "c", "none of them"])


@given(st.lists(st.tuples(labels, st.sampled_from(["a", "b", "c"])), min_size=1, max_size=30))
def test_macro_f1_is_the_mean_over_labels(pairs):
    answers, references = zip(*pairs, strict=True)
    statistics = scores.macro_f1_statistics(answers, references)
    value = float(scores.macro_f1_value(statistics.sum(axis=0)))
    assert value == pytest.approx(slow_macro_f1(answers, references))


def test_macro_f1_of_a_documented_example():
    """scikit-learn's manual: labels 0 1 2 0 1 2, answers 0 2 1 0 0 1, macro-F1 0.2666..."""
    statistics = scores.macro_f1_statistics(list("021001"), list("012012"))
    assert float(scores.macro_f1_value(statistics.sum(axis=0))) == pytest.approx(26.6667, abs=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_the_bootstrap_is_rows_drawn_with_replacement():
    rows = np.random.default_rng(3).random((7, 2))
    draws = np.random.default_rng(5).integers(0, 7, size=(200, 7))
    slow = np.array([[sum(rows[at][column] for at in draw) for column in (0, 1)] for draw in draws])
    np.testing.assert_allclose(scores.resampled_sums(rows, 200, seed=5), slow)


def test_the_interval_of_a_mean_is_what_theory_says():
    draw = np.random.default_rng(0)
    base = (draw.random(2000) < 0.3).astype(float)
    tuned = np.maximum(base, draw.random(2000) < 0.2)
    result = scores.compare(scores.mean_measure("x", base, tuned, ""), samples=4000)
    for score, rows in ((result.base, base), (result.tuned, tuned), (result.difference, tuned - base)):
        error = 1.96 * 100 * rows.std() / math.sqrt(2000)
        assert score.value == pytest.approx(100 * rows.mean()) and score.n == 2000
        assert score.low == pytest.approx(score.value - error, abs=0.1 * error)
        assert score.high == pytest.approx(score.value + error, abs=0.1 * error)
    assert result.verdict == "better" and result.interval == "bootstrap"


def test_the_difference_is_paired():
    """Rows that differ wildly from each other but hardly between models: only pairing shows the gain."""
    base = np.random.default_rng(1).random(300)
    result = scores.compare(scores.mean_measure("x", base, base + 0.01 * np.random.default_rng(2).random(300), ""))
    assert result.base.high > result.tuned.low  # unpaired intervals overlap
    assert result.difference.low > 0 and result.difference.high - result.difference.low < 0.2


def test_where_all_rows_are_alike_the_interval_is_the_exact_one():
    result = scores.compare(scores.mean_measure("x", [0] * 60, [1] * 60, ""))
    unseen = 1 - result.base.high / 100
    assert unseen**60 == pytest.approx(0.025)  # Clopper and Pearson: 0 of 60 is this likely at the upper bound
    assert (result.base.low, result.tuned.high, result.difference.high) == (0, 100, 100)
    assert result.tuned.low == pytest.approx(100 * unseen)
    assert result.difference.low == pytest.approx(100 * (2 * unseen - 1))
    assert result.verdict == "better" and "exact" in result.interval
    same = scores.compare(scores.mean_measure("x", [1, 0, 1], [1, 0, 1], ""))
    assert same.difference.value == 0 and same.difference.low < 0 < same.difference.high
    assert same.verdict == "no difference shown"


def test_too_few_rows_give_no_verdict():
    """What is no mean of rows could else be "better" by a single question, with an interval of no width."""
    for n in (1, 2, 4):
        answers, others = ["the cat sat on the mat"] * n, ["a dog ran over the whole field today"] * n
        for base, tuned in ((answers, others), (others, answers)):
            for measure in scores.measures(["bleu"], answers, base, tuned, prompts=["?"] * n):
                result = scores.compare(measure)
                assert result.verdict == "no difference shown" and result.interval.startswith("too few")
                assert 0 <= result.base.low <= result.base.value <= result.base.high <= 100
    few = np.array([[2.0, 1.0]] * 3)
    perplexity = scores.Measure("p", np.arange(3), few, few + [[0.1, 0.0]], lambda s: np.exp(s[..., 0] / s[..., 1]), "")
    assert scores.compare(perplexity).verdict == "no difference shown"


def test_intervals_are_repeatable_and_follow_the_seed():
    measure = scores.mean_measure("x", np.arange(40) / 40, np.arange(40)[::-1] / 50, "")
    assert scores.compare(measure, seed=1) == scores.compare(measure, seed=1) != scores.compare(measure, seed=2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.text(), st.text(min_size=1), st.text()), min_size=1, max_size=6))
def test_any_text_can_be_scored(rows):
    base, references, tuned = zip(*rows, strict=True)
    found = scores.measures(
        ["exact_match", "f1", "rouge", "bleu", "accuracy"], references, base, tuned, prompts=[""] * len(rows)
    )
    for measure in found:
        result = scores.compare(measure, samples=100)
        for score in (result.base, result.tuned):
            assert 0 <= score.low <= score.high <= 100 + 1e-9 and 0 <= score.value <= 100 + 1e-9
    base_rows, _ = scores.row_scores(found, len(rows))
    for answer, row in zip(base, base_rows, strict=True):
        if not answer.strip():
            assert set(row.values()) == {0.0}


def test_an_empty_answer_is_a_zero_in_the_mean():
    found = scores.measures(["exact_match", "rouge"], ["Tokyo", "Paris"], ["", ""], ["Tokyo", ""], prompts=["", ""])
    for measure in found:
        result = scores.compare(measure)
        assert result.tuned.n == 2
        assert result.tuned.value == (0 if measure.name == "rouge2" else 50)
