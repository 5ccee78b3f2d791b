"""Findings on rows, for `fitout data check`: reads only, changes nothing, says the worst first."""

from __future__ import annotations

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..chat.types import Conversation, Message, Origin, Pair, Sample, Text
from ..errors import DataError
from . import CleanSettings, SourceSettings
from .clean import Cleaner, control_tokens, only_markers, strip_end_markers
from .content import digest, normalised, texts
from .dedupe import exact
from .formats import Columns, Format, Refused, choose, convert, openai, sharegpt
from .scripts import LETTER, mostly_cjk
from .sources import BadRow, RawRow, list_files, probe, read

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
SHOWN = 5  # origins a finding names

#: Control tokens of the tokenizers in wide use, looked for when no tokenizer is named.
CONTROL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
    *("<bos>", "<eos>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
)

PLACEHOLDER = re.compile(r"\{\{\s*([A-Za-z_][\w .-]{0,40}?)\s*\}\}")


@dataclass(frozen=True)
class Finding:
    """One thing that was noticed: how bad, a stable code, what it means, how many rows, and the first few of them."""

    severity: Severity
    code: str
    message: str
    origins: tuple[Origin, ...] = ()
    count: int = 1


def check_source(source: SourceSettings, base: Path, control: Sequence[str] = CONTROL) -> list[Finding]:
    """The findings on a file, folder or hub id. What cannot be read as a whole is a finding too, never an exception."""
    findings = []
    try:
        skipped = list_files(source, base).skipped
        for reason, count in Counter(reason for _, reason in skipped).items():
            names = ", ".join(name for name, why in skipped if why == reason)
            findings.append(Finding("info", "skipped", f"not read ({reason}): {names[:200]}", (), count))
        rows = list(read(source, base))
        findings += check(rows, format_name(source, base), source.columns, control, source.path)
    except DataError as error:
        findings.append(Finding("error", "file", str(error)))
    return ranked(findings)


def format_name(source: SourceSettings, base: Path) -> str | None:
    """The format preparing would use; None when nothing fits, which `check` then tells."""
    try:
        return choose(probe(source, base), source.format, source.columns).name
    except DataError:
        return source.format


def check(
    rows: Iterable[RawRow | BadRow],
    format: str | None = None,
    columns: Columns | None = None,
    control: Sequence[str] = CONTROL,
    where: str = "",
) -> list[Finding]:
    """The findings on rows as `sources.read` gives them, errors first. `control` are the tokenizer's control tokens."""
    rows = list(rows)
    raw = [row for row in rows if isinstance(row, RawRow)]
    bad = [(row.origin, row.reason) for row in rows if isinstance(row, BadRow)]
    findings = grouped("unreadable", bad)
    samples: list[Sample] = []
    try:
        plug = choose([row.row for row in raw], format, columns, where)
    except DataError as error:
        if raw:
            findings.append(Finding("error", "format", str(error), origins_of(raw), len(raw)))
    else:
        samples, refused = converted(raw, plug, columns)
        findings += grouped("bad-row", refused)
        message = f"{plug.name}: {len(rows)} rows, {len(samples)} samples"
        findings.append(Finding("info", "format", message, (), len(rows)))
        findings += unread_keys(raw, plug)
    if not samples:
        findings.append(Finding("error", "no-samples", "no row can be trained on", (), len(rows)))
        return ranked(findings)
    for examine in (duplicates, conflicts, placeholders, turns, lengths, scripts, columns_left):
        findings += examine(samples)
    findings += spelled(samples, control)
    findings += damaged(samples)
    return ranked(findings)


def ranked(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: (SEVERITIES.index(finding.severity), -finding.count, finding.code))


def converted(
    raw: list[RawRow], plug: Format, columns: Columns | None
) -> tuple[list[Sample], list[tuple[Origin, str]]]:
    samples: list[Sample] = []
    refused = []
    for row in raw:
        for sample in convert(plug, row, columns):
            if isinstance(sample, Refused):
                refused.append((sample.origin, sample.reason))
            else:
                samples.append(sample)
    return samples, refused


# --- errors ------------------------------------------------------------------------------------------------------


def grouped(code: str, refused: list[tuple[Origin, str]]) -> list[Finding]:
    """One finding for each reason; reasons that differ in a number only (turn, column) are one."""
    alike: dict[str, list[tuple[Origin, str]]] = defaultdict(list)
    for origin, reason in refused:
        alike[re.sub(r"\d+", "N", reason)].append((origin, reason))
    return [found("error", code, hits[0][1], [origin for origin, _ in hits]) for hits in alike.values()]


