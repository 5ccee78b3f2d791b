"""Methods against each other, held against loops that spell the definitions out."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from fitout.errors import CheckError
from fitout.evaluate import compare as door
from fitout.evaluate.compare import ALPHA, Trials, compare, holm, student_quantile, student_tail, verdict
from fitout.evaluate.compare_page import render, verdicts, write_comparison
from fitout.evaluate.outcomes import retention_trials, task_trials
from fitout.evaluate.scores import ratio
from fitout.files import read_jsonl, write_json, write_jsonl
from fitout.rundir import RunDir


def right_or_wrong(by_method, base=None) -> Trials:
    """Trials of a share of right answers: {method: [[0 or 1 for each question] for each seed]}."""

    def of(seeds) -> np.ndarray:
        scores = 100.0 * np.asarray(seeds, dtype=np.float64)
        return np.stack([scores, np.ones_like(scores)], axis=2)

    questions = len(next(iter(by_method.values()))[0])
    base = [0] * questions if base is None else base
    return Trials("exact_match", {name: of(one) for name, one in by_method.items()}, ratio, of([base])[0], unit=100.0)


def answers(chance, seeds, questions, rng) -> list[list[int]]:
    return [[int(rng.random() < chance) for _ in range(questions)] for _ in range(seeds)]


# the definitions, slowly


def slow_t_quantile(level: float, freedom: float) -> float:
    """From the density's formula, by adding up rectangles from zero outwards."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    area, t, step = 0.0, 0.0, 2e-4
    while 2 * area < 1 - level:
        area += step * scale * (1 + (t + step / 2) ** 2 / freedom) ** (-(freedom + 1) / 2)
        t += step
    return t


def slow_difference(trials: Trials, first: str, second: str, samples: int, seed: int, level: float):
    """(value, low, high) by the definition: draw questions, draw seeds, add up, subtract; loops only."""
    n = len(trials.base)
    questions = np.random.default_rng(seed).integers(0, n, size=(samples, n))
    methods = list(trials.by_method)

    def value(name: str, which_seeds, which_questions) -> float:
        values = []
        for at in which_seeds:
            sums = [0.0] * trials.base.shape[1]
            for question in which_questions:
                for column in range(len(sums)):
                    sums[column] += float(trials.by_method[name][at][question][column])
            values.append(float(trials.value(np.asarray(sums))))
        return sum(values) / len(values)

    count = {name: len(trials.by_method[name]) for name in (first, second)}
    drawn = {
        name: np.random.default_rng([seed, 1 + methods.index(name)]).integers(
            0, count[name], size=(samples, max(1, count[name] - 1))
        )
        for name in (first, second)
    }
    everyone = {name: range(count[name]) for name in (first, second)}
    both, fixed = [], []
    for at in range(samples):
        both.append(value(first, drawn[first][at], questions[at]) - value(second, drawn[second][at], questions[at]))
        fixed.append(value(first, everyone[first], questions[at]) - value(second, everyone[second], questions[at]))
    parts = [(statistics.variance(fixed), n - 1)]  # the spread over questions, then over seeds
    for name in (first, second):
        if count[name] > 1:
            each = [value(name, [at], range(n)) for at in everyone[name]]
            parts.append((statistics.variance(each) / count[name], count[name] - 1))
    freedom = sum(v for v, _ in parts) ** 2 / sum(v * v / f for v, f in parts)
    seeds = sum(v for v, _ in parts[1:])
    answer = max(0.0, statistics.variance(both) - parts[0][0] - seeds)  # of single answers: counted once, not thrice
    error = math.sqrt(parts[0][0] + max(0.0, seeds - answer))
    middle = value(first, everyone[first], range(n)) - value(second, everyone[second], range(n))
    reach = slow_t_quantile(level, freedom) * error
    return middle, middle - reach, middle + reach


@pytest.mark.parametrize("seeds", [(1, 1), (3, 3), (3, 2)])
def test_a_difference_equals_the_slow_definition(seeds):
    rng = np.random.default_rng(5)
    trials = right_or_wrong({"a": answers(0.7, seeds[0], 14, rng), "b": answers(0.5, seeds[1], 14, rng)})
    [pair] = compare(trials, samples=60, seed=3).pairs
    want = slow_difference(trials, "a", "b", 60, 3, 0.05)
    assert (pair.value, pair.low, pair.high) == pytest.approx(want, abs=0.02)


def test_a_score_that_is_no_mean_of_questions_equals_the_slow_definition():
    """As BLEU and perplexity are: a curved function of sums, here exp of a ratio."""
    rng = np.random.default_rng(6)
    by_method = {name: rng.uniform(0.5, 2.0, size=(2, 12, 2)) for name in ("a", "b", "c")}
    trials = Trials("curved", by_method, lambda sums: np.exp(ratio(sums)), rng.uniform(0.5, 2.0, size=(12, 2)))
    found = compare(trials, samples=50, seed=1)
    for pair in found.pairs:
        want = slow_difference(trials, pair.first, pair.second, 50, 1, pair.level)
        assert (pair.value, pair.low, pair.high) == pytest.approx(want, abs=2e-3)


