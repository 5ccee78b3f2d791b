"""From files to prepared data: the stages in order, each sample counted at every one.

    read -> convert -> clean -> deduplicate -> split -> render -> fit the length -> store
             |          |         |                       |          |
             quarantine quarantine removed                quarantine removed or cut

samples = kept + quarantined + removed by a named rule; `Counts.check` holds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..chat.types import Conversation, Message, Origin, Sample, Text, Tokens
from ..errors import CheckError, DataError, TemplateError
from ..files import fingerprint, read_json, read_jsonl, sha256_file, write_json, write_jsonl
from ..rundir import RunDir
from . import DataSettings, Part, SourceSettings
from .clean import control_tokens, only_markers, strip_end_markers
from .dedupe import exact
from .formats import Refused, choose, convert
from .page import write_page
from .readers import RawRow
from .sources import list_files, probe, read
from .split import PARTS, split, weighted, weighting
from .store import Prepared, open_prepared, write_fingerprint, write_part

if TYPE_CHECKING:
    from ..chat.render import Chat

RENDER = 1000  # conversations rendered at a time
Rendered = list[tuple[Sample, list[Tokens]]]
Progress = Callable[[str, int], None]  # the stage, and how many samples it has done


@dataclass
class Counts:
    """What became of every sample; a bad row counts as one."""

    samples: int = 0
    quarantined: Counter = field(default_factory=Counter)  # by reason
    removed: Counter = field(default_factory=Counter)  # by rule
    repaired: Counter = field(default_factory=Counter)  # by rule; a repaired sample is a kept one
    kept: dict[str, int] = field(default_factory=dict)  # by part
    weighted: dict[str, int] = field(default_factory=dict)  # training samples more or fewer an epoch, by source

    def check(self) -> None:
        """Nothing may be lost without a count."""
        out = sum(self.kept.values()) + sum(self.quarantined.values()) + sum(self.removed.values())
        if out != self.samples:
            raise CheckError(
                f"{self.samples} samples came in, but {out} are accounted for",
                harm="Some were lost or counted twice.",
                hint="This is a fault of Fitout; please report it with the data report.",
            )


class _Work:
    """The samples on their way, the counts and the quarantine."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.quarantine: list[dict[str, Any]] = []
        self.removed: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = []
        self.parts: dict[str, Part] = {}  # files that a source's `split:` gives to a part
        self.weights: dict[str, float] = {}  # files whose training samples are seen more or less often

    def reject(self, origin: Origin, reason: str, raw: Any, rule: str) -> None:
        self.counts.quarantined[reason if len(reason) < 80 else rule] += 1
        self.quarantine.append(
            {
                "file": origin.file,
                "line": origin.line,
                "part": origin.part,
                "rule": rule,
                "reason": reason,
                "row": raw,
            }
        )


def prepare(
    settings: DataSettings,
    chat: Chat,
    wants: str,
    run: RunDir,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Prepared, dict[str, Any]]:
    """Prepares the data of a run, or takes what is there when every input has the same fingerprint.

    `wants` is what the objective trains on: conversation or text. Returns the prepared data and the data report.
    Raises DataError when a file cannot be read or nothing is left to train on.
    """
    made_of = _fingerprint(settings, chat, wants, seed)
    ready = open_prepared(run.data)
    if ready and ready.fingerprint == made_of:
        return ready, read_json(run.data_report)
    say = progress or (lambda stage, done: None)
    work = _Work()
    samples = _read_all(settings.sources, wants, work, say)
    samples = _clean(samples, chat, work)
    samples = _deduplicate(samples, settings, work)
    parts = split(samples, settings.split, seed, work.parts)
    rendered = {name: _render(parts[name], chat, settings, wants, work, say, name) for name in PARTS}
    rendered["train"] = _weigh(rendered["train"], seed, work)
    report = _report(settings, chat, wants, work, rendered)
    work.counts.check()
    _require_training_data(report, work, run)
    for name in PARTS:
        write_part(run.data / f"{name}.arrow", _rows(rendered[name]))
    talks = (sample for sample, _ in rendered["test"] if isinstance(sample, Conversation))
    write_jsonl(run.test_rows, map(as_row, talks))
    write_jsonl(run.quarantine, work.quarantine)
    write_jsonl(run.removed, work.removed)
    write_json(run.data_report, report)
    write_page(run.data_page, report, work.quarantine)
    write_fingerprint(run.data, made_of)  # last: without it the folder counts as unfinished
    return Prepared(run.data, made_of), report


