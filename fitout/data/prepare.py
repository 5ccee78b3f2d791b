"""From files to prepared data: the stages in order, each sample counted at every one.

    read -> convert -> clean -> duplicates -> split -> render (and fit the length) -> weigh -> store
      |        |         |          |                     |                             |
      quarantine      quarantine  removed             quarantine or removed          removed

Between cleaning and storing the samples are on disk (`rows`); the stages decide over numbers and keys. Every stage adds
up: what came and was made = what left + quarantined + removed by a named rule (`ledger`).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..chat.types import Conversation, Origin, Sample, Text, Tokens
from ..errors import DataError, TemplateError
from ..files import explain_os_errors, fingerprint, read_json, read_jsonl, sha256_file, write_json
from ..rundir import RunDir
from . import DataSettings, SourceSettings
from . import Part as PartName
from .clean import control_tokens, only_markers, strip_end_markers
from .dedupe import repeats
from .formats import Format, Refused, choose, convert
from .ledger import Ledger, Stage
from .page import write_page
from .readers import RawRow
from .repair import Repair, Repairs, accepted, identity, readmitted, rule_of, suggest, without_control
from .rows import Lines, Rows, as_row, from_row
from .sources import list_files, probe, read
from .split import PARTS, split, times_seen
from .store import PartWriter, Prepared, copy_rows, open_prepared, write_fingerprint

if TYPE_CHECKING:
    from ..chat.render import Chat

RENDER = 1000  # conversations rendered at a time
SHOWN = 6  # quarantined rows of a rule that the page shows
Progress = Callable[[str, int], None]  # the stage, and how many samples it has done


class _Work:
    """What the stages share: the ledger, the files of what was taken out, who watches."""

    def __init__(self, run: RunDir, repairs: Repairs, progress: Progress | None):
        self.run, self.repairs = run, repairs
        self.say: Progress = progress or (lambda stage, done: None)
        self.ledger = Ledger()
        self.quarantine, self.removed = Lines(run.quarantine), Lines(run.removed)
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)  # by rule
        self.shown: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = []
        self.parts: dict[str, PartName] = {}  # files that a source's `split:` gives to a part
        self.weights: dict[str, float] = {}  # files whose training samples are seen more or less often

    def reject(self, stage: Stage, origin: Origin, reason: str, raw: Any, *, rule: str, form: str = "row",
               repair: Repair | None = None) -> None:  # fmt: skip
        """To quarantine; `form` says whether `raw` is a row of the file or a sample (`as_row`)."""
        stage.quarantined[rule] += 1
        self.reasons[rule][reason if len(reason) < 120 else reason[:119] + "…"] += 1
        line = {
            "id": identity(origin, raw),
            "file": origin.file,
            "line": origin.line,
            "part": origin.part,
            "rule": rule,
            "reason": reason,
            "as": form,
            "repair": {"how": repair.how, "row": repair.row} if repair else None,
            "row": raw,
        }
        self.quarantine.write(line)
        if stage.quarantined[rule] <= SHOWN:
            self.shown.append(line)

    def remove(self, stage: Stage, origin: Origin, rule: str, reason: str) -> None:
        stage.removed[rule] += 1
        self.removed.write({"origin": str(origin), "rule": rule, "reason": reason})

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage of the ledger and its seconds."""
        stage = self.ledger.begin(name)
        started = time.perf_counter()
        yield stage
        stage.seconds = time.perf_counter() - started
        self.say(name, stage.left)

    def close(self, *, keep: bool) -> None:
        for lines in (self.quarantine, self.removed):
            lines.done() if keep else lines.drop()


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
    made_of = _fingerprint(settings, chat, wants, seed, run)
    ready = open_prepared(run.data)
    if ready and ready.fingerprint == made_of:
        return ready, read_json(run.data_report)
    with explain_os_errors(run.data, "write"):
        work = _Work(run, accepted(run.repairs), progress)
        try:
            with Rows(run.data / ".rows.jsonl.part") as rows:
                report = _stages(settings, chat, wants, run, seed, work, rows)
        except BaseException:
            work.close(keep=False)
            raise
    write_fingerprint(run.data, made_of)  # last: without it the folder counts as unfinished
    return Prepared(run.data, made_of), report


