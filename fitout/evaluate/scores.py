"""Scores of answers against references, each with n, a 95 % interval, and a paired comparison of base and tuned.

Every score is on a scale of 0 to 100 and is a function of *sums of per-row statistics*: a mean is (sum of row scores)
/ (rows), corpus BLEU comes from summed n-gram counts, macro-F1 from summed label counts. So one bootstrap serves all:
resample rows, sum, compute. Base and tuned are resampled with the same rows, which makes their difference a paired one.

What counts as what:

- *Exact match*: equal after Unicode NFC, stripping, and collapsing runs of white space to one blank. Case and
  punctuation count.
- *F1*: token overlap as in SQuAD (Rajpurkar et al. 2016): lower case, no punctuation, no English articles. Chinese
  and Japanese by character (or by jieba word). Where nothing is left of the reference or the answer, exact match
  decides.
- *ROUGE-1/2/L* (Lin 2004): F-measure by the `rouge-score` package, no stemming. Tokens are that package's own for
  text in ASCII letters; it would throw every other letter away, so other scripts are cut into Unicode words, Chinese
  and Japanese into characters.
- *BLEU* (Papineni et al. 2002): corpus BLEU by sacreBLEU, with its signature; `tok:13a`, or `tok:zh` for Chinese and
  `tok:char` for Japanese references, each set of rows apart when they are mixed.
- *Accuracy*: exact match of a label; *macro-F1*: mean of the labels' F1, over labels that occur among the references.
- An empty answer scores zero in everything. It is counted, never skipped.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import numpy as np

Words = Literal["auto", "jieba"]

# ---------------------------------------------------------------------------------------------------------------------
# Text


def normalise(text: str) -> str:
    """The form in which two answers are compared for equality: NFC, stripped, white space collapsed."""
    return " ".join(unicodedata.normalize("NFC", text).split())


# Han (with extensions and compatibility forms) and kana: scripts written without blanks, scored by character.
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_CJK = re.compile(f"[{_HAN}{_KANA}]")
_CJK_RUN = re.compile(f"([{_HAN}{_KANA}]+)")
_ONLY_KANA = re.compile(f"[{_KANA}]")


def bleu_tokenizer(reference: str, prompt: str = "") -> str:
    """The sacreBLEU tokenizer for a reference: `zh`, `char` (Japanese) or `13a`.

    A reference counts as Chinese or Japanese when at least a third of its letters are; one without letters ("42", "+")
    is written like its prompt.
    """
    for text in (reference, prompt):
        letters = sum(map(str.isalpha, text))
        cjk = len(_CJK.findall(text))
        if letters:
            if 3 * cjk < letters:
                return "13a"
            return "char" if _ONLY_KANA.search(text) else "zh"
    return "13a"


@cache
def _jieba() -> Callable[[str], list[str]]:
    """jieba's word cutter, built in a private folder: its default cache is a file anyone may write to."""
    import logging
    import tempfile

    import jieba

    jieba.setLogLevel(logging.WARNING)
    cutter = jieba.Tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        cutter.tmp_dir = folder
        cutter.initialize()
    return cutter.lcut


def _cut_cjk(text: str, words: Words) -> list[str]:
    """Cuts a blank-free piece: Chinese and Japanese runs into characters (or jieba words), the rest stays whole."""
    pieces: list[str] = []
    for run in _CJK_RUN.split(text):
        if _CJK.match(run):
            pieces += list(run) if words == "auto" else _jieba()(run)
        elif run:
            pieces.append(run)
    return pieces


_ASCII_WORD = re.compile(r"[a-z0-9]+")


class Tokenizer:
    """Tokens for ROUGE, in the form `rouge_score` takes; equal to its default tokenizer on text in ASCII letters."""

    def __init__(self, words: Words = "auto"):
        self.words = words

    def tokenize(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFC", text).lower()
        if text.isascii():
            return _ASCII_WORD.findall(text)
        # Marks (vowel signs of Devanagari, say) belong to the word they stand in.
        spaced = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text)
        return [token for piece in spaced.split() for token in _cut_cjk(piece, self.words)]


def has_other_letters(text: str) -> bool:
    """Whether `rouge_score`'s own tokenizer would lose letters of this text."""
    return not text.isascii() and any(c.isalnum() and not c.isascii() for c in text)


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


def f1_tokens(text: str, words: Words = "auto") -> list[str]:
    """SQuAD's normalisation (lower case, punctuation and articles out), Unicode punctuation included."""
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(c for c in text if c not in _PUNCTUATION and (c.isascii() or unicodedata.category(c)[0] != "P"))
    return [token for piece in _ARTICLES.sub(" ", text).split() for token in _cut_cjk(piece, words)]