def _fingerprint(settings: DataSettings, chat: Chat, wants: str, seed: int) -> str:
    """Everything that decides what the prepared data are: contents of the files, rules, template, tokenizer."""
    contents = []
    for source in settings.sources:
        files = list_files(source, Path()).files
        contents.append([sha256_file(path) for path, _ in files] if files else source.path)
    left_out: Any = {"packing": True, "split_seed": True, "sources": {"__all__": {"path"}}}  # `seed` is the split's
    rules = settings.model_dump(mode="json", exclude=left_out)
    return fingerprint(5, rules, contents, chat.fingerprint, wants, seed)


# read and convert


def _read_all(sources: Sequence[SourceSettings], wants: str, work: _Work, say: Progress) -> list[Sample]:
    kept: list[Sample] = []
    for source in sources:
        before, rejected = work.counts.samples, sum(work.counts.quarantined.values())
        name, samples = _convert(source, work)
        for sample in samples:
            _require_kind(sample, wants, source, name)
            work.counts.samples += 1
            kept.append(sample)
            if source.split:
                work.parts[sample.origin.file] = source.split
            if source.weight != 1:
                work.weights[sample.origin.file] = source.weight
            if len(kept) % 10_000 == 0:
                say("read", len(kept))
        work.sources.append(
            {
                "path": source.path,
                "format": name,
                "samples": work.counts.samples - before,
                "bad_rows": sum(work.counts.quarantined.values()) - rejected,
                "skipped_files": [f"{file}: {why}" for file, why in list_files(source, Path()).skipped],
            }
        )
    return kept


def _convert(source: SourceSettings, work: _Work) -> tuple[str, Iterator[Sample]]:
    """The format's name and the source's samples; rows that are none go to quarantine."""
    plug = choose(probe(source, Path()), source.format, source.columns, where=source.path)

    def samples() -> Iterator[Sample]:
        for one in read(source, Path()):
            if not isinstance(one, RawRow):
                work.counts.samples += 1
                work.reject(one.origin, one.reason, one.raw, "unreadable row")
                continue
            for sample in convert(plug, one, source.columns):
                if isinstance(sample, Refused):
                    work.counts.samples += 1
                    work.reject(sample.origin, sample.reason, sample.raw, "not a sample")
                else:
                    yield sample

    return plug.name, samples()


def _require_kind(sample: Sample, wants: str, source: SourceSettings, name: str) -> None:
    kind = "text" if isinstance(sample, Text) else "conversation" if isinstance(sample, Conversation) else "pair"
    if kind != wants:
        remedy = {"text": "objective: {kind: pretrain}", "conversation": "objective: {kind: sft}"}.get(kind)
        raise DataError(
            f"this source ({name}) holds {kind}s, and the objective trains on {wants}s",
            where=source.path,
            hint=f"Set {remedy}, or take another source." if remedy else "Preference objectives are not there yet.",
        )


# clean, deduplicate, split


def _clean(samples: list[Sample], chat: Chat, work: _Work) -> list[Sample]:
    """Literal end markers after an answer are stripped; text that still spells a control token is quarantined."""
    kept = []
    for sample in samples:
        cleaned, stripped = strip_end_markers(sample, chat.control)
        reason = only_markers(cleaned) or control_tokens(cleaned, chat.control)
        if reason:
            work.reject(sample.origin, reason, as_row(sample), "control token")
            continue
        if stripped:
            work.counts.repaired["end marker stripped"] += 1
        kept.append(cleaned)
    return kept


def _deduplicate(samples: list[Sample], settings: DataSettings, work: _Work) -> list[Sample]:
    """Exact duplicates go; of twins in a given test file and in training, the training one."""
    if not settings.deduplicate:
        return samples
    kept, dropped = exact(samples, protected={file for file, part in work.parts.items() if part != "train"})
    work.counts.removed["duplicate"] += len(dropped)
    work.removed += [
        {"origin": str(sample.origin), "rule": "duplicate", "reason": reason} for sample, reason in dropped
    ]
    return kept


# render and fit


def _render(
    samples: list[Sample], chat: Chat, settings: DataSettings, wants: str, work: _Work, say: Progress, part: Part
) -> Rendered:
    """Tokens of each sample, those that do not fit dealt with as `too_long` says."""
    done: Rendered = []
    for at in range(0, len(samples), RENDER):
        batch = samples[at : at + RENDER]
        for sample, group in zip(batch, _tokens(batch, chat, wants), strict=True):
            if isinstance(group, TemplateError):
                work.reject(sample.origin, group.message, as_row(sample), "template")
                continue
            fitted = _cut_text(group, settings) if wants == "text" else _fit(sample, group, settings, work)
            if fitted:
                done.append((sample, fitted))
        say(f"render {part}", at + len(batch))
    work.counts.kept[part] = len(done)
    return done