def found(severity: Severity, code: str, message: str, origins: Sequence[Origin]) -> Finding:
    return Finding(severity, code, message, tuple(origins[:SHOWN]), len(origins))


def origins_of(items: Sequence[RawRow] | Sequence[Sample]) -> tuple[Origin, ...]:
    return tuple(item.origin for item in items[:SHOWN])


# --- warnings ----------------------------------------------------------------------------------------------------


def duplicates(samples: list[Sample]) -> list[Finding]:
    _, dropped = exact(samples)
    if not dropped:
        return []
    message = f"the same content as an earlier row (the first: {dropped[0][1]}); dropped when data.deduplicate is on"
    return [found("warning", "duplicate", message, [sample.origin for sample, _ in dropped])]


def conflicts(samples: list[Sample]) -> list[Finding]:
    """The same prompt with different last answers: contradictory labels, or several good answers."""
    answers: dict[bytes, dict[str, list[Origin]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        if isinstance(sample, Conversation):
            asked = [[message.role, normalised(message.content), message.extra] for message in sample.messages[:-1]]
            last = sample.messages[-1]
            said = normalised(last.content) + (str(last.extra["tool_calls"]) if "tool_calls" in last.extra else "")
            answers[digest(asked)][said].append(sample.origin)
    differing = [by_answer for by_answer in answers.values() if len(by_answer) > 1]
    if not differing:
        return []
    message = f"{len(differing)} prompts have several different answers; fine for open questions, an error for labels"
    return [found("warning", "conflict", message, [at for by in differing for hits in by.values() for at in hits])]


def placeholders(samples: list[Sample]) -> list[Finding]:
    names: Counter[str] = Counter()
    hits = []
    for sample in samples:
        inside = dict.fromkeys(name for text in texts(sample) for name in PLACEHOLDER.findall(text))
        if inside:
            names.update(inside.keys())
            hits.append(sample.origin)
    if not hits:
        return []
    most = ", ".join("{{" + name + "}}" for name, _ in names.most_common(5))
    message = f"placeholders that nobody filled in: {most}; the model would learn to say them"
    return [found("warning", "placeholder", message, hits)]


def spelled(samples: list[Sample], control: Sequence[str]) -> list[Finding]:
    """End markers that preparing strips, and control tokens that it must quarantine."""
    ended = []
    refused = []
    for sample in samples:
        cleaned, changed = strip_end_markers(sample, control)
        if changed:
            ended.append(sample.origin)
        reason = only_markers(cleaned) or control_tokens(cleaned, control)
        if reason:
            refused.append((sample.origin, reason))
    findings = []
    if ended:
        message = "answers end in a literal end marker such as <|endoftext|>; preparing strips and counts it"
        findings.append(found("info", "end-marker", message, ended))
    by_reason: dict[str, list[Origin]] = defaultdict(list)
    for origin, reason in refused:
        by_reason[reason].append(origin)
    for reason, origins in by_reason.items():
        message = f"{reason}; quarantined when the tokenizer has that token"
        findings.append(found("warning", "control-token", message, origins))
    return findings


#: What each cleaning rule finds, in words; end markers are told by `spelled`.
DAMAGE = {
    "control_characters": "control characters that no text means",
    "mojibake": "text that was decoded wrongly",
    "unicode": "letters whose accents are stored apart (not NFC)",
    "html": "HTML remnants",
    "refusals": "boilerplate refusals (As an AI language model)",
    "copied": "answers that only repeat their question",
    "language": "answers in another language than their question",
    "personal": "personal data",
}


def damaged(samples: list[Sample]) -> list[Finding]:
    """What the cleaning rules find, and what preparing does about it by default."""
    cleaner = Cleaner(CleanSettings(end_markers="off"), ())
    hits: dict[str, list[Origin]] = defaultdict(list)
    for sample in samples:
        before = dict(cleaner.found)
        cleaner.clean(sample)
        for rule, count in cleaner.found.items():
            if count != before.get(rule, 0):
                hits[rule].append(sample.origin)
    findings = []
    for rule, origins in hits.items():
        does = "preparing corrects it" if cleaner.actions[rule] == "fix" else "preparing reports it"
        message = f"{DAMAGE[rule]}; {does} (data.clean.{rule})"
        findings.append(
            found("warning" if rule in ("mojibake", "control_characters") else "info", rule, message, origins)
        )
    return findings


def unread_keys(raw: list[RawRow], plug: Format) -> list[Finding]:
    """Keys of turns that no one reads: ids and dates mostly, but perhaps a mark that should have meant something."""
    read_keys = {"openai": openai.READ, "sharegpt": sharegpt.READ}.get(plug.name)
    if read_keys is None:
        return []
    unread: Counter[str] = Counter()
    hits = []
    for row in raw:
        listed: list = next((row.row[key] for key in openai.TURNS if isinstance(row.row.get(key), list)), [])
        keys = [str(key) for turn in listed if isinstance(turn, dict) for key in turn if turn[key] is not None]
        if set(keys) - read_keys:
            unread.update(key for key in keys if key not in read_keys)
            hits.append(row.origin)
    if not hits:
        return []
    most = ", ".join(key for key, _ in unread.most_common(8))
    return [found("warning", "unread-key", f"turns have keys that are not read: {most}", hits)]


# --- figures -----------------------------------------------------------------------------------------------------


def turns(samples: list[Sample]) -> list[Finding]:
    roles: Counter[str] = Counter()
    lengths: Counter[int] = Counter()
    untrained = 0
    for sample in samples:
        messages = messages_of(sample)
        roles.update(message.role for message in messages)
        untrained += sum(message.role == "assistant" and not message.train for message in messages)
        lengths[sum(message.role != "system" for message in messages)] += 1
    if not roles:
        return []
    counts = ", ".join(f"{role} {count}" for role, count in roles.most_common())
    most = ", ".join(f"{count} with {turns}" for turns, count in lengths.most_common(5))
    left_out = f"; assistant turns not trained: {untrained}" if untrained else ""
    return [Finding("info", "turns", f"turns by role: {counts}; samples by turns: {most}{left_out}", (), len(samples))]


def lengths(samples: list[Sample]) -> list[Finding]:
    """Characters of questions and answers: median, 95th percentile, longest."""
    asked: list[int] = []
    answered: list[int] = []
    whole: list[int] = []
    for sample in samples:
        whole.append(sum(map(len, texts(sample))))
        for message in messages_of(sample):
            (answered if message.role == "assistant" else asked).append(len(message.content))
    longest = samples[max(range(len(samples)), key=whole.__getitem__)]
    parts = [("samples", whole), ("questions and context", asked), ("answers", answered)]
    shown = "; ".join(f"{name} {spread(counts)}" for name, counts in parts if counts)
    figures = f"characters (median / 95 % / longest): {shown}"
    return [Finding("info", "length", figures, (longest.origin,), len(samples))]


def spread(counts: list[int]) -> str:
    ordered = sorted(counts)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{statistics.median_low(ordered)} / {high} / {ordered[-1]}"


def scripts(samples: list[Sample]) -> list[Finding]:
    """How many samples are mostly Chinese, Japanese or Korean, and how many answer in another script."""
    cjk = 0
    crossing = []
    for sample in samples:
        messages = messages_of(sample)
        if isinstance(sample, Text):
            cjk += mostly_cjk(sample.text)
            continue
        asked = " ".join(message.content for message in messages if message.role == "user")
        answered = " ".join(message.content for message in messages if message.role == "assistant")
        cjk += mostly_cjk(asked + answered)
        # An answer of a few letters (a label, a name) says nothing of a language.
        if len(LETTER.findall(answered[:400])) >= 10 and mostly_cjk(asked) != mostly_cjk(answered):
            crossing.append(sample.origin)
    share = f"{cjk} of {len(samples)} samples are mostly Chinese, Japanese or Korean"
    findings = [Finding("info", "script", share, (), len(samples))]
    if crossing:
        findings.append(found("info", "script-change", "question and answer are in different scripts", crossing))
    return findings


def columns_left(samples: list[Sample]) -> list[Finding]:
    names = Counter(key for sample in samples for key in sample.meta)
    if not names:
        return []
    most = ", ".join(f"{name} ({count})" for name, count in names.most_common(10))
    message = f"further columns, kept beside the samples and not trained: {most}"
    return [Finding("info", "columns", message, (), len(names))]


def messages_of(sample: Sample) -> tuple[Message, ...]:
    if isinstance(sample, Conversation):
        return sample.messages
    if isinstance(sample, Pair):
        return (*sample.prompt, sample.chosen, sample.rejected)
    return ()