@pytest.mark.parametrize(
    ("freedom", "level", "table"),
    [(1, 0.05, 12.706), (2, 0.05, 4.303), (4, 0.05, 2.776), (10, 0.01, 3.169), (30, 0.1, 1.697), (1e9, 0.05, 1.960)],
)
def test_students_t_is_the_tables(freedom, level, table):
    assert student_quantile(level, freedom) == pytest.approx(table, abs=6e-4)
    assert student_tail(table, freedom) == pytest.approx(level, abs=1e-4)


# what may be called different


def test_overlap_is_no_difference_shown():
    rng = np.random.default_rng(0)
    found = compare(right_or_wrong({"full": answers(0.72, 3, 60, rng), "lora": answers(0.68, 3, 60, rng)}))
    assert found.pairs[0].low < 0 < found.pairs[0].high
    assert found.pairs[0].better is None and found.places == {"full": 1, "lora": 1}
    assert verdict(found) == "no difference shown between full and lora."


def test_what_intervals_separate_is_ranked_and_the_rest_is_not():
    rng = np.random.default_rng(0)
    trials = right_or_wrong(
        {"a": answers(0.9, 3, 120, rng), "b": answers(0.88, 3, 120, rng), "c": answers(0.3, 3, 120, rng)}
    )
    found = compare(trials)
    assert found.places == {"a": 1, "b": 1, "c": 3}
    assert verdict(found) == "a is better than c; b is better than c; no difference shown between a and b."


def test_lower_is_better_where_it_is():
    rng = np.random.default_rng(0)
    by_method = {
        name: np.stack([mean + 0.1 * rng.standard_normal((2, 40)), np.ones((2, 40))], axis=2)
        for name, mean in (("high", 2.0), ("low", 1.0))
    }
    trials = Trials("perplexity", by_method, ratio, by_method["high"][0], higher_is_better=False)
    assert compare(trials).places == {"high": 2, "low": 1}


def test_the_same_questions_are_paired():
    """All of b's right answers and ten more: clear by question, although the two estimates overlap by far."""
    b = [at % 2 for at in range(100)]
    a = [1 if at < 20 else one for at, one in enumerate(b)]
    found = compare(right_or_wrong({"a": [a], "b": [b]}))
    assert found.pairs[0].better == "a"
    assert found.estimates["a"].low < found.estimates["b"].high


def test_seeds_that_differ_widen_the_interval():
    """Three trainings of 50 and 90 and 70 % say less than three of 70 %, on as many questions."""

    def seeds(*shares):
        return [[int((at * 37) % 100 < share) for at in range(100)] for share in shares]

    alike = compare(right_or_wrong({"a": seeds(70, 70, 70), "b": seeds(60, 60, 60)})).pairs[0]
    apart = compare(right_or_wrong({"a": seeds(50, 90, 70), "b": seeds(60, 60, 60)})).pairs[0]
    assert alike.better == "a" and apart.better is None
    assert apart.high - apart.low > 4 * (alike.high - alike.low)


def test_the_standard_error_is_the_variance_components():
    """For a mean, the resamples' parts are those of the analysis of variance of the table of seeds by questions."""
    rng = np.random.default_rng(4)
    seeds, n = 4, 80
    table = rng.normal(0, 3, n) + rng.normal(0, 2, (seeds, 1)) + rng.normal(0, 4, (seeds, n))
    trials = Trials("mean", {"a": np.stack([table, np.ones_like(table)], axis=2)}, ratio, np.ones((n, 2)))
    drawn = door._draw(trials, 20_000, 0)["a"]
    error, _ = door.standard_error(drawn.both, drawn.questions, [drawn.seed_part], n)
    rest = table - table.mean(0) - table.mean(1, keepdims=True) + table.mean()
    alone = (rest**2).sum() / ((seeds - 1) * (n - 1)) / (seeds * n)
    want = table.mean(0).var(ddof=1) / n + max(0, table.mean(1).var(ddof=1) / seeds - alone)
    assert error == pytest.approx(math.sqrt(want), rel=0.02)


def test_false_alarms_are_rare_with_few_seeds():
    """Two equal methods, three seeds each, with seeds that differ: about 5 % are called
    different."""
    rng = np.random.default_rng(7)
    alarms, rounds = 0, 160
    for one in range(rounds):
        hard = rng.normal(0, 1.5, 40)
        by_method = {
            name: [(rng.random(40) < 1 / (1 + np.exp(-hard - rng.normal(0, 1)))).astype(int) for _ in range(3)]
            for name in "ab"
        }
        alarms += compare(right_or_wrong(by_method), samples=150, seed=one).pairs[0].better is not None
    assert alarms / rounds <= 0.08