def _tokens(batch: list[Sample], chat: Chat, wants: str) -> list[list[Tokens] | TemplateError]:
    """The batch rendered at once; when the template refuses one of its conversations, one at a time."""
    if wants == "text":
        return [[tokens] for tokens in chat.text_ids([s for s in batch if isinstance(s, Text)])]
    talks = [sample for sample in batch if isinstance(sample, Conversation)]
    try:
        return list(chat.render_many(talks))
    except TemplateError:
        return [_tokens_of_one(talk, chat) for talk in talks]


def _tokens_of_one(talk: Conversation, chat: Chat) -> list[Tokens] | TemplateError:
    try:
        return chat.render(talk)
    except TemplateError as error:
        return error


def _weigh(rendered: Rendered, seed: int, work: _Work) -> Rendered:
    """Training samples as often as their source weighs; those that a weight below one leaves out are counted."""
    if not work.weights:
        return rendered
    once = [sample for sample, _ in rendered]
    chosen = weighted(once, work.weights, seed)
    work.counts.weighted = {file: now - was for file, (was, now) in weighting(once, chosen).items()}
    tokens = {id(sample): group for sample, group in rendered}
    work.counts.kept["train"] = len({id(sample) for sample in chosen})
    work.counts.removed["left out by weight"] += len(once) - work.counts.kept["train"]
    return [(sample, tokens[id(sample)]) for sample in chosen]


def _fit(sample: Sample, group: list[Tokens], settings: DataSettings, work: _Work) -> list[Tokens]:
    """A conversation's samples under `max_length`, [] when it is removed or quarantined."""
    limit = settings.max_length
    longest = max(len(tokens.ids) for tokens in group)
    if longest > limit:
        if settings.too_long == "error":
            raise DataError(
                f"{sample.origin} has {longest} tokens, more than data.max_length {limit}",
                harm="It would be dropped or cut.",
                hint="Raise data.max_length, or set data.too_long: drop or truncate.",
            )
        if settings.too_long == "drop":
            work.counts.removed["too long"] += 1
            reason = f"{longest} tokens, data.max_length is {limit}"
            work.removed.append({"origin": str(sample.origin), "rule": "too long", "reason": reason})
            return []
        group = [_truncate(tokens, limit) for tokens in group]
    if not any(tokens.supervised for tokens in group):
        reason = "no supervised token is left after the cut" if longest > limit else "no token is supervised"
        work.reject(sample.origin, reason, as_row(sample), "nothing to train")
        return []
    if longest > limit:
        work.counts.repaired["cut to max_length"] += 1
    return [tokens for tokens in group if tokens.supervised]


def _truncate(tokens: Tokens, limit: int) -> Tokens:
    return Tokens(tokens.ids[:limit], tokens.train_on[:limit], tokens.origin, tokens.ids[limit:])


def _cut_text(group: list[Tokens], settings: DataSettings) -> list[Tokens]:
    """A text as blocks of at most `max_length`; a last piece of one token, which nothing could predict, joins its
    neighbour's end by overlapping it."""
    [tokens] = group
    ids, limit = tokens.ids, settings.max_length
    if len(ids) < 2:
        return [tokens]
    starts = list(range(0, len(ids), limit))
    if len(ids) - starts[-1] == 1 and len(starts) > 1:
        starts[-1] -= 1
    return [Tokens(ids[a : a + limit], tokens.train_on[a : a + limit], tokens.origin) for a in starts]


def _rows(rendered: Rendered) -> Iterator[tuple[int, Tokens]]:
    """Rows with the group they are shuffled in: a conversation's samples stay together, a text's blocks do not."""
    group = 0
    for sample, samples in rendered:
        for tokens in samples:
            yield group, tokens
            group += isinstance(sample, Text)
        group += not isinstance(sample, Text)


# what is told


