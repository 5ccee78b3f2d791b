"""A tokenizer as GGUF describes it, and the proof that it means the same ids.

GGUF names how text is split before merging (`tokenizer.ggml.pre`); an engine has the rules behind each name built in.
So a name is chosen by trying: each known rule is computed here with the tokenizer's own merges, and only one that gives
the tokenizer's own ids on every text of a wide sample and of the run's data is written.
"""

from __future__ import annotations

import heapq
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..chat.render import SAMPLE
from ..errors import ModelError

if TYPE_CHECKING:
    from ..chat.render import Chat

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # token types of the GGUF specification

_CASED = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"

#: name -> (the patterns, applied one after the other, each to what the last one left; whether a whole word that is in
#: the vocabulary is taken without merging). Where several names mean one rule, the name that most engines know.
RULES: dict[str, tuple[tuple[str, ...], bool]] = {
    "llama-bpe": ((rf"(?:{_CASED})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",), True),
    "smaug-bpe": ((rf"(?:{_CASED})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}",), False),
    "qwen2": ((rf"(?:{_CASED})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}",), False),
    "tekken": (
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ),
        True,
    ),
    "gpt-2": ((_GPT2,), False),
    "refact": ((r"\p{N}", _GPT2), False),
}

#: What people write, in several scripts; every choice must give the tokenizer's ids on all of it.
COMMON = (
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they've said we'll go; it isn't far, she'd know.",
    "In 2024, 1,234,567 people paid 3.14 or 99.9 %.",
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # done\n",
    "one\ntwo\n\nthree\n\n\nfour  five   six\tseven ",
    "世界上最高的山是哪一座？答案：珠穆朗玛峰，8848米。",
    "用Python写2个函数 and mix 中文 with English。",
    "Grüße aus Köln: façade, naïve, Ångström, œuvre",
    "Привет, мир! Как дела?",
    "https://example.com/path?q=a+b&c=%20 user@example.com",
    "(a+b)*c != d || e && !f; x -> y => z",
    "User: What is 2 plus 2?\nAssistant: 4",
    "A",
    "",
    " ",
)
#: Seldom written; a difference here is said, not refused.
RARE = (
    "e\u0301 a\u0308 combining marks",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "こんにちは世界、カタカナ。한국어 텍스트",
    "👍🏽 👩‍👩‍👧 ☃",
    "\u00a0non-breaking\u00a0space\u3000ideographic",
    "TABS\t\tand\r\nCRLF\r\n\r\n",
    "½ ² Ⅷ ٣ 数字１２",
    "IT'S WE'LL DON'T",
)