def test_all_alike_is_an_exact_bound():
    ones, zeros = [[1] * 20], [[0] * 20]
    found = compare(right_or_wrong({"a": ones, "b": ones, "c": zeros}))
    same = next(pair for pair in found.pairs if pair.second == "b")
    assert same.better is None and same.low < 0 < same.high
    assert found.places == {"a": 1, "b": 1, "c": 3}
    few = compare(right_or_wrong({"a": [[1, 1]], "c": [[0, 0]]}))
    assert few.pairs[0].better is None  # two questions show nothing


def slow_holm(p_values):
    """Holm 1979, as it is written: smallest first, each against alpha over the number left; stop at the first miss."""
    rejected = set()
    left = list(range(len(p_values)))
    while left:
        at = min(left, key=lambda one: p_values[one])
        if p_values[at] > ALPHA / len(left):
            break
        rejected.add(at)
        left.remove(at)
    return rejected


def test_holm_is_holm():
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, 6, 15):
        for _ in range(40):
            p_values = list(rng.random(count) ** 4)
            adjusted, levels = holm(p_values)
            rejected = {at for at, p in enumerate(adjusted) if p <= ALPHA}
            assert rejected == slow_holm(p_values)
            # an interval at a pair's level excludes zero exactly where p is not above that level
            assert {at for at in range(count) if p_values[at] <= levels[at]} == rejected
    assert holm([0.01, 0.04, 0.03])[0] == pytest.approx([0.03, 0.06, 0.06])


def test_an_interval_excludes_zero_exactly_where_a_difference_is_shown():
    rng = np.random.default_rng(2)
    shown = set()
    for one in range(12):
        chances = rng.uniform(0.4, 0.75, 5)
        by_method = {f"m{at}": answers(chance, 2, 80, rng) for at, chance in enumerate(chances)}
        for pair in compare(right_or_wrong(by_method), samples=200, seed=one).pairs:
            assert (pair.better is not None) == (not pair.low <= 0 <= pair.high) == (pair.p <= ALPHA)
            shown.add(pair.better is not None)
    assert shown == {True, False}


def test_other_questions_are_refused():
    with pytest.raises(ValueError, match="not asked the same"):
        compare(right_or_wrong({"a": [[1, 0, 1]], "b": [[1, 0]]}))


# read back from runs


def written(folder, right, *, references=None, forgot=()) -> RunDir:
    """A run directory as an evaluation leaves it: `right` says which questions were answered right."""
    run = RunDir(folder)
    references = references or [f"answer {at}" for at in range(len(right))]
    rows = [
        {"origin": f"f:{at}", "reference": reference, "base": "no idea", "tuned": reference if good else "wrong",
         "prompt": [{"role": "user", "content": "?"}]}
        for at, (reference, good) in enumerate(zip(references, right, strict=True))
    ]  # fmt: skip
    write_jsonl(run.predictions, rows)
    probes = [
        {"prompt": f"p{at}", "answer": "x", "base_right": True, "tuned_right": at not in forgot} for at in range(4)
    ]
    write_jsonl(run.retention, probes)
    report = {"settings": {"metrics": ["exact_match", "bleu"], "words": "auto"}, "scores": [{"name": "exact_match"}]}
    write_json(run.evaluation_report, report)
    return run


def test_runs_are_read_back(tmp_path):
    runs = {
        "a": [written(tmp_path / "a0", [1, 1, 0, 1]), written(tmp_path / "a1", [1, 0, 0, 1], forgot=(1, 2))],
        "b": [written(tmp_path / "b0", [0, 0, 0, 1])],
    }
    exact, bleu = (compare(one, samples=100) for one in task_trials(runs))
    assert (exact.name, bleu.name) == ("exact_match", "bleu")
    assert exact.by_seed == {"a": [75.0, 50.0], "b": [25.0]} and exact.base.value == 0
    assert exact.estimates["a"].value == 62.5
    [kept] = retention_trials(runs)
    assert compare(kept, samples=100).by_seed == {"a": [100.0, 50.0], "b": [100.0]}


def test_runs_on_pairs_are_compared_by_what_they_prefer(tmp_path):
    """100 or 0 points a row; a question without a rejected answer has none."""
    runs = {name: [written(tmp_path / name, [0, 0, 0, 1])] for name in ("a", "b")}
    for name, prefers in (("a", [100.0, 100.0, 0.0]), ("b", [0.0, 100.0, 0.0])):
        rows = read_jsonl(runs[name][0].predictions)
        for row, value in zip(rows, prefers, strict=False):
            row |= {"base_scores": {"preference": 0.0}, "tuned_scores": {"preference": value}}
        write_jsonl(runs[name][0].predictions, rows)
    preference, *others = (compare(one, samples=100) for one in task_trials(runs))
    assert preference.name == "preference" and [one.name for one in others] == ["exact_match", "bleu"]
    assert {name: round(one.value, 1) for name, one in preference.estimates.items()} == {"a": 66.7, "b": 33.3}


