"""Retention: does the tuned model still know what it was not trained on?

Two forms, both asked of base and tuned alike and paired:

- *Probes* are plain texts to continue ("The capital of Japan is" -> "Tokyo"), in groups. A probe is right when the
  greedy completion begins with the answer (`begins_with`).
- *Perplexity* on a given text: exp of the mean negative log-probability over all its tokens, not over pieces.

"Forgotten" are the probes that the base had right and the tuned model has wrong; "gained" the other way round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckError, DataError
from .scores import Comparison, Measure, compare, mean_measure, normalise, ratio

# A text is scored in pieces of at most so many characters, the units of the bootstrap; each is read in windows of so
# many tokens.
PIECE_CHARACTERS = 1000
WINDOW_TOKENS = 512


@dataclass(frozen=True)
class Probe:
    """A text to continue, the answer its continuation should begin with, and the group it is counted in."""

    prompt: str
    answer: str
    group: str = "probes"


@dataclass(frozen=True)
class Retention:
    """What is asked: probes or pieces of a text, and where they come from."""

    source: str
    probes: tuple[Probe, ...] = ()
    pieces: tuple[str, ...] = ()


def load(setting: str, default: Sequence[Probe | Mapping[str, Any]] | None = None) -> Retention | None:
    """What `evaluate.retention` asks for; None when it is off, or `default` and the base model brings no probes."""
    if setting == "off" or (setting == "default" and not default):
        return None
    if setting == "default":
        probes = tuple(_probe(row, "default probes", number) for number, row in enumerate(default or (), 1))
        return Retention("the base model's own probes", probes=probes)
    path = Path(setting)
    text = _read(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return Retention(str(path), probes=_probes(text, path))
    return Retention(str(path), pieces=tuple(cut(text)))


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else f"not UTF-8 (byte {error.start})"
        raise DataError(
            f"cannot read the retention file: {cause}",
            where=str(path),
            harm="What the tuned model forgets would go unmeasured.",
            hint="Set evaluate.retention to a .jsonl file of probes, a UTF-8 text file, `default` or `off`.",
        ) from error
    if not text.strip():
        raise DataError(
            "the retention file is empty", where=str(path), hint="Give it some text, or set evaluate.retention to off."
        )
    return text


def _probes(text: str, path: Path) -> tuple[Probe, ...]:
    probes = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _bad_probe(f"not JSON ({error.msg})", f"{path}:{number}") from error
            probes.append(_probe(row, str(path), number))
    return tuple(probes)


def _probe(row: Any, source: str, number: int) -> Probe:
    if isinstance(row, Probe):
        row = asdict(row)
    where = f"{source}:{number}"
    if not isinstance(row, Mapping):
        raise _bad_probe("not an object", where)
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise _bad_probe(f"{key!r} is missing or empty", where)
    return Probe(row["prompt"], row["answer"], str(row.get("group") or "probes"))


def _bad_probe(cause: str, where: str) -> DataError:
    return DataError(
        f"a probe cannot be read: {cause}",
        where=where,
        harm="Leaving it out would make the retention figure another one than asked for.",
        hint='One object a line: {"prompt": "The capital of Japan is", "answer": "Tokyo", "group": "capitals"}.',
    )


def cut(text: str) -> list[str]:
    """Pieces of at most PIECE_CHARACTERS: whole lines while they fit, longer lines cut. Joined, they are the text
    again, but for pieces of blanks alone, which hold nothing to predict."""
    pieces, piece = [], ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > PIECE_CHARACTERS:
            pieces.append(piece)
            piece = ""
        piece += line
        while len(piece) > PIECE_CHARACTERS:
            pieces.append(piece[:PIECE_CHARACTERS])
            piece = piece[PIECE_CHARACTERS:]
    return [piece for piece in [*pieces, piece] if piece.strip()]


def begins_with(completion: str, answer: str) -> bool:
    """Whether a completion begins with the answer, as a whole word or number.

    Both are normalised (NFC, white space collapsed and stripped). "Tokyo, which" begins with "Tokyo"; "Parisian" does
    not begin with "Paris", nor "123" or "12.5" with "12". Chinese and Japanese have no word ends to look at: there a
    plain prefix counts.
    """
    completion, answer = normalise(completion), normalise(answer)
    if not answer or not completion.startswith(answer):
        return False
    last, rest = answer[-1], completion[len(answer) :]
    if not rest or not last.isalnum() or ord(last) >= 0x2E80:
        return True
    if rest[0].isalnum() and ord(rest[0]) < 0x2E80:
        return False
    return not (last.isdigit() and rest[0] in ".," and rest[1:2].isdigit())


def completion_tokens(probes: Sequence[Probe]) -> int:
    """Tokens enough for the longest answer (none is shorter than a byte of UTF-8), and a few to see where it ends."""
    return max(len(probe.answer.encode("utf-8")) for probe in probes) + 4


@dataclass(frozen=True)
class Piece:
    """How a model read one piece of text: summed log-probability, and how many tokens were predicted."""

    log_prob: float
    tokens: int


def piece(log_probs: Sequence[float]) -> Piece:
    total = float(np.sum(np.asarray(log_probs, dtype=np.float64)))
    if not np.isfinite(total):
        raise CheckError(
            "the model gives a log-probability that is not finite",
            harm="A perplexity of it would mean nothing.",
            hint="Its weights may be broken: look at the training loss, and try an earlier checkpoint.",
        )
    return Piece(total, len(log_probs))


@dataclass(frozen=True)
class RetentionResult:
    """Retention before and after: `overall` and `groups` for probes, `perplexity` for a text; the lists are whole.

    rows    one dict a probe (base_right, tuned_right) or piece of text (base and tuned: log_prob, tokens), as in
            retention.jsonl
    """

    source: str
    overall: Comparison | None = None
    groups: dict[str, Comparison] = field(default_factory=dict)
    perplexity: Comparison | None = None
    tokens: int = 0
    forgotten: list[dict[str, str]] = field(default_factory=list)
    gained: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def compare_probes(
    asked: Retention, base: Sequence[str], tuned: Sequence[str], samples: int, seed: int
) -> RetentionResult:
    """Exact match of probes (0 to 100) by group and over all, with what was forgotten and gained."""
    before, after = (
        [begins_with(text, probe.answer) for text, probe in zip(texts, asked.probes, strict=True)]
        for texts in (base, tuned)
    )
    measure = mean_measure("probes", before, after, "completion begins with the answer")
    groups = {
        group: compare(measure.only(at for at, probe in enumerate(asked.probes) if probe.group == group), samples, seed)
        for group in dict.fromkeys(probe.group for probe in asked.probes)
    }

    rows = [
        {"prompt": probe.prompt, "answer": probe.answer, "group": probe.group, "base": first, "tuned": then}
        for probe, first, then in zip(asked.probes, base, tuned, strict=True)
    ]
    return RetentionResult(
        asked.source,
        compare(measure, samples, seed),
        groups,
        forgotten=[row for row, was, now in zip(rows, before, after, strict=True) if was and not now],
        gained=[row for row, was, now in zip(rows, before, after, strict=True) if now and not was],
        rows=[
            {**row, "base_right": was, "tuned_right": now} for row, was, now in zip(rows, before, after, strict=True)
        ],
    )


def perplexity_value(sums: np.ndarray) -> np.ndarray:
    """exp(negative log-probability / tokens), from sums (..., 2) of both."""
    return np.exp(ratio(sums))


def compare_perplexity(
    asked: Retention, base: Sequence[Piece], tuned: Sequence[Piece], samples: int, seed: int
) -> RetentionResult:
    """Token-weighted perplexity, resampled by piece; lower is better."""
    kept = [at for at, pair in enumerate(zip(base, tuned, strict=True)) if all(read.tokens for read in pair)]
    notes = []
    if left := len(base) - len(kept):
        notes.append(
            f"{left} of {len(base)} pieces are a single token, with nothing before it to predict it from; left out."
        )
    tokens = [sum(reads[at].tokens for at in kept) for reads in (base, tuned)]
    if tokens[0] != tokens[1]:
        notes.append(f"The base reads {tokens[0]} tokens, the tuned model {tokens[1]}: not quite comparable.")
    if not kept:
        return RetentionResult(asked.source, notes=notes)
    base_rows, tuned_rows = (
        np.asarray([[-reads[at].log_prob, reads[at].tokens] for at in kept], dtype=np.float64)
        for reads in (base, tuned)
    )
    measure = Measure(
        "perplexity",
        np.asarray(kept, dtype=np.int64),
        base_rows,
        tuned_rows,
        perplexity_value,
        "a token",
        higher_is_better=False,
    )
    return RetentionResult(
        asked.source,
        perplexity=compare(measure, samples, seed),
        tokens=tokens[0],
        notes=notes,
        rows=[{"piece": at, "base": asdict(base[at]), "tuned": asdict(tuned[at])} for at in kept],
    )