def _stages(
    settings: DataSettings, chat: Chat, wants: str, run: RunDir, seed: int, work: _Work, rows: Rows
) -> dict[str, Any]:
    _read_and_clean(settings.sources, chat, wants, work, rows)
    here = _deduplicate(rows, settings, work)
    fixed = [work.parts.get(file) for file in rows.files]
    parts = split(rows.prompts[here], settings.split, seed, [fixed[file] for file in rows.file_of[here]])
    made = _render({name: here[at] for name, at in parts.items()}, rows, chat, settings, wants, work)
    _weigh(made["train"], rows, seed, work)
    work.ledger.check()
    report = _report(settings, chat, wants, work, made)
    for name in PARTS:
        lines = Lines(run.data / f"{name}.jsonl")
        for at in made[name].samples:
            lines.raw(rows.line(at))
        lines.done()
    work.close(keep=True)
    write_json(run.data_report, report)
    if not report["parts"]["train"]["supervised"]:
        raise _nothing_to_train(report, run)
    write_page(run.data_page, report, work.shown)
    return report


def _fingerprint(settings: DataSettings, chat: Chat, wants: str, seed: int, run: RunDir) -> str:
    """Everything that decides what the prepared data are: files by content, rules, repairs, template, tokenizer."""
    contents = []
    for source in settings.sources:
        files = list_files(source, Path()).files
        contents.append([sha256_file(path) for path, _ in files] if files else source.path)
    left_out: Any = {"packing": True, "split_seed": True, "sources": {"__all__": {"path"}}}  # `seed` is the split's
    rules = settings.model_dump(mode="json", exclude=left_out)
    return fingerprint(6, rules, contents, accepted(run.repairs), chat.fingerprint, wants, seed)


# read, convert, clean


def _read_and_clean(sources: Sequence[SourceSettings], chat: Chat, wants: str, work: _Work, rows: Rows) -> None:
    """Every sample of the sources, cleaned, into `rows`; what is none goes to quarantine."""
    reading, converting, cleaning = (work.ledger.begin(name, 0) for name in ("read", "convert", "clean"))
    started = time.perf_counter()
    for source in sources:
        plug = choose(probe(source, Path()), source.format, source.columns, where=source.path)
        before = (reading.came + converting.made.total(), reading.quarantined.total() + converting.quarantined.total())
        for sample in _converted(source, plug, reading, converting, work):
            _require_kind(sample, wants, source, plug.name)
            cleaned = _cleaned(sample, chat, cleaning, work)
            if cleaned is None:
                continue
            rows.add(cleaned)
            if source.split:
                work.parts[sample.origin.file] = source.split
            if source.weight != 1:
                work.weights[sample.origin.file] = source.weight
            if len(rows) % 10_000 == 0:
                work.say("read", len(rows))
        bad = reading.quarantined.total() + converting.quarantined.total()
        work.sources.append(
            {
                "path": source.path,
                "format": plug.name,
                "samples": reading.came + converting.made.total() - before[0],
                "bad_rows": bad - before[1],
                "skipped_files": [f"{file}: {why}" for file, why in list_files(source, Path()).skipped],
            }
        )
    rows.written()
    converting.came, cleaning.left = reading.left, len(rows)
    cleaning.came = converting.left
    cleaning.seconds = time.perf_counter() - started