def test_runs_that_were_asked_other_questions_are_refused(tmp_path):
    runs = {"a": [written(tmp_path / "a", [1, 1])], "b": [written(tmp_path / "b", [1, 1], references=["x", "y"])]}
    with pytest.raises(CheckError, match="not asked the questions"):
        task_trials(runs)


# the page


def result_of(count: int = 6, **more) -> dict:
    """A comparison of six methods and one that failed."""
    rng = np.random.default_rng(3)
    names = ["full", "lora", "dora", "qlora", "adapter", "sparse"][:count]
    standing = compare(right_or_wrong({n: answers(0.9 - 0.07 * at, 3, 140, rng) for at, n in enumerate(names)}))
    kept = compare(right_or_wrong({n: answers(0.97, 3, 168, rng) for n in names}, base=[1] * 168))
    kept = replace(kept, name="probes")
    run = {"train_seconds": 61.0, "step_seconds": 0.4, "disk_bytes": 12_900_000, "trained_parameters": 175_104,
           "parameters": 3_397_056, "validation_loss": 0.31, "device": "cpu"}  # fmt: skip
    methods = {
        name: {"settings": {"kind": name}, "steps": 60, "rates": {"0.0001": 1.2, "0.0003": 0.9, "0.001": None},
               "whole": {"0.0003": 0.7, "0.0001": 0.8},
               "lr": 3e-4, "at_edge": False, "failed": {},
               "runs": {str(s): {**run, "memory_mb": 620 - 30 * at + s} for s in range(3)}}
        for at, name in enumerate(names)
    }  # fmt: skip
    failure = {"all": {"reason": "the package <bitsandbytes> is not installed", "log": "x.txt"}}
    methods["8bit"] = {
        "settings": {},
        "steps": 60,
        "rates": {},
        "whole": {},
        "lr": None,
        "at_edge": False,
        "runs": {},
        "failed": failure,
    }
    return {
        "title": "my <demo>", "base": "embedded:shell", "folder": "runs/x", "budget": "60 steps", "seeds": [0, 1, 2],
        "data": {"train": 500, "validation": 50, "test": 140}, "split_seed": 0, "methods": methods,
        "task": [standing.as_dict()], "retention": [kept.as_dict()], "samples": 2000,
        "verdicts": verdicts(standing, [kept], 3),
        "versions": {"fitout": "0"}, "command": "fitout compare r.yaml", **more,
    }  # fmt: skip


def test_the_page_stands_alone_and_tells_everything(tmp_path):
    result = write_comparison(result_of(), tmp_path / "compare.html", tmp_path / "compare.json")
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in html and "http://" not in html and "https://" not in html and "src=" not in html
    assert "my &lt;demo&gt;" in html and "<demo>" not in html
    assert "the package &lt;bitsandbytes&gt; is not installed" in html
    for name in result["task"][0]["places"]:
        assert 'class="mark"' in html and f">{name}</text>" in html
    assert "no difference shown" in html and "is better" in html
    assert html.count("diverged") == 6  # the rate without a finite loss, for each method
    assert "Infinity" not in (tmp_path / "compare.json").read_text()


def test_a_page_of_one_method_ranks_nothing():
    html = render(result_of(1))
    assert "there is nothing to compare it with" in html and "<h2>Differences" not in html


def test_what_the_base_lost_is_told():
    """Retention is compared with the base too, which is no method and has no place."""
    rng = np.random.default_rng(0)
    found = compare(right_or_wrong({"a": answers(0.8, 3, 100, rng), "b": [[1] * 100] * 3}, base=[1] * 100))
    assert found.gains["a"].better == door.BASE and found.gains["a"].high < 0
    assert found.gains["b"].better is None
    assert set(found.places) == {"a", "b"}
    result = result_of(2)
    result["retention"] = [{**found.as_dict(), "places": result["task"][0]["places"]}]
    for key in ("estimates", "gains", "by_seed"):
        of = result["retention"][0][key]
        result["retention"][0][key] = {"full": of["a"], "lora": of["b"]}
    html = render(result)
    assert f'<span class="worse">{found.gains["a"].value:+.1f}</span>' in html
    assert '<span class="soft">+0.0</span>' in html


def test_one_seed_is_told_apart():
    found = compare(right_or_wrong({"a": [[1, 0, 1]], "b": [[1, 1, 0]]}))
    assert "With one seed" in verdicts(found, [], 1)[-1] and len(verdicts(found, [], 2)) == 1
