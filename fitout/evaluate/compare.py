"""Methods against each other: estimates over questions and seeds, paired differences, and a ranking that only says
what was shown.

    Trials        the statistics of one measure: for each method an array (seeds, questions, k)
    compare       estimates of every method, every pair's difference, places

*What varies.* A method's figure is the mean over its seeds of the measure on all questions. It would come out
differently on other questions of the same kind and after another training. Both are measured by resampling:

    Q     questions with replacement, the same draw for every method and seed. That pairs the methods question by
          question, and a question that is hard for all widens nothing
    S     the spread over seeds, s^2 / number of seeds, apart for each method
    both  questions and seeds at once (seeds: one fewer than there are, which makes the variance of a mean unbiased)

Chance that belongs to one answer alone (this seed, that question) is in Q and in S, and once more in both (Owen, "The
pigeonhole bootstrap", Annals of Applied Statistics 1:2, 2007). So it is I = both - Q - S, what seeds add beyond it is
S - I, and the variance is Q + max(0, S - I). With I left in, intervals are up to 1.7 times as wide as they need
be; without S they are too narrow by far as soon as seeds differ.

*Intervals* are the difference plus or minus Student's t times that standard error. With three seeds the spread over
seeds is itself a guess, so the degrees of freedom are Satterthwaite's (Biometrics Bulletin 2:6, 1946) for Q + S. In
simulation (equal methods, 40 or 140 questions, seeds from all alike to very different) two methods of three seeds were
called different in 2 to 6 % of the rounds, of two seeds in 2 to 9 %. With one seed the spread over seeds cannot be
seen: the intervals speak of the questions alone, and the false alarms were 5 to 68 %.

*Many pairs.* Within a measure the pairs are tested by Holm's procedure (Scandinavian Journal of Statistics 6:2, 1979):
with probability 0.95 no pair is called different that is not. Each pair's interval is given at the level at which Holm
tested it, so that it excludes zero exactly where a difference is shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from .scores import Score, alike_interval, resampled_sums

ALPHA = 0.05


@dataclass(frozen=True)
class Trials:
    """One measure of every method.

    by_method   statistics (S, n, k) float64 for each method: S seeds (not the same number for all, perhaps), the n
                questions in the same order everywhere
    value       sums (..., k) -> values (...)
    base        (n, k) of the base model, which is not in the race
    unit        the largest value a question can reach when the value is a mean from 0 on, else None
    """

    name: str
    by_method: Mapping[str, np.ndarray]
    value: Callable[[np.ndarray], np.ndarray]
    base: np.ndarray
    unit: float | None = None
    higher_is_better: bool = True
    signature: str = ""


@dataclass(frozen=True)
class Pair:
    """first minus second, with the interval at the level Holm tested it at, and Holm's p-value.

    `better` names the one that was shown to be better, or is None: no difference shown.
    """

    first: str
    second: str
    value: float
    low: float
    high: float
    level: float
    p: float
    better: str | None


@dataclass(frozen=True)
class Standing:
    """One measure, all methods compared.

    estimates   each method's value with its own 95 % interval
    by_seed     each method's value for each seed
    places      1 + the number of methods shown to be better; equal places say nothing about an order
    """

    name: str
    higher_is_better: bool
    signature: str
    n: int
    base: Score
    estimates: dict[str, Score]
    by_seed: dict[str, list[float]]
    gains: dict[str, Pair]
    pairs: list[Pair]
    places: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(trials: Trials, samples: int = 2000, seed: int = 0) -> Standing:
    """Estimates, differences and places. Raises ValueError when the methods were not asked the same questions."""
    drawn = _draw(trials, samples, seed)
    methods = list(trials.by_method)
    gaps = [_gap(drawn, one, other) for one, other in combinations(methods, 2)]
    gains = {name: _gap(drawn, name, BASE) for name in methods}
    pairs = _pairs(gaps, trials.higher_is_better)
    return Standing(
        name=trials.name,
        higher_is_better=trials.higher_is_better,
        signature=trials.signature,
        n=len(trials.base),
        base=_estimate(drawn[BASE]),
        estimates={name: _estimate(drawn[name]) for name in methods},
        by_seed={name: drawn[name].seeds for name in methods},
        gains=dict(zip(methods, _pairs(list(gains.values()), trials.higher_is_better), strict=True)),
        pairs=pairs,
        places=places(methods, pairs),
    )


def places(methods: Sequence[str], pairs: Sequence[Pair]) -> dict[str, int]:
    """1 + how many methods were shown to be better than each."""
    beaten = [pair.second if pair.better == pair.first else pair.first for pair in pairs if pair.better]
    return {name: 1 + beaten.count(name) for name in methods}


def verdict(standing: Standing) -> str:
    """What was shown, in words."""
    methods = list(standing.places)
    if len(methods) == 1:
        return f"only {methods[0]} finished, there is nothing to compare it with."
    beaten: dict[str, list[str]] = {}
    for pair in standing.pairs:
        if pair.better:
            beaten.setdefault(pair.better, []).append(pair.second if pair.better == pair.first else pair.first)
    if not beaten:
        return f"no difference shown between {_listed(methods)}."
    best_first = sorted(beaten, key=lambda name: (standing.places[name], -len(beaten[name])))
    open_ = [f"{pair.first} and {pair.second}" for pair in standing.pairs if not pair.better]
    said = [f"{name} is better than {_listed(beaten[name])}" for name in best_first]
    said += [f"no difference shown between {', '.join(open_)}"] if open_ else []
    return "; ".join(said) + "."


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


# resampling

BASE = "base"  # the base model beside the methods; no kind is named so


@dataclass(frozen=True)
class _Drawn:
    """A method's value, what it is over resamples of questions and seeds, and over resamples of questions alone."""

    value: float
    seeds: list[float]
    both: np.ndarray
    questions: np.ndarray
    n: int
    unit: float | None

    @property
    def seed_part(self) -> tuple[float, int]:
        """Variance of the mean over seeds (s^2 / number), and its degrees of freedom."""
        count = len(self.seeds)
        return (float(np.var(self.seeds, ddof=1)) / count if count > 1 else 0.0), count - 1


