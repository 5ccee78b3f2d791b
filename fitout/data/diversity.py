"""How varied the instructions are: phrasings, n-grams, verbs with their objects, clusters of topics.

Measures on a sample of the training prompts: distinct n-grams (Li et al. 2016), self-BLEU (Zhu et al. 2018), the
entropy of clusters. All of them go by words, or by characters of Chinese, Japanese and Korean.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from .content import phrasing
from .scripts import CJK, mostly_cjk

SAMPLED = 4_000  # prompts that are looked at
SELF_BLEU = 400  # of them, each against all the others
TOKENS = 120  # of a prompt that count
WORD = re.compile(CJK.pattern + r"|[^\W_]+(?:['’][^\W_]+)?")
SENTENCE_END = re.compile(r"[.!?:;\n。！？]")

#: Verbs that instructions begin with, in English; a first word that is none of them is not taken for a verb.
VERBS = frozenset(
    """add analyze analyse answer argue arrange ask assess assign brainstorm build calculate categorize change check
    choose cite clarify classify collect combine come comment compare compile complete compose compute condense
    conduct construct continue convert convince correct count create critique debug decide deduce define delete
    demonstrate derive describe design detect determine develop devise differentiate discuss display divide draft
    draw edit elaborate eliminate estimate evaluate examine execute expand explain explore express extend extract
    fetch fill find fix format formulate generate get give group guess help highlight identify illustrate implement
    improve include infer insert interpret introduce invent join judge list locate look make match measure merge
    modify move multiply name navigate offer optimize order organize outline output paraphrase parse perform pick
    plan point predict prepare present print process produce propose prove provide put query rank rate read
    rearrange recommend record rectify reduce refactor remove rename reorder reorganize repeat replace reply report
    represent research respond retrieve return reverse review revise rewrite rephrase rate round say search select
    send set share shorten show simplify simulate solve sort specify split state study subtract suggest sum
    summarize summarise take tell think touch train transcribe transform translate try turn update use verify
    visualize walk write""".split()  # noqa: SIM905 - a list to be read
)
SKIPPED = frozenset(
    """a an the this that these those my your his her its our their some any all each every both following given below
    above next new short long brief good simple random one two three four five me us him them of more most least
    several few many possible different appropriate best single complete creative concise detailed""".split()  # noqa: SIM905 - a list to be read
)
STOPS = frozenset(
    """in on at to for with from about into by as and or but that which who whose when where if so than using based
    between within without over under is are was were be been has have had do does did can could should would will
    it you i we they he she there here how what why""".split()  # noqa: SIM905 - a list to be read
)
ASKED = re.compile(
    r"^(?:please|kindly|can you|could you|would you|will you|i (?:want|need|would like) you to|help me|your task is to|"
    r"you (?:have|need|are asked|will be asked) to)[,\s]+(?:please\s+)?",
    re.I,
)


def measure(prompts: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """Everything the report says of diversity."""
    tokens = [words(prompt) for prompt in prompts]
    pairs = Counter(pair for prompt in prompts if (pair := verb_and_object(prompt)))
    clusters = cluster([terms(text) for text in tokens], seed)
    return {
        "looked_at": len(prompts),
        "distinct": {str(n): distinct(tokens, n) for n in (1, 2, 3)},
        "self_bleu": self_bleu(tokens, seed),
        "phrasings": phrasings(prompts),
        "verbs": verb_table(pairs),
        "verb_pairs": {"different": len(pairs), "found": pairs.total()},
        **clusters,
    }


def words(text: str) -> list[str]:
    """The first TOKENS words of a text in small letters; each Chinese, Japanese or Korean character is one."""
    return WORD.findall(text.casefold()[: TOKENS * 12])[:TOKENS]


def terms(tokens: Sequence[str]) -> list[str]:
    """What topics are told apart by: words, and pairs of neighbouring Chinese, Japanese and Korean characters."""
    found = [token for token in tokens if not CJK.match(token)]
    return found + [a + b for a, b in zip(tokens, tokens[1:], strict=False) if CJK.match(a) and CJK.match(b)]


def distinct(tokens: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams / all n-grams."""
    grams: Counter[tuple[str, ...]] = Counter()
    for text in tokens:
        grams.update(zip(*(text[at:] for at in range(n)), strict=False))
    return round(len(grams) / grams.total(), 4) if grams else 0.0


def self_bleu(tokens: Sequence[Sequence[str]], seed: int = 0, order: int = 4) -> float | None:
    """Mean BLEU (0 to 1, up to `order`-grams, smoothed by adding one above unigrams) of each of SELF_BLEU prompts
    against all the others of them: 1 where all say the same. None for fewer than two."""
    chosen = [list(text) for text in tokens if text][:SELF_BLEU]
    if len(chosen) < 2:
        return None
    counts = [
        [Counter(zip(*(text[at:] for at in range(n)), strict=False)) for n in range(1, order + 1)] for text in chosen
    ]
    lengths = np.array([len(text) for text in chosen])
    best: list[dict[Any, tuple[int, int, int]]] = [{} for _ in range(order)]  # of each n-gram: most, whose, next most
    for owner, by_order in enumerate(counts):
        for n, grams in enumerate(by_order):
            for gram, count in grams.items():
                most, whose, then = best[n].get(gram, (0, -1, 0))
                best[n][gram] = (count, owner, most) if count > most else (most, whose, max(then, count))
    scores = []
    for owner, by_order in enumerate(counts):
        logs = 0.0
        for n, grams in enumerate(by_order):
            matched = 0
            for gram, count in grams.items():
                most, whose, then = best[n][gram]
                matched += min(count, then if whose == owner else most)
            total = grams.total()
            smooth = 1 if n else 0
            logs += math.log(max(matched + smooth, 1e-9) / max(total + smooth, 1)) / order
        others = np.delete(lengths, owner)
        nearest = others[np.argmin(np.abs(others - lengths[owner]))]
        brevity = min(0.0, 1 - nearest / lengths[owner])
        scores.append(math.exp(logs + brevity))
    return round(float(np.mean(scores)), 4)