# ---------------------------------------------------------------------------------------------------------------------
# One row


def exact_match(answer: str, reference: str) -> float:
    """1.0 where answer and reference are equal after `normalise`, and not empty."""
    answer = normalise(answer)
    return float(bool(answer) and answer == normalise(reference))


def token_f1(answer: str, reference: str, words: Words = "auto") -> float:
    """Harmonic mean of token precision and recall (SQuAD), 0 to 1."""
    found, wanted = f1_tokens(answer, words), f1_tokens(reference, words)
    if not found or not wanted:
        return exact_match(answer, reference)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def rouge_rows(answers: Sequence[str], references: Sequence[str], words: Words = "auto") -> dict[str, list[float]]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L for each row, 0 to 1, by `rouge_score`."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, tokenizer=Tokenizer(words))
    rows: dict[str, list[float]] = {name: [] for name in names}
    for answer, reference in zip(answers, references, strict=True):
        for name, score in scorer.score(target=reference, prediction=answer).items():
            rows[name].append(float(score.fmeasure))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Scores with intervals


FEW = 5  # rows, below which resampling them says nothing of others


@dataclass(frozen=True)
class Score:
    """A value over n rows, and its 95 % interval [low, high]."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on the same rows. `difference` is tuned minus base, paired by row.

    `interval` says where the intervals come from: `bootstrap` (percentile); `exact` where all rows score alike, so that
    resampling them could only repeat itself (see `alike_interval`); or that there are too few rows to resample.
    """

    name: str
    base: Score
    tuned: Score
    difference: Score
    interval: str
    signature: str
    higher_is_better: bool = True

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `no difference shown` where the interval of the difference holds zero."""
        if self.difference.low <= 0 <= self.difference.high:
            return "no difference shown"
        return "better" if (self.difference.value > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Measure:
    """Per-row statistics of one score for base and tuned, and how sums of them become the value.

    rows       (n,) int64   which rows of the evaluation these are
    base       (n, k) float64, `tuned` likewise
    value      sums (..., k) -> values (...)
    unit       the largest value a row can reach when the value is the mean of row scores from 0 on; None for other
               values
    top        the largest value there is, None where there is none
    """

    name: str
    rows: np.ndarray
    base: np.ndarray
    tuned: np.ndarray
    value: Callable[[np.ndarray], np.ndarray]
    signature: str
    unit: float | None = None
    higher_is_better: bool = True
    top: float | None = None

    def only(self, wanted: Iterable[int]) -> Measure:
        """The same measure on some of the rows."""
        keep = np.isin(self.rows, np.fromiter(wanted, dtype=np.int64))
        return replace(self, rows=self.rows[keep], base=self.base[keep], tuned=self.tuned[keep])


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def mean_measure(
    name: str, base: Sequence[float], tuned: Sequence[float], signature: str, *, rows: Sequence[int] | None = None
) -> Measure:
    """A measure whose value is the mean of row scores from 0 to 1, told in points (0 to 100); of all rows, or these."""

    def statistics(scores: Sequence[float]) -> np.ndarray:
        return np.stack([100.0 * np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)

    of = np.arange(len(base), dtype=np.int64) if rows is None else np.asarray(rows, np.int64)
    return Measure(name, of, statistics(base), statistics(tuned), ratio, signature, unit=100.0, top=100.0)


def preferences(base: Sequence[float | None], tuned: Sequence[float | None]) -> list[Measure]:
    """Whether each row's chosen answer is the likelier one, of the rows where both say it (not None); [] where none
    does. Rows may say it in points."""
    known = [at for at, both in enumerate(zip(base, tuned, strict=True)) if None not in both]
    if not known:
        return []
    before, after = ([float(bool(one[at])) for at in known] for one in (base, tuned))
    return [mean_measure("preference", before, after, "mean log-probability of a token", rows=known)]


def resampled_sums(statistics: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Sums (samples, k) of n rows drawn with replacement from statistics (n, k): the bootstrap (Efron 1979)."""
    n, width = statistics.shape
    random = np.random.default_rng(seed)
    sums = np.empty((samples, width))
    block = max(1, 4_000_000 // n)  # bounds memory: 32 MB of weights at a time
    for start in range(0, samples, block):
        draws = random.integers(0, n, size=(min(block, samples - start), n))
        weights = np.stack([np.bincount(draw, minlength=n) for draw in draws]).astype(np.float64)
        sums[start : start + len(draws)] = weights @ statistics
    return sums


def alike_interval(value: float, n: int, low: float, high: float, level: float = 0.05) -> tuple[float, float]:
    """An interval for a mean when all n rows scored the same `value`, out of a possible low to high.

    The share of the population that scores otherwise is at most h = 1 - (level / 2)^(1/n) (Clopper and Pearson 1934,
    for 0 of n); the mean is farthest off when that share scores `low` or `high`.
    """
    other = 1.0 - (level / 2) ** (1.0 / n)
    return value * (1 - other) + low * other, value * (1 - other) + high * other


def compare(measure: Measure, samples: int = 1000, seed: int = 0) -> Comparison:
    """Values, 95 % intervals and the paired difference of one measure; it must have at least one row."""
    n, width = measure.base.shape
    both = np.concatenate([measure.base, measure.tuned], axis=1)
    total, drawn = both.sum(axis=0), resampled_sums(both, samples, seed)

    def values(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        base, tuned = measure.value(sums[..., :width]), measure.value(sums[..., width:])
        return base, tuned, tuned - base

    row_values = values(both) if measure.unit is not None else None
    scores, interval = [], "bootstrap"
    for which, (value, resamples) in enumerate(zip(values(total), values(drawn), strict=True)):
        low, high = (float(edge) for edge in np.percentile(resamples, [2.5, 97.5]))
        floor = -(measure.top or 0.0) if which == 2 else 0.0
        if row_values is not None and measure.top is not None and np.ptp(row_values[which]) == 0:
            low, high = alike_interval(float(value), n, floor, measure.top)
            interval = "exact where all rows score alike, else bootstrap"
        elif row_values is None and (n < FEW or np.ptp(resamples) == 0):
            # Of a value that is no mean of rows (BLEU, macro-F1, perplexity) they say nothing of the rows not seen.
            if measure.top is not None:
                low, high = alike_interval(float(value), n, floor, measure.top)
            elif which == 2:
                low, high = min(low, 0.0), max(high, 0.0)
            interval = "too few or too equal rows to resample"
        scores.append(Score(float(value), n, low, high))
    base, tuned, difference = scores
    return Comparison(measure.name, base, tuned, difference, interval, measure.signature, measure.higher_is_better)


# ---------------------------------------------------------------------------------------------------------------------
# The measures of an evaluation


def bleu_value(sums: np.ndarray) -> np.ndarray:
    """Corpus BLEU (0 to 100) from sums (..., 10): answer length, reference length, 4 counts of matches, 4 of n-grams.

    sacreBLEU's formula with its default smoothing `exp` (each order without a match halves again), for many resamples
    at once.
    """
    sums = np.asarray(sums, dtype=np.float64)
    length, wanted, correct, total = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:10]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        halvings = np.cumsum((correct == 0) & (total > 0), axis=-1)
        precision = np.where(correct > 0, correct / total, 0.5**halvings / total)
        brevity = np.where(length < wanted, np.exp(1 - wanted / length), 1.0)
        score = 100.0 * brevity * np.exp(np.log(precision).mean(axis=-1))
    # No match at all, or answers too short for any 4-gram: zero, as in sacreBLEU.
    return np.where((correct.sum(axis=-1) > 0) & (total > 0).all(axis=-1), score, 0.0)


def bleu_statistics(answers: Sequence[str], references: Sequence[str], tokenizer: str) -> tuple[np.ndarray, str]:
    """sacreBLEU's sufficient statistics for each row, (n, 10), and its signature."""
    from sacrebleu.metrics import BLEU

    metric = BLEU(tokenize=tokenizer, force=True)
    rows = []
    for answer, reference in zip(answers, references, strict=True):
        score = metric.corpus_score([answer], [[reference]])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.asarray(rows, dtype=np.float64).reshape(-1, 10), str(metric.get_signature())


def _bleu_measures(
    base: Sequence[str], tuned: Sequence[str], references: Sequence[str], prompts: Sequence[str]
) -> list[Measure]:
    tokenizers = [bleu_tokenizer(*texts) for texts in zip(references, prompts, strict=True)]
    measures = []
    for tokenizer in sorted(set(tokenizers)):
        rows = [row for row, name in enumerate(tokenizers) if name == tokenizer]
        wanted = [references[row] for row in rows]
        base_rows, signature = bleu_statistics([base[row] for row in rows], wanted, tokenizer)
        tuned_rows, _ = bleu_statistics([tuned[row] for row in rows], wanted, tokenizer)
        name = "bleu" if len(set(tokenizers)) == 1 else f"bleu:{tokenizer}"
        measures.append(
            Measure(name, np.asarray(rows, dtype=np.int64), base_rows, tuned_rows, bleu_value, signature, top=100.0)
        )
    return measures


def macro_f1_value(sums: np.ndarray) -> np.ndarray:
    """Macro-F1 (0 to 100) from sums (..., 3 L): right, given and wanted counts of each of L labels."""
    right, given, wanted = np.split(np.asarray(sums, dtype=np.float64), 3, axis=-1)
    present = wanted > 0
    f1 = np.where(present, 2 * right / np.maximum(given + wanted, 1), 0.0)
    return 100.0 * f1.sum(axis=-1) / np.maximum(present.sum(axis=-1), 1)


def macro_f1_statistics(answers: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """One-hot rows (n, 3 L): right, given, wanted, over the L labels that occur among the references.

    An answer that is none of these labels is wrong for its reference and a false positive for nobody.
    """
    labels = {label: column for column, label in enumerate(dict.fromkeys(map(normalise, references)))}
    rows = np.zeros((len(references), 3, len(labels)))
    for row, (answer, reference) in enumerate(zip(map(normalise, answers), map(normalise, references), strict=True)):
        rows[row, 2, labels[reference]] = 1
        if answer in labels:
            rows[row, 1, labels[answer]] = 1
            rows[row, 0, labels[answer]] = float(answer == reference)
    return rows.reshape(len(references), -1)


def measures(
    names: Sequence[str],
    references: Sequence[str],
    base: Sequence[str],
    tuned: Sequence[str],
    *,
    prompts: Sequence[str],
    words: Words = "auto",
    one_label_set: bool = True,
) -> list[Measure]:
    """Everything asked for in `names` (the recipe's `evaluate.metrics`), for all rows.

    `prompts` help to tell the script of references without letters; `one_label_set` is false when each row has
    choices of its own, where a macro-F1 over labels means nothing.
    """
    found: list[Measure] = []
    if not references:
        return found
    for name in names:
        if name == "exact_match":
            found.append(_each_row(name, exact_match, base, tuned, references, EXACT))
        elif name == "accuracy":
            found.append(_each_row(name, exact_match, base, tuned, references, EXACT))
            if one_label_set:
                found.append(_macro_f1(base, tuned, references))
        elif name == "f1":
            signature = f"SQuAD|cjk:{_cjk_name(words)}"
            found.append(_each_row(name, partial(token_f1, words=words), base, tuned, references, signature))
        elif name == "rouge":
            found += _rouge_measures(base, tuned, references, words)
        elif name == "bleu":
            found += _bleu_measures(base, tuned, references, prompts)
    return found


EXACT = "NFC|white space collapsed|case:mixed"


def _each_row(
    name: str,
    score: Callable[[str, str], float],
    base: Sequence[str],
    tuned: Sequence[str],
    references: Sequence[str],
    signature: str,
) -> Measure:
    """The mean of a score that looks at one answer and its reference."""
    base_rows = [score(*pair) for pair in zip(base, references, strict=True)]
    tuned_rows = [score(*pair) for pair in zip(tuned, references, strict=True)]
    return mean_measure(name, base_rows, tuned_rows, signature)


def _macro_f1(base: Sequence[str], tuned: Sequence[str], references: Sequence[str]) -> Measure:
    base_rows, tuned_rows = (macro_f1_statistics(answers, references) for answers in (base, tuned))
    signature = f"labels:{len(set(map(normalise, references)))}"
    return Measure("macro_f1", np.arange(len(references)), base_rows, tuned_rows, macro_f1_value, signature, top=100.0)


def _rouge_measures(
    base: Sequence[str], tuned: Sequence[str], references: Sequence[str], words: Words
) -> list[Measure]:
    from importlib.metadata import version

    other = any(has_other_letters(text) for texts in (base, tuned, references) for text in texts)
    tokens = f"tok:unicode words, cjk {_cjk_name(words)}" if other else "tok:default"
    base_rows, tuned_rows = (rouge_rows(answers, references, words) for answers in (base, tuned))
    signature = f"rouge-score:{version('rouge-score')}|f-measure|stem:no|{tokens}"
    return [mean_measure(name, base_rows[name], tuned_rows[name], signature) for name in base_rows]


def _cjk_name(words: Words) -> str:
    return "by character" if words == "auto" else "by jieba word"


def row_scores(found: Sequence[Measure], rows: int) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Each row's own scores (0 to 100) for base and tuned. BLEU and macro-F1 belong to a corpus and have none."""
    base: list[dict[str, float]] = [{} for _ in range(rows)]
    tuned: list[dict[str, float]] = [{} for _ in range(rows)]
    for measure in found:
        if measure.unit is None:
            continue
        for into, statistics in ((base, measure.base), (tuned, measure.tuned)):
            for row, value in zip(measure.rows.tolist(), measure.value(statistics).tolist(), strict=True):
                into[row][measure.name] = round(value, 4)
    return base, tuned