def _report(
    settings: DataSettings,
    chat: Chat,
    wants: str,
    work: _Work,
    rendered: dict[Part, Rendered],
) -> dict[str, Any]:
    """Everything the data report and the screen show, as plain values."""
    parts = {}
    unknown = _unknown_id(chat)
    for name in PARTS:
        flat = [tokens for _, group in rendered[name] for tokens in group]
        parts[name] = {
            "samples": len(rendered[name]),
            "rows": len(flat),  # more than samples where a template rewrites history or a text is cut into blocks
            "tokens": sum(len(tokens.ids) for tokens in flat),
            "supervised": sum(tokens.supervised for tokens in flat),
            "no_end": sum(not _ends_trained(tokens, chat) for tokens in flat) if wants != "text" else 0,
            "unknown": sum(tokens.ids.count(unknown) for tokens in flat) if unknown is not None else 0,
            "lengths": _histogram([len(tokens.ids) for tokens in flat], settings.max_length),
        }
    counts = asdict(work.counts)
    return {
        "samples": work.counts.samples,
        "kept": counts["kept"],
        "quarantined": dict(work.counts.quarantined.most_common()),
        "removed": {rule: n for rule, n in work.counts.removed.items() if n},
        "repaired": dict(work.counts.repaired),
        "weighted": work.counts.weighted,
        "sources": work.sources,
        "parts": parts,
        "max_length": settings.max_length,
        "too_long": settings.too_long,
        "template": chat.template_name,
        "notes": chat.notes,
    }


def _unknown_id(chat: Chat) -> int | None:
    """The token that stands for text the tokenizer cannot spell; some tokenizers give that name to their end token."""
    own = chat.tokenizer
    return None if own.unk_token_id in (own.eos_token_id, own.bos_token_id) else own.unk_token_id


def _ends_trained(tokens: Tokens, chat: Chat) -> bool:
    """Whether the last trained token ends a turn; it does not where the sample was cut."""
    trained = [token for token, on in zip(tokens.ids, tokens.train_on, strict=True) if on]
    return bool(trained) and trained[-1] in chat.stop_ids


def _histogram(lengths: list[int], limit: int, bins: int = 16) -> list[list[int]]:
    """[[from, to, rows], ...] over equal ranges up to the limit."""
    width = -(-limit // bins)
    counts = Counter(min((length - 1) // width, bins - 1) for length in lengths if length)
    return [[b * width + 1, min((b + 1) * width, limit), counts[b]] for b in range(bins)]


def _require_training_data(report: dict[str, Any], work: _Work, run: RunDir) -> None:
    if report["parts"]["train"]["supervised"]:
        return
    write_jsonl(run.quarantine, work.quarantine)
    write_json(run.data_report, report)
    reasons = [f"{n} {reason}" for reason, n in [*report["removed"].items(), *report["quarantined"].items()]]
    raise DataError(
        f"no token is left to train on: of {report['samples']} samples "
        + ("; ".join(reasons) or "none is for training"),
        where=str(run.data),
        harm="Training would run and change nothing.",
        hint="See quarantine.jsonl; raise data.max_length, or change data.split or the sources' `split:`.",
    )


def summary(report: dict[str, Any]) -> str:
    """One line that adds up: samples = kept + quarantined + removed."""
    kept = sum(report["kept"].values())
    quarantined, removed = sum(report["quarantined"].values()), sum(report["removed"].values())
    parts = ", ".join(f"{report['kept'][name]:,} {name}" for name in PARTS)
    return (
        f"{report['samples']:,} samples = {kept:,} kept ({parts}) + {quarantined:,} quarantined + {removed:,} removed"
    )


# samples as plain rows, for quarantine.jsonl and test.jsonl


def as_row(sample: Sample) -> dict[str, Any]:
    """A sample as a JSON-able row; a Conversation comes back with `from_row`."""
    origin = {"file": sample.origin.file, "line": sample.origin.line, "part": sample.origin.part}
    if isinstance(sample, Text):
        return {"text": sample.text, "origin": origin, "meta": sample.meta}
    if isinstance(sample, Conversation):
        messages = [{**message.as_dict(), "train": message.train} for message in sample.messages]
        return {"messages": messages, "tools": list(sample.tools), "meta": sample.meta, "origin": origin}
    return {
        "prompt": [message.as_dict() for message in sample.prompt],
        "chosen": sample.chosen.as_dict(),
        "rejected": sample.rejected.as_dict(),
        "origin": origin,
    }


def from_row(row: dict[str, Any]) -> Conversation:
    messages = []
    for message in row["messages"]:
        extra = {key: value for key, value in message.items() if key not in ("role", "content", "train")}
        messages.append(Message(message["role"], message["content"], message["train"], extra=extra))
    return Conversation(tuple(messages), Origin(**row["origin"]), tuple(row["tools"]), row["meta"])


def test_conversations(run: RunDir) -> list[Conversation]:
    """The test part of a prepared run, as it was said."""
    return [from_row(row) for row in read_jsonl(run.test_rows)] if run.test_rows.exists() else []