def _converted(
    source: SourceSettings, plug: Format, reading: Stage, converting: Stage, work: _Work
) -> Iterator[Sample]:
    """The source's samples; bad rows go to quarantine, or are replaced by the repair that was accepted for them."""
    for one in read(source, Path()):
        reading.came += 1
        made: Iterable[Sample | Refused]
        if isinstance(one, RawRow):
            reading.left += 1
            made = _or_repaired(convert(plug, one, source.columns), one.row, plug, source, converting, work)
        else:
            repair = work.repairs.get(identity(one.origin, one.raw))
            if repair is None:
                suggestion = suggest(one.raw, one.origin, plug, source.columns)
                work.reject(reading, one.origin, one.reason, one.raw, rule="unreadable row", repair=suggestion)
                continue
            reading.left += 1
            reading.changed["accepted repair"] += 1
            made = readmitted(repair, one.origin, plug, source.columns)
        count = 0
        for sample in made:
            count += 1
            if isinstance(sample, Refused):
                suggestion = suggest(sample.raw, sample.origin, plug, source.columns)
                work.reject(
                    converting, sample.origin, sample.reason, sample.raw, rule=rule_of(sample.reason), repair=suggestion
                )
            else:
                converting.left += 1
                yield sample
        if count == 0:
            work.reject(converting, one.origin, "the row holds no sample", _raw(one), rule="not a sample")
        elif count > 1:
            converting.made["more from rows that hold several"] += count - 1


def _raw(one: Any) -> Any:
    return one.row if isinstance(one, RawRow) else one.raw


def _or_repaired(
    made: Iterable[Sample | Refused], row: Any, plug: Format, source: SourceSettings, stage: Stage, work: _Work
) -> Iterator[Sample | Refused]:
    """Refused parts with what they need of their row, so that each can be repaired by itself; accepted repairs."""
    for sample in made:
        if not isinstance(sample, Refused):
            yield sample
            continue
        if sample.origin.part and isinstance(sample.raw, dict):
            shared = {key: value for key, value in row.items() if not isinstance(value, list)}
            sample = Refused(sample.origin, sample.reason, {**shared, **sample.raw})
        repair = work.repairs.get(identity(sample.origin, sample.raw))
        if repair is None:
            yield sample
        else:
            stage.changed["accepted repair"] += 1
            yield from readmitted(repair, sample.origin, plug, source.columns)


def _require_kind(sample: Sample, wants: str, source: SourceSettings, name: str) -> None:
    kind = "text" if isinstance(sample, Text) else "conversation" if isinstance(sample, Conversation) else "pair"
    if kind != wants:
        remedy = {"text": "objective: {kind: pretrain}", "conversation": "objective: {kind: sft}"}.get(kind)
        raise DataError(
            f"this source ({name}) holds {kind}s, and the objective trains on {wants}s",
            where=source.path,
            hint=f"Set {remedy}, or take another source." if remedy else "Preference objectives are not there yet.",
        )


def _cleaned(sample: Sample, chat: Chat, stage: Stage, work: _Work) -> Sample | None:
    """Literal end markers after an answer are stripped; text that still spells a control token is quarantined."""
    cleaned, stripped = strip_end_markers(sample, chat.control)
    reason = only_markers(cleaned) or control_tokens(cleaned, chat.control)
    if reason:
        raw = as_row(sample)
        repair = work.repairs.get(identity(sample.origin, raw))
        again = next(readmitted(repair, sample.origin, _NO_FORMAT, None)) if repair else None
        if again is None or isinstance(again, Refused) or control_tokens(again, chat.control) or only_markers(again):
            suggestion = without_control(cleaned, chat.control)
            work.reject(
                stage, sample.origin, reason, raw, rule=rule_of(reason), form="sample", repair=suggestion
            )  # fmt: skip
            return None
        stage.changed["accepted repair"] += 1
        return again
    if stripped:
        stage.changed["end marker stripped"] += 1
    return cleaned


_NO_FORMAT: Any = None  # a repaired sample is not converted again


# deduplicate


def _deduplicate(rows: Rows, settings: DataSettings, work: _Work) -> np.ndarray:
    """The numbers of the samples that stay. Of twins in a given test file and in training, the training one goes."""
    with work.stage("duplicates") as stage:
        here = np.arange(len(rows))
        if settings.deduplicate:
            held_out = [work.parts.get(file, "train") != "train" for file in rows.files]
            first = repeats(rows.keys, np.array(held_out, bool)[rows.file_of])
            for at in np.flatnonzero(first != here):
                work.remove(stage, rows.origin(at), "duplicate", f"repeats {rows.origin(first[at])}")
            here = here[first == here]
        stage.left = len(here)
    return here