def _draw(trials: Trials, samples: int, seed: int) -> dict[str, _Drawn]:
    """Every method's resamples, on the same draws of questions; the base has one seed."""
    groups = {**trials.by_method, BASE: trials.base[None]}
    n, width = trials.base.shape
    for name, one in groups.items():
        if one.ndim != 3 or one.shape[1:] != (n, width) or not len(one):
            raise ValueError(f"{name} was not asked the same {n} questions: statistics {one.shape}")
    side_by_side = np.concatenate([one for group in groups.values() for one in group], axis=1)
    sums = resampled_sums(side_by_side, samples, seed).reshape(samples, -1, width)
    found, at = {}, 0
    for number, (name, group) in enumerate(groups.items()):
        count = len(group)
        values = trials.value(sums[:, at : at + count])  # (samples, S)
        at += count
        chosen = seed_draws(count, samples, seed, number)
        each = trials.value(group.sum(axis=1))
        found[name] = _Drawn(
            value=float(each.mean()),
            seeds=[float(value) for value in each],
            both=np.take_along_axis(values, chosen, axis=1).mean(axis=1),
            questions=values.mean(axis=1),
            n=n,
            unit=trials.unit,
        )
    return found


def seed_draws(count: int, samples: int, seed: int, number: int) -> np.ndarray:
    """(samples, max(1, count - 1)) which seeds the method at place `number` is made of in each resample."""
    random = np.random.default_rng([seed, 1 + number])
    return random.integers(0, count, size=(samples, max(1, count - 1)))


# differences and intervals


@dataclass(frozen=True)
class _Gap:
    first: str
    second: str
    value: float
    spread: float  # standard error
    freedom: float
    p: float
    exact: Callable[[float], tuple[float, float]] | None  # the interval at a level, where resampling has no spread

    def interval(self, level: float) -> tuple[float, float]:
        if self.exact:
            return self.exact(level)
        reach = student_quantile(level, self.freedom) * self.spread
        return self.value - reach, self.value + reach


def _gap(drawn: Mapping[str, _Drawn], first: str, second: str) -> _Gap:
    one, other = drawn[first], drawn[second]
    value = one.value - other.value
    parts = [one.seed_part, other.seed_part]
    spread, freedom = standard_error(one.both - other.both, one.questions - other.questions, parts, one.n)
    if spread < 1e-9:  # every question differs alike, in every seed
        return _alike_gap(first, second, value, one)
    return _Gap(first, second, value, spread, freedom, student_tail(abs(value) / spread, freedom), None)