@dataclass
class Vocabulary:
    """What the tokenizer keys of a GGUF file hold. `notes` says what was chosen, and where it may differ."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False  # SentencePiece: a blank is put before the text
    add_bos: bool = False
    notes: list[str] = field(default_factory=list)


def describe(chat: Chat, rows: int, texts: Iterable[str] = ()) -> Vocabulary:
    """The vocabulary of `chat` for a model with `rows` embedding rows; `texts` are the run's own.

    Raises ModelError when no rule that the engines know gives the tokenizer's ids.
    """
    backend = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise _cannot(f"its tokenizer is of type {model['type']}; GGUF is written for BPE")
    tokens, types = _entries(chat, backend, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if _is_byte_level(backend):
        vocabulary = Vocabulary("gpt2", "", tokens, types, merges=merges)
        vocabulary.pre = _choose(chat, backend, texts, vocabulary.notes)
    else:
        scores = _scores(tokens, types, merges)
        vocabulary = Vocabulary("llama", "default", tokens, types, scores=scores)
        vocabulary.space_prefix = _choose_prefix(chat, vocabulary, texts)
    vocabulary.add_bos = begins_with_bos(chat)
    return vocabulary


def begins_with_bos(chat: Chat) -> bool:
    """Whether a conversation begins with the beginning-of-text token, which engines then write themselves. (A token
    that opens every turn, as ChatML's may be, is part of the template.)"""
    bos = chat.tokenizer.bos_token
    text = chat.prompt_text((*SAMPLE, SAMPLE[0]))
    return bool(bos) and text.startswith(bos) and text.count(bos) == 1


def _entries(chat: Chat, backend: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Each id's text and type; rows that no token names are marked unused."""
    vocab = chat.tokenizer.get_vocab()
    if max(vocab.values()) >= rows:
        raise _cannot(f"its tokenizer has ids up to {max(vocab.values())}, its embedding only {rows} rows")
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    byte_fallback = backend["model"].get("byte_fallback", False)
    unknown = backend["model"].get("unk_token")
    for text, i in vocab.items():
        is_byte = byte_fallback and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        tokens[i], types[i] = text, BYTE if is_byte else NORMAL
    for i, added in chat.tokenizer.added_tokens_decoder.items():
        tokens[i], types[i] = added.content, CONTROL if added.special else USER_DEFINED
    if unknown is not None:
        types[vocab[unknown]] = UNKNOWN
    return tokens, types


# byte-level BPE


def _is_byte_level(backend: dict[str, Any]) -> bool:
    return '"ByteLevel"' in json.dumps(backend["pre_tokenizer"])


def _choose(chat: Chat, backend: dict[str, Any], texts: Iterable[str], notes: list[str]) -> str:
    """The name of a rule under which the vocabulary gives the tokenizer's ids. Of several, the one with the fewest
    differences on seldom text, then the one that cuts most texts into the same words before merging."""
    texts = list(texts)
    best: tuple[tuple[int, int], str, list[str]] | None = None
    closest: tuple[int, str, str] | None = None
    for name in RULES:
        engine = _byte_level(backend, name)
        encode = partial(_ids, engine)
        wrong = _differences(chat, encode, (*COMMON, *texts))
        if wrong:
            if closest is None or len(wrong) < closest[0]:
                closest = (len(wrong), name, wrong[0])
            continue
        rare = _differences(chat, encode, RARE)
        rank = (len(rare), _cut_differently(chat, engine, (*COMMON, *RARE, *texts)))
        if best is None or rank < best[0]:
            best = (rank, name, rare)
    if best is None:
        assert closest is not None
        raise _cannot(
            f"no way of splitting text that llama.cpp knows gives this tokenizer's ids: the nearest, {closest[1]}, "
            f"differs on {closest[0]} of {len(COMMON) + len(texts)} texts (first: {closest[2]!r})"
        )
    notes.append(f"pre-tokenizer {best[1]}: the tokenizer's ids on all {len(COMMON) + len(texts):,} texts tried")
    notes.extend(_rare_note(best[2]))
    if (backend.get("normalizer") or {}).get("type") == "NFC":
        notes.append("the tokenizer composes accents first (NFC), llama.cpp does not: send composed text")
    return best[1]


def _byte_level(backend: dict[str, Any], name: str) -> Any:
    """The tokenizer as an engine computes it under a named rule."""
    from tokenizers import Tokenizer

    patterns, whole_words = RULES[name]
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    changed = {
        **backend,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "model": {**backend["model"], "ignore_merges": whole_words},
    }
    return Tokenizer.from_str(json.dumps(changed))


def _ids(engine: Any, text: str) -> list[int]:
    return engine.encode(text, add_special_tokens=False).ids


def _cut_differently(chat: Chat, engine: Any, texts: Sequence[str]) -> int:
    """How many texts the two cut into different words before merging."""
    own = chat.tokenizer.backend_tokenizer.pre_tokenizer
    cut = engine.pre_tokenizer.pre_tokenize_str
    return sum([word for word, _ in own.pre_tokenize_str(text)] != [word for word, _ in cut(text)] for text in texts)


# SentencePiece BPE, as converted to tokenizer.json


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """A score a token that orders merges as the merge list does: the earlier the higher."""
    rank: dict[str, int] = {}
    for i, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", ""), i)
    return [float(-rank.get(token, len(merges))) if kind == NORMAL else 0.0
            for token, kind in zip(tokens, types, strict=True)]  # fmt: skip


def _choose_prefix(chat: Chat, vocabulary: Vocabulary, texts: Iterable[str]) -> bool:
    """Whether a blank goes before a text, found by trying both."""
    texts = (*COMMON, *texts)
    wrong: list[str] = []
    for prefix in (True, False):
        encode = _sentencepiece(chat, vocabulary, prefix)
        wrong = _differences(chat, encode, texts)
        if not wrong:
            vocabulary.notes.append(f"SentencePiece merges: the tokenizer's ids on all {len(texts):,} texts tried")
            vocabulary.notes.extend(_rare_note(_differences(chat, encode, RARE)))
            return prefix
    raise _cannot(
        f"llama.cpp would split text differently from this tokenizer: {len(wrong)} of {len(texts)} texts "
        f"(first: {wrong[0]!r})"
    )


def _sentencepiece(chat: Chat, vocabulary: Vocabulary, prefix: bool) -> Callable[[str], list[int]]:
    """The tokenizer as llama.cpp computes it: the best-scored pair that is a token is joined until none is."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    types, scores = vocabulary.types, vocabulary.scores
    special = sorted((t.content for t in chat.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    cut = re.compile("(" + "|".join(map(re.escape, special)) + ")") if special else None

    def segment(text: str) -> list[int]:
        symbols = list(text)
        after = [*range(1, len(symbols)), -1]
        before = [-1, *range(len(symbols) - 1)]
        queue: list[tuple[float, int, int, int]] = []

        def offer(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = symbols[left] + symbols[right]
                if joined in ids:
                    heapq.heappush(queue, (-scores[ids[joined]], left, right, len(joined)))

        for i in range(1, len(symbols)):
            offer(i - 1, i)
        while queue:
            _, left, right, size = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != size:
                continue
            symbols[left], symbols[right] = symbols[left] + symbols[right], ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        found = []
        for symbol in filter(None, symbols):
            if symbol in ids:
                found.append(ids[symbol])
            else:
                found += [ids.get(f"<0x{byte:02X}>", _unknown(types)) for byte in symbol.encode("utf-8")]
        return found

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for piece in cut.split(text) if cut else [text]:
            if cut and cut.fullmatch(piece):
                found.append(ids[piece])
            elif piece:
                found += segment((" " * prefix + piece).replace(" ", "\u2581"))
        return found

    return encode


def _unknown(types: list[int]) -> int:
    return types.index(UNKNOWN) if UNKNOWN in types else 0


# checks


def _differences(chat: Chat, encode: Callable[[str], list[int]], texts: Sequence[str]) -> list[str]:
    """The texts that `encode` turns into other ids than the tokenizer does."""
    own = chat.tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [text for text, want in zip(texts, own, strict=True) if encode(text) != want.ids]


def _rare_note(wrong: list[str]) -> list[str]:
    return [f"other ids in llama.cpp for seldom text such as {wrong[0]!r}"] if wrong else []


def _cannot(why: str) -> ModelError:
    return ModelError(
        f"this model cannot be written as GGUF: {why}",
        harm="The engine would read other tokens than the model was trained on.",
        hint="Serve it with fitout serve, transformers or vLLM (fitout export --for vllm).",
    )