# render and fit


@dataclass
class Made:
    """What became of one part: its samples by number, the rows of the store that each gave, and figures of the rows."""

    path: Path
    samples: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of each sample
    groups: list[int] = field(default_factory=list)  # of each store row
    lengths: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    supervised: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    no_end: list[bool] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)
    weighted: dict[str, int] = field(default_factory=dict)  # training samples more or fewer an epoch, by file
    kept: int = 0


def _render(
    parts: dict[PartName, np.ndarray], rows: Rows, chat: Chat, settings: DataSettings, wants: str, work: _Work
) -> dict[PartName, Made]:
    """The samples as tokens, in the store; those that do not fit dealt with as `too_long` says."""
    made = {}
    with work.stage("render") as stage:
        for name in PARTS:
            made[name] = _render_part(name, parts[name], rows, chat, settings, wants, stage, work)
            stage.left += made[name].kept
    return made


def _render_part(
    name: PartName, numbers: np.ndarray, rows: Rows, chat: Chat, settings: DataSettings, wants: str, stage: Stage,
    work: _Work,
) -> Made:  # fmt: skip
    made = Made(work.run.data / f"{name}.arrow")
    unknown = _unknown_id(chat)
    group = 0
    with PartWriter(made.path) as writer:
        for start in range(0, len(numbers), RENDER):
            batch = [rows.sample(at) for at in numbers[start : start + RENDER]]
            for at, sample, rendered in zip(
                numbers[start : start + RENDER], batch, _tokens(batch, chat, wants), strict=True
            ):
                if isinstance(rendered, TemplateError):
                    work.reject(stage, sample.origin, rendered.message, as_row(sample), rule="template", form="sample")
                    continue
                fitted = _cut_text(rendered, settings) if wants == "text" else _fit(sample, rendered, settings, stage,
                                                                                    work)  # fmt: skip
                if not fitted:
                    continue
                made.samples.append(int(at))
                made.rows.append(len(fitted))
                for tokens in fitted:  # a conversation's samples are shuffled together, a text's blocks apart
                    writer.add(group, tokens)
                    made.groups.append(group)
                    made.no_end.append(wants != "text" and not _ends_trained(tokens, chat))
                    made.unknown.append(tokens.ids.count(unknown) if unknown is not None else 0)
                    group += wants == "text"
                group += wants != "text"
            work.say(f"render {name}", start + len(batch))
    made.kept = len(made.samples)
    made.lengths, made.supervised = np.array(writer.lengths), np.array(writer.supervised)
    return made


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


def _fit(sample: Sample, group: list[Tokens], settings: DataSettings, stage: Stage, work: _Work) -> list[Tokens]:
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
            work.remove(stage, sample.origin, "too long", f"{longest} tokens, data.max_length is {limit}")
            return []
        group = [_truncate(tokens, limit) for tokens in group]
    if not any(tokens.supervised for tokens in group):
        reason = "no supervised token is left after the cut" if longest > limit else "no token is supervised"
        work.reject(stage, sample.origin, reason, as_row(sample), rule="nothing to train", form="sample")
        return []
    if longest > limit:
        stage.changed["cut to max_length"] += 1
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


# weigh


def _weigh(made: Made, rows: Rows, seed: int, work: _Work) -> None:
    """Training samples as often as their source weighs; those that a weight below one leaves out are counted."""
    with work.stage("weigh") as stage:
        stage.left = stage.came
        if not work.weights:
            return
        numbers = np.array(made.samples)
        weights = np.array([work.weights.get(file, 1.0) for file in rows.files])[rows.file_of[numbers]]
        names = [f"{rows.keys[at].hex()} {rows.origin(at)}" for at in numbers]
        times = times_seen(weights, names, seed)
        files = rows.file_of[numbers]
        for file, name in enumerate(rows.files):
            change = int((times[files == file] - 1).sum())
            if change:
                made.weighted[name] = change
        for at in numbers[times == 0]:
            work.remove(stage, rows.origin(at), "left out by weight", "the weight of its source is below one")
        _take(made, times)
        stage.left -= stage.removed.total()