def _alike_gap(first: str, second: str, value: float, one: _Drawn) -> _Gap:
    """Resampling can only repeat itself: the exact bound for a share not seen, and the sign test's p-value."""
    same = abs(value) < 1e-9
    unit = one.unit

    def exact(level: float) -> tuple[float, float]:
        return alike_interval(value, one.n, -unit, unit, level) if unit else (value, value)

    return _Gap(first, second, value, 0.0, math.inf, 1.0 if same else 2.0 ** (1 - one.n), exact)


def _pairs(gaps: Sequence[_Gap], higher_is_better: bool) -> list[Pair]:
    """Holm over these gaps."""
    adjusted, levels = holm([gap.p for gap in gaps])
    pairs = []
    for gap, p, level in zip(gaps, adjusted, levels, strict=True):
        low, high = gap.interval(level)
        shown = p <= ALPHA and not low <= 0 <= high
        better = gap.first if (gap.value > 0) == higher_is_better else gap.second
        pairs.append(Pair(gap.first, gap.second, gap.value, low, high, level, p, better if shown else None))
    return pairs


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> tuple[list[float], list[float]]:
    """Holm's adjusted p-values, and the level (alpha over the number of pairs still in question) each was tested at.

    Those from the first that is not rejected on keep its level, so an interval at a pair's level excludes zero exactly
    where the pair is rejected.
    """
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, levels = [0.0] * len(order), [0.0] * len(order)
    highest, level, open_ = 0.0, alpha, True
    for rank, at in enumerate(order):
        left = len(order) - rank
        highest = max(highest, min(1.0, left * p_values[at]))
        if open_:
            level = alpha / left
            open_ = p_values[at] <= level
        adjusted[at], levels[at] = highest, level
    return adjusted, levels


def _estimate(drawn: _Drawn) -> Score:
    """A method's own value with its 95 % interval, inside the measure's range."""
    spread, freedom = standard_error(drawn.both, drawn.questions, [drawn.seed_part], drawn.n)
    if spread < 1e-9:
        unit = drawn.unit
        low, high = alike_interval(drawn.value, drawn.n, 0.0, unit) if unit else (drawn.value, drawn.value)
        return Score(drawn.value, drawn.n, low, high)
    reach = student_quantile(ALPHA, freedom) * spread
    top = drawn.unit if drawn.unit is not None else math.inf
    return Score(drawn.value, drawn.n, max(0.0, drawn.value - reach), min(top, drawn.value + reach))


def standard_error(
    both: np.ndarray, questions: np.ndarray, seed_parts: Sequence[tuple[float, int]], n: int
) -> tuple[float, float]:
    """The root of Q + max(0, S - I), with its degrees of freedom; the arrays are resamples, see above."""
    by_question = float(np.var(questions, ddof=1))
    by_seed = sum(variance for variance, _ in seed_parts)
    by_answer = max(0.0, float(np.var(both, ddof=1)) - by_question - by_seed)
    freedom = satterthwaite([(by_question, n - 1), *seed_parts])
    return math.sqrt(by_question + max(0.0, by_seed - by_answer)), freedom


def satterthwaite(parts: Sequence[tuple[float, int]]) -> float:
    """Degrees of freedom of a sum of variances, each with its own (variance, degrees of freedom)."""
    known = [(variance, freedom) for variance, freedom in parts if variance > 0 and freedom > 0]
    below = sum(variance**2 / freedom for variance, freedom in known)
    return sum(variance for variance, _ in known) ** 2 / below if below else math.inf


def student_tail(t: float, freedom: float) -> float:
    """P(|T| > t) for Student's t, by integration: with T = sqrt(freedom) tan(a), a has density cos(a)^(freedom - 1)."""
    freedom = min(freedom, 1e5)
    start = math.atan(t / math.sqrt(freedom))
    reach = min(math.pi / 2, 40 / math.sqrt(freedom))  # beyond, the density is below 1e-300

    def area(low: float) -> float:  # by the trapezoidal rule
        density = np.cos(np.linspace(low, max(low, reach), 4_001)) ** (freedom - 1)
        return float(density.sum() - (density[0] + density[-1]) / 2) * max(0.0, reach - low)

    return area(start) / area(0.0)


def student_quantile(level: float, freedom: float) -> float:
    """The t that |T| exceeds with probability `level`, by bisection."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > level:
        high *= 2
    for _ in range(45):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > level else (low, middle)
    return (low + high) / 2