def phrasings(prompts: Sequence[str], shown: int = 8) -> list[dict[str, Any]]:
    """How prompts begin: the commonest openings of one to four words, each with its share; of openings that nearly
    always go on in the same way only the longest is told."""
    total = max(1, len(prompts))
    counts = [Counter(phrasing(prompt, n) for prompt in prompts) for n in range(1, 5)]
    found: list[dict[str, Any]] = []
    for n, openings in enumerate(counts, 1):
        longer = counts[n] if n < 4 else Counter()
        for opening, count in openings.most_common(shown):
            if count < max(2, 0.01 * total) or not opening:
                continue
            if any(more.startswith(opening) and again > 0.9 * count for more, again in longer.most_common(3 * shown)):
                continue
            found.append({"begins": opening, "prompts": count, "share": round(count / total, 4)})
    found.sort(key=lambda one: (-one["prompts"], one["begins"]))
    return found[:shown]


def verb_and_object(prompt: str) -> tuple[str, str] | None:
    """The verb that an English instruction begins with and what it is done to (`write`, `story`), as Wang et al. 2023
    show them. Without a parser: a known verb at the start of a sentence, and the last noun-like word before what cannot
    be part of the same phrase. None where there is none."""
    for sentence in SENTENCE_END.split(prompt[:600])[:3]:
        text = ASKED.sub("", sentence.strip())
        said = re.findall(r"[A-Za-z][A-Za-z'-]*|,", text)
        if not said or said[0].lower() not in VERBS or mostly_cjk(text):
            continue
        noun = ""
        for word in (word.lower() for word in said[1:9]):
            if word == "," or word in STOPS:
                if noun:
                    break
                continue
            if word not in SKIPPED:
                noun = word
        return said[0].lower(), noun or "-"
    return None


def verb_table(pairs: Counter[tuple[str, str]], verbs: int = 12, objects: int = 4) -> list[dict[str, Any]]:
    """The commonest verbs, each with its commonest objects."""
    totals: Counter[str] = Counter()
    for (verb, _), count in pairs.items():
        totals[verb] += count
    return [
        {
            "verb": verb,
            "prompts": count,
            "objects": [[noun, n] for (one, noun), n in pairs.most_common() if one == verb and noun != "-"][:objects],
        }
        for verb, count in totals.most_common(verbs)
    ]


def cluster(tokens: Sequence[Sequence[str]], seed: int, width: int = 1 << 12) -> dict[str, Any]:
    """Topics: k-means over TF-IDF of the words, and how evenly they are filled: entropy / log(k), 1 where all clusters
    are equally large. Each with the words that set it apart."""
    count = len(tokens)
    k = int(min(24, max(2, math.sqrt(count / 8))))
    if count < 24:
        return {"clusters": [], "entropy": None}
    seen: Counter[str] = Counter(word for text in tokens for word in set(text))
    vocabulary = {
        word: at
        for at, (word, times) in enumerate(
            one for one in seen.most_common() if 2 <= one[1] <= 0.5 * count and one[0] not in STOPS | SKIPPED
        )
        if at < width
    }
    if len(vocabulary) < k:
        return {"clusters": [], "entropy": None}
    matrix = np.zeros((count, len(vocabulary)), np.float32)
    for row, text in enumerate(tokens):
        for word, times in Counter(text).items():
            if word in vocabulary:
                matrix[row, vocabulary[word]] = (1 + math.log(times)) * math.log(count / seen[word])
    norms = np.linalg.norm(matrix, axis=1, keepdims=True)
    matrix /= np.maximum(norms, 1e-9)
    draw = np.random.default_rng(seed)
    centres = matrix[draw.choice(count, k, replace=False)]
    of = np.zeros(count, np.int64)
    for _ in range(12):
        of = np.argmax(matrix @ centres.T, axis=1)
        for at in range(k):
            mine = matrix[of == at]
            if len(mine):
                mean = mine.mean(axis=0)
                centres[at] = mean / max(float(np.linalg.norm(mean)), 1e-9)
    sizes = np.bincount(of, minlength=k)
    shares = sizes[sizes > 0] / count
    names = list(vocabulary)
    found = [
        {
            "size": int(sizes[at]),
            "words": [names[word] for word in np.argsort(-centres[at])[:5] if centres[at][word] > 0],
        }
        for at in np.argsort(-sizes)
        if sizes[at]
    ]
    return {"clusters": found, "entropy": round(float(-(shares * np.log(shares)).sum() / math.log(k)), 4)}