def _take(made: Made, times: np.ndarray) -> None:
    """The part's samples as often as `times` says, each copy a group of its own; copies follow each other."""
    starts = np.concatenate([[0], np.cumsum(made.rows)])
    groups = np.array(made.groups)
    taken, numbered, group = [], [], 0
    for at, count in enumerate(times):
        rows = np.arange(starts[at], starts[at + 1])
        for _ in range(count):
            inside = groups[rows] - groups[rows[0]]
            taken.append(rows)
            numbered.append(group + inside)
            group += int(inside[-1]) + 1
    order = np.concatenate(taken) if taken else np.zeros(0, np.int64)
    made.groups = np.concatenate(numbered).tolist() if numbered else []
    whole = made.path.with_name(f".{made.path.name}.part")
    made.path.replace(whole)
    copy_rows(whole, made.path, order, np.array(made.groups, np.int64))
    whole.unlink()
    made.lengths, made.supervised = made.lengths[order], made.supervised[order]
    made.no_end = np.array(made.no_end)[order].tolist()
    made.unknown = np.array(made.unknown)[order].tolist()
    made.samples = [number for number, count in zip(made.samples, times, strict=True) if count]
    made.rows = [count for count, seen in zip(made.rows, times, strict=True) if seen]
    made.kept = len(made.samples)


# what is told


def _report(
    settings: DataSettings, chat: Chat, wants: str, work: _Work, made: dict[PartName, Made]
) -> dict[str, Any]:  # fmt: skip
    """Everything the data report and the screen show, as plain values."""
    ledger = work.ledger
    parts = {}
    for name in PARTS:
        part = made[name]
        parts[name] = {
            "samples": len(part.rows) + sum(part.weighted.values()) + ledger.total("removed")["left out by weight"]
            if name == "train"
            else part.kept,  # an epoch's: with the copies that weights make
            "rows": len(part.lengths),  # more than samples where a template rewrites history or a text is cut in blocks
            "tokens": int(part.lengths.sum()),
            "supervised": int(part.supervised.sum()),
            "no_end": sum(part.no_end),
            "unknown": sum(part.unknown),
            "lengths": _histogram(part.lengths, settings.max_length),
        }
    return {
        "samples": ledger.samples,
        "kept": {name: made[name].kept for name in PARTS},
        "quarantined": dict(ledger.total("quarantined").most_common()),
        "reasons": {rule: dict(counts.most_common(20)) for rule, counts in work.reasons.items()},
        "removed": {rule: n for rule, n in ledger.total("removed").items() if n},
        "repaired": dict(ledger.total("changed")),
        "stages": ledger.as_rows(),
        "weighted": made["train"].weighted,
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
    at = len(tokens.ids) - 1
    while at >= 0 and not tokens.train_on[at]:
        at -= 1
    return at >= 0 and tokens.ids[at] in chat.stop_ids


def _histogram(lengths: np.ndarray, limit: int, bins: int = 16) -> list[list[int]]:
    """[[from, to, rows], ...] over equal ranges up to the limit."""
    width = -(-limit // bins)
    counts = np.bincount(np.minimum((lengths[lengths > 0] - 1) // width, bins - 1), minlength=bins)
    return [[b * width + 1, min((b + 1) * width, limit), int(counts[b])] for b in range(bins)]


def _nothing_to_train(report: dict[str, Any], run: RunDir) -> DataError:
    reasons = [f"{n} {reason}" for reason, n in [*report["removed"].items(), *report["quarantined"].items()]]
    return DataError(
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


def kept_samples(run: RunDir, part: PartName) -> Iterator[Sample]:
    """The samples of a part of a prepared run, as they were said, one at a time."""
    path = run.data / f"{part}.jsonl"
    return (from_row(row) for row in read_jsonl(path)) if path.exists() else iter(())


def test_conversations(run: RunDir) -> list[Conversation]:
    """The test part of a prepared run, as it was said."""
    return [sample for sample in kept_samples(run, "test") if isinstance(sample, Conversation)]
