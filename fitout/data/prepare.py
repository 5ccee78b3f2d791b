"""From files to prepared data: the stages in order, each sample counted at every one.

    read -> convert -> clean -> duplicates -> benchmarks -> split -> augment -> render -> balance -> store
      |        |         |          |            |            |                    |          |
      quarantine     quarantine  removed      removed      removed     quarantine or removed  removed

Between cleaning and storing the samples are on disk (`rows`); the stages decide over numbers and keys. Every stage adds
up: what came and was made = what left + quarantined + removed by a named rule (`ledger`).
"""

from __future__ import annotations

import json
import shutil
import time
from array import array
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..chat.types import Conversation, Origin, Pair, Sample, Text, Tokens
from ..errors import DataError, RunExistsError, TemplateError
from ..files import explain_os_errors, fingerprint, read_json, read_jsonl, remove_leftovers, sha256_file, write_json
from ..rundir import RunDir
from . import BalanceSettings, DataSettings, SourceSettings
from . import Part as PartName
from .balance import cap_classes, distribute, give_shares, length_classes, seen_of, weigh
from .clean import FAULTS, NAMES, Cleaner, control_tokens, only_markers
from .content import content_key, digest, opening, phrasing
from .diversity import SAMPLED, measure
from .formats import Format, Refused, choose, convert
from .halfway import Halfway
from .ledger import Ledger, Stage
from .page import write_page
from .positions import CLASSES, PLACES, moved, place_of
from .readers import RawRow
from .repair import Repair, Repairs, accepted, identity, readmitted, rule_of, suggest, without_control
from .rows import Lines, Rows, as_row, from_row
from .sources import list_files, probe, read
from .split import HELD_OUT, PARTS, split
from .store import PartWriter, Prepared, copy_rows, forget_fingerprint, open_prepared, write_fingerprint
from .taxonomy import NONE, Classifier, Tasks, look_up, named, of_label, parsed
from .twins import Twins, certify_split, find_benchmarks, find_twins

if TYPE_CHECKING:
    from ..chat.render import Chat

PLACED = 20_000  # training samples whose key information is located, where only the report asks for it
RENDER, RENDER_BYTES = 250, 8 << 20  # conversations rendered at a time
EXAMPLES = 8  # training samples that the page shows
SHOWN = 6  # quarantined rows of a rule that the page shows
Progress = Callable[[str, int], None]  # the stage, and how many samples it has done


class _Work:
    """What the stages share: the ledger, the files of what was taken out, who watches."""

    PLAIN = ("reasons", "template_hint", "shown", "sources", "facts", "details", "parts", "source_of", "weights")

    def __init__(self, run: RunDir, repairs: Repairs, progress: Progress | None, halfway: Halfway,
                 values: dict[str, Any] | None = None):  # fmt: skip
        """`values`: what `state` gave, to go on from there."""
        self.run, self.repairs, self.halfway = run, repairs, halfway
        self.say: Progress = progress or (lambda stage, done: None)
        self.ledger = Ledger()
        self.quarantine, self.removed = (
            Lines(path, halfway.folder / path.name, held)
            for path, held in zip((run.quarantine, run.removed), values["held"] if values else (0, 0), strict=True)
        )
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)  # by rule
        self.template_hint = ""  # what to change where the chat template refused a sample
        self.shown: list[dict[str, Any]] = []
        self.sources: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}  # figures for the report
        self.details: dict[str, Any] = {}  # texts for the page; the report has none, so that it can go where no test
        # question may
        self.parts: dict[str, PartName] = {}  # files that a source's `split:` gives to a part
        self.source_of: dict[str, int] = {}  # the place of each file's source in the recipe
        self.weights: dict[str, float] = {}  # files whose training samples are seen more or less often
        if values:
            for name in self.PLAIN:
                setattr(self, name, values[name])
            self.reasons = defaultdict(Counter, {rule: Counter(counts) for rule, counts in self.reasons.items()})
            self.ledger.restore(values["ledger"])

    def state(self) -> dict[str, Any]:
        """All that is known here, with what was written on the disk."""
        held = [self.quarantine.held(), self.removed.held()]
        return {name: getattr(self, name) for name in self.PLAIN} | {"ledger": self.ledger.state(), "held": held}

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

    def remover(self, stage: Stage, rows: Rows) -> Callable[[int, str, str], None]:
        return lambda at, rule, reason: self.remove(stage, rows.origin(at), rule, reason)

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """A stage of the ledger and its seconds."""
        stage = self.ledger.begin(name)
        started = time.perf_counter()
        yield stage
        stage.seconds = time.perf_counter() - started
        self.say(name, stage.left)

    def done(self) -> None:
        for lines in (self.quarantine, self.removed):
            lines.done()

    def close(self) -> None:
        for lines in (self.quarantine, self.removed):
            lines.close()


def prepare(
    settings: DataSettings,
    chat: Chat,
    wants: str,
    run: RunDir,
    *,
    seed: int = 0,
    trained: str | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Prepared, dict[str, Any]]:
    """Prepares the data of a run, or takes what is there when every input has the same fingerprint; of an interrupted
    preparation of the same, the stages that it had done.

    `wants` is what the objective trains on: conversation or text; `trained` the fingerprint of data that something has
    been trained on, which no others may replace. Returns the prepared data and the data report. Raises DataError when a
    file cannot be read or nothing is left to train on, RunExistsError when the data are not those that were trained.
    """
    made_of = _fingerprint(settings, chat, wants, seed, run)
    ready = open_prepared(run.data)
    unfinished = run.data / ".unfinished"
    if trained not in (None, made_of):
        raise RunExistsError(
            "the data are no longer those that this run was trained on",
            where=str(run.data),
            harm="What would be split anew could ask the model questions that it was trained on.",
            hint="Put back what has changed (a source file, an accepted repair, the template, the tokenizer), or "
            "choose another name or --out.",
        )
    if ready and ready.fingerprint == made_of:
        shutil.rmtree(unfinished, ignore_errors=True)  # of other inputs, or of the moment after the last one
        return ready, read_json(run.data_report)
    with explain_os_errors(run.data, "write"):
        remove_leftovers(run.data)
        halfway = Halfway(unfinished, made_of)
        try:
            report = _stages(settings, chat, wants, run, seed, progress, say, halfway)
        except Exception:
            halfway.remove()
            raise
        write_fingerprint(run.data, made_of)  # last: without it the folder counts as unfinished
        halfway.remove()
    return Prepared(run.data, made_of), report


def _stages(
    settings: DataSettings, chat: Chat, wants: str, run: RunDir, seed: int, progress: Progress | None,
    say: Callable[[str], None], halfway: Halfway,
) -> dict[str, Any]:  # fmt: skip
    """The stages one after the other, from the last one that an interrupted preparation had done."""
    done, values, arrays = halfway.load() or ("", {}, {})
    work = _Work(run, accepted(repairs_file(settings, run)), progress, halfway, values.get("work"))
    path = halfway.folder / "rows.jsonl"
    if done:
        say(f"going on after the stage `{done}` of an interrupted preparation: {len(arrays['ends']):,} samples")
    with closing(work), Rows.restored(path, values["rows"], arrays) if done else Rows(path) as rows:
        if done:
            facts = Facts.restored(settings, values["facts"], arrays)
        else:
            facts = _read_and_clean(settings, chat, wants, work, rows)
            _remember("clean", work, rows, facts)
        if done in ("split", "render"):
            parts = {name: arrays[f"{name}-numbers"] for name in PARTS}
        else:
            twins = _deduplicate(rows, settings, work)
            here = _without_benchmarks(rows, twins.here, settings, work)
            parts = _split(rows, here, twins, facts, settings, seed, work)
            parts["train"] = _augment(parts["train"], rows, facts, settings, work)
            _remember("split", work, rows, facts, parts)
        forget_fingerprint(run.data)  # from here on what is there is replaced
        if done == "render":
            made = {name: Made.restored(run, name, arrays) for name in PARTS}
        else:
            made = _render(parts, rows, chat, settings, wants, facts, work)
            _remember("render", work, rows, facts, parts, made)
        return _finished(settings, chat, wants, run, seed, work, rows, facts, made)


def _remember(
    stage: str, work: _Work, rows: Rows, facts: Facts, parts: dict[PartName, np.ndarray] | None = None,
    made: dict[PartName, Made] | None = None,
) -> None:  # fmt: skip
    """Writes what is known after a stage, so that an interruption does not cost it."""
    of_rows, arrays = rows.state()
    of_facts, array_of_tasks = facts.state()
    arrays |= array_of_tasks
    for name, numbers in (parts or {}).items():
        arrays[f"{name}-numbers"] = numbers
    for name, part in (made or {}).items():
        arrays |= {f"{name}-{what}": array for what, array in part.state().items()}
    folder = work.halfway.folder
    files = [folder / "rows.jsonl", work.quarantine.staging, work.removed.staging]
    files += [part.path for part in (made or {}).values()]
    work.halfway.save(stage, {"work": work.state(), "rows": of_rows, "facts": of_facts}, arrays, files)


def _finished(
    settings: DataSettings, chat: Chat, wants: str, run: RunDir, seed: int, work: _Work, rows: Rows, facts: Facts,
    made: dict[PartName, Made],
) -> dict[str, Any]:  # fmt: skip
    _balance(made["train"], rows, facts, settings, seed, work)
    work.facts["diversity"] = _diversity(made["train"], rows, seed) if wants != "text" else None
    work.ledger.check()
    report = _report(settings, chat, wants, work, made, facts)
    for name in PARTS:
        _write_said(run.data / f"{name}.jsonl", made[name], rows, facts, told=name == "test")
    work.details["samples"] = _examples(made["train"], rows, facts, seed)
    work.details["seconds"] = {stage.name: round(stage.seconds, 2) for stage in work.ledger.stages if stage.seconds}
    write_json(run.data_report, report)
    if not report["parts"]["train"]["supervised"]:
        work.done()
        raise _nothing_to_train(report, run, work.template_hint)
    write_json(run.data_details, work.details)
    write_page(run.data_page, report, work.details, work.shown)
    work.done()  # last: an interruption before goes on from what they held
    return report


def _write_said(path: Path, made: Made, rows: Rows, facts: Facts, *, told: bool) -> None:
    """The samples of a part as they were said; with `told` also what scores are grouped by, in their meta: task,
    sub-task, position of the key information."""
    lines = Lines(path)
    placed = told and any(CLASSES[place] in PLACES for place in made.places)
    for number, at in enumerate(made.samples):
        if not told or not (facts.told or placed):
            lines.raw(rows.line(at))
            continue
        row = json.loads(rows.line(at))
        if facts.told:
            label = facts.tasks.labels[facts.task_of[at]]
            row["meta"] |= {"task": label[0]} | ({"subtask": named(label)} if len(label) > 1 else {})
        if placed:
            row["meta"]["position"] = CLASSES[made.places[number]]  # the test part has no copies
        lines.write(row)
    lines.done()


def _fingerprint(settings: DataSettings, chat: Chat, wants: str, seed: int, run: RunDir) -> str:
    """Everything that decides what the prepared data are: files by content, rules, repairs, template, tokenizer."""
    contents = []
    for source in settings.sources:
        files = list_files(source, Path()).files
        contents.append([sha256_file(path) for path, _ in files] if files else source.path)
    left_out: Any = {
        "packing": True,
        "repairs": True,
        "split_seed": True,
        "sources": {"__all__": {"path"}},
    }  # `seed` is the split's
    rules = settings.model_dump(mode="json", exclude=left_out)
    for path in settings.benchmarks.files if settings.benchmarks else ():
        contents.append([sha256_file(file) for file, _ in list_files(SourceSettings(path=path), Path()).files])
    return fingerprint(7, rules, contents, accepted(repairs_file(settings, run)), chat.fingerprint, wants, seed)


# read, convert, clean


@dataclass
class Facts:
    """What is known of each sample besides what it says: its task, and the group that must not be parted."""

    tasks: Tasks
    task_of: array[int] = field(default_factory=lambda: array("i"))
    group_of: list[bytes | None] = field(default_factory=list)
    placed: bool = False  # whether one says where its key information stands

    def add(self, sample: Sample, settings: DataSettings) -> None:
        prompt = ""
        if settings.tasks.rules:
            prompt = sample.text if isinstance(sample, Text) else "\n".join(m.content for m in opening(sample))
        self.task_of.append(self.tasks.number(self.tasks.read(sample, prompt)))
        if settings.split.group:
            value = look_up(sample.meta, settings.split.group)
            self.group_of.append(None if value is None else digest("group", value))
        if settings.position.field is not None and not self.placed:
            self.placed = look_up(sample.meta, settings.position.field) is not None

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `restored` needs."""
        groups = [group and group.hex() for group in self.group_of]
        values = {"labels": self.tasks.labels, "came_from": self.tasks.came_from, "groups": groups}
        return values, {"task_of": np.array(self.task_of)}

    @classmethod
    def restored(cls, settings: DataSettings, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> Facts:
        """As they were at `state`."""
        facts = cls(Tasks(settings.tasks), array("i", arrays["task_of"].tobytes()))
        for label in values["labels"]:
            facts.tasks.number(tuple(label))
        facts.tasks.came_from = Counter(values["came_from"])
        facts.group_of = [group and bytes.fromhex(group) for group in values["groups"]]
        return facts

    @property
    def told(self) -> bool:
        """Whether any sample has a task."""
        return any(label != NONE for label in self.tasks.labels)

    def labels(self, numbers: np.ndarray) -> list[tuple[str, ...]]:
        return [self.tasks.labels[self.task_of[at]] for at in numbers]


def _read_and_clean(settings: DataSettings, chat: Chat, wants: str, work: _Work, rows: Rows) -> Facts:
    """Every sample of the sources, cleaned, into `rows`; what is none goes to quarantine."""
    facts = Facts(Tasks(settings.tasks))
    cleaner = Cleaner(settings.clean, chat.control)
    reading, converting, cleaning = (work.ledger.begin(name, 0) for name in ("read", "convert", "clean"))
    started = time.perf_counter()
    turned = bytearray()  # keys of the pairs, the other way round
    for number, source in enumerate(settings.sources):
        plug = choose(probe(source, Path()), source.format, source.columns, where=source.path)
        before = (reading.came + converting.made.total(), reading.quarantined.total() + converting.quarantined.total())
        for sample in _converted(source, plug, reading, converting, work):
            _require_kind(sample, wants, source, plug.name)
            cleaned = _cleaned(sample, cleaner, cleaning, work)
            if cleaned is None:
                continue
            rows.add(cleaned)
            facts.add(cleaned, settings)
            if isinstance(cleaned, Pair):
                turned += content_key(replace(cleaned, chosen=cleaned.rejected, rejected=cleaned.chosen))
            work.source_of[sample.origin.file] = number
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
    if turned:
        work.facts["contradictions"] = int(np.isin(rows.keys, np.frombuffer(turned, "S16")).sum())
    work.facts["cleaning"], work.details["cleaning"] = cleaner.report(), dict(cleaner.examples)
    cleaning.seconds = time.perf_counter() - started
    if settings.tasks.suggest:
        work.facts["suggested"] = _suggest_tasks(rows, facts)
    if settings.tasks.field not in (None, "file") and len(rows) and not facts.tasks.came_from["column"]:
        raise _no_column(settings.tasks.field, "data.tasks.field", "No sample would have a task.")
    if settings.split.group and not any(facts.group_of):
        raise _no_column(settings.split.group, "data.split.group", "What belongs together could be parted.")
    if settings.position.field is not None and not facts.placed:
        harm = "Places would be measured everywhere, and no key passage moved."
        raise _no_column(settings.position.field, "data.position.field", harm)
    return facts


def _no_column(name: str | list[str] | None, where: str, harm: str) -> DataError:
    hint = "Name a column of the rows, as they are in the file."
    return DataError(f"no sample has the column {name!r}", where=where, harm=harm, hint=hint)


def _suggest_tasks(rows: Rows, facts: Facts) -> dict[str, Any]:
    """Samples without a task get the one the classifier is sure of."""
    tasks = facts.tasks
    none = tasks.number(NONE)
    labels = [-1 if number == none else number for number in facts.task_of]
    known = sum(label >= 0 for label in labels)
    if known < 20 or known == len(labels):
        return {"samples": 0, "of": len(labels) - known, "accuracy": None, "coverage": None}
    judge = Classifier(labels, rows.prompt, len(rows), len(tasks.labels))
    given = 0
    for at, label in enumerate(labels):
        said = judge.suggest(rows.prompt(at)) if label < 0 else None
        if said is not None:
            facts.task_of[at] = said
            given += 1
    tasks.came_from["suggestion"] += given
    tasks.came_from["nothing"] -= given
    return {
        "samples": given,
        "of": len(labels) - known,
        "accuracy": round(judge.accuracy, 4),
        "coverage": round(judge.coverage, 4),
    }


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


ANSWERS = ("chosen: ", "rejected: ")  # before a reason that is of one answer of a pair
OBJECTIVE_OF = {"text": "pretrain", "conversation": "sft", "preference pair": "orpo"}


def _require_kind(sample: Sample, wants: str, source: SourceSettings, name: str) -> None:
    kind = {Text: "text", Conversation: "conversation", Pair: "preference pair"}[type(sample)]
    if kind != wants:
        raise DataError(
            f"this source ({name}) holds {kind}s, and the objective trains on {wants}s",
            where=source.path,
            hint=f"Set objective: {{kind: {OBJECTIVE_OF[kind]}}}, or take another source.",
        )


def _cleaned(sample: Sample, cleaner: Cleaner, stage: Stage, work: _Work) -> Sample | None:
    """A sample after the rules; one that a rule takes out is removed, one whose text spells a control token of the
    tokenizer, or that has no answer left, is quarantined."""
    control = cleaner.control
    cleaned, changed, out = cleaner.clean(sample)
    if out:
        work.remove(stage, sample.origin, FAULTS[out[0]], out[1])
        return None
    reason = only_markers(cleaned) or control_tokens(cleaned, control)
    if reason:
        raw = as_row(sample)
        repair = work.repairs.get(identity(sample.origin, raw))
        again = next(readmitted(repair, sample.origin, _NO_FORMAT, None)) if repair else None
        if again is None or isinstance(again, Refused) or control_tokens(again, control) or only_markers(again):
            suggestion = without_control(cleaned, control)
            work.reject(
                stage, sample.origin, reason, raw, rule=rule_of(reason), form="sample", repair=suggestion
            )  # fmt: skip
            return None
        stage.changed["accepted repair"] += 1
        return again
    for key in changed:
        stage.changed[NAMES[key]] += 1
    return cleaned


_NO_FORMAT: Any = None  # a repaired sample is not converted again


# duplicates, benchmarks, split


def _deduplicate(rows: Rows, settings: DataSettings, work: _Work) -> Twins:
    """Of twins in given files of several parts the test file's stays, then the validation file's."""
    with work.stage("duplicates") as stage:
        turns = [*HELD_OUT, "train", None]
        of_file = np.array([turns.index(work.parts.get(file)) for file in rows.files], np.int8)
        turn = of_file[rows.file_of] if len(rows) else np.zeros(0, np.int8)
        twins = find_twins(rows, settings.deduplicate, turn, work.remover(stage, rows))
        stage.left = len(twins.here)
        work.facts["duplicates"], work.details["clusters"] = twins.figures, twins.clusters
    return twins


def _without_benchmarks(rows: Rows, here: np.ndarray, settings: DataSettings, work: _Work) -> np.ndarray:
    if settings.benchmarks is None:
        return here
    with work.stage("benchmarks") as stage:
        here, figures, shown = find_benchmarks(rows, here, settings.benchmarks, work.remover(stage, rows))
        stage.left = len(here)
        work.facts["benchmarks"], work.details["benchmarks"] = figures, shown
    return here


def _split(
    rows: Rows, here: np.ndarray, twins: Twins, facts: Facts, settings: DataSettings, seed: int, work: _Work
) -> dict[PartName, np.ndarray]:
    """The numbers of each part; training samples too near to a held-out one are taken out, whatever put them there."""
    with work.stage("split") as stage:
        if settings.split.group:
            owners: dict[bytes, int] = {}
            for at, group in enumerate(facts.group_of):
                if group is not None:
                    twins.groups.join(owners.setdefault(group, at), at)
        names = twins.groups.names(rows.prompts)
        fixed = [work.parts.get(file) for file in rows.files]
        divided = split(
            [names[at] for at in here],
            settings.split,
            seed,
            [fixed[file] for file in rows.file_of[here]],
            facts.labels(here) if facts.told else None,
        )
        parts: dict[PartName, np.ndarray] = {name: here[at] for name, at in divided.items()}
        held_out = {name: parts[name] for name in HELD_OUT if len(parts[name])}
        if twins.weights is not None and held_out and len(parts["train"]):
            too_near, figures, pairs = certify_split(
                rows, parts["train"], held_out, twins.weights, settings.deduplicate.similarity
            )
            remove = work.remover(stage, rows)
            for at in sorted(too_near):
                remove(at, "too near to a held-out sample", "its prompt is nearly one of validation or test")
            parts["train"] = np.array([at for at in parts["train"] if int(at) not in too_near], np.int64)
            work.facts["leakage"], work.details["nearest"] = figures, pairs
        stage.left = sum(map(len, parts.values()))
    return parts


def _augment(numbers: np.ndarray, rows: Rows, facts: Facts, settings: DataSettings, work: _Work) -> np.ndarray:
    """Training samples whose key passage is marked also come with it moved."""
    if not settings.position.augment or settings.position.field is None:
        return numbers
    with work.stage("augment") as stage:
        more = []
        for at in numbers:
            sample = rows.sample(int(at))
            for place, other in moved(sample, settings.position.field) if isinstance(sample, Conversation) else ():
                stage.made[f"key passage moved to the {place}"] += 1
                more.append(len(rows))
                rows.add(other)
                facts.task_of.append(facts.task_of[at])
        rows.written()
        stage.left = stage.came + len(more)
    return np.concatenate([numbers, np.array(more, np.int64)])


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
    asked: array[int] = field(default_factory=lambda: array("i"))  # tokens of each sample's prompt
    places: list[int] = field(default_factory=list)  # of each key information, in positions.CLASSES; -1: unread
    order: list[int] = field(default_factory=list)  # the sample of each group of rows, copies among them
    rows_of_order: list[int] = field(default_factory=list)
    weighted: dict[str, int] = field(default_factory=dict)  # training samples more or fewer an epoch, by file
    kept: int = 0

    PLAIN: ClassVar = ("samples", "rows", "groups", "lengths", "supervised", "no_end", "unknown", "asked", "places")

    def state(self) -> dict[str, np.ndarray]:
        """What rendering made, before anything is balanced."""
        return {name: np.array(getattr(self, name)) for name in self.PLAIN}

    @classmethod
    def restored(cls, run: RunDir, name: PartName, arrays: dict[str, np.ndarray]) -> Made:
        """As it was at `state`."""
        made = cls(run.data / f"{name}.arrow")
        for what in cls.PLAIN:
            value: Any = arrays[f"{name}-{what}"]
            empty = getattr(made, what)
            if isinstance(empty, list):
                value = value.tolist()
            elif isinstance(empty, array):
                value = array(empty.typecode, value.tobytes())
            setattr(made, what, value)
        made.each_once()
        return made

    def each_once(self) -> None:
        """Every sample that was rendered is kept, and seen once an epoch."""
        self.kept = len(self.samples)
        self.order, self.rows_of_order = list(self.samples), list(self.rows)


def _render(
    parts: dict[PartName, np.ndarray], rows: Rows, chat: Chat, settings: DataSettings, wants: str, facts: Facts,
    work: _Work,
) -> dict[PartName, Made]:  # fmt: skip
    """The samples as tokens, in the store; those that do not fit dealt with as `too_long` says."""
    made = {}
    with work.stage("render") as stage:
        for name in PARTS:
            made[name] = _render_part(name, parts[name], rows, chat, settings, wants, facts, stage, work)
            stage.left += made[name].kept
    return made


def _render_part(
    name: PartName, numbers: np.ndarray, rows: Rows, chat: Chat, settings: DataSettings, wants: str, facts: Facts,
    stage: Stage, work: _Work,
) -> Made:  # fmt: skip
    made = Made(work.run.data / f"{name}.arrow")
    unknown = _unknown_id(chat)
    every = 1 if name != "train" or any(b.by == "position" for b in settings.balance) else -(-len(numbers) // PLACED)
    group = 0
    names = [named(label) for label in facts.tasks.labels] if facts.told else []
    with PartWriter(made.path, names) as writer, closing(_tokenised(numbers, rows, chat, wants)) as batches:
        done = 0
        for batch in batches:
            for at, sample, rendered in batch:
                if isinstance(rendered, TemplateError):
                    work.reject(stage, sample.origin, rendered.message, as_row(sample), rule="template", form="sample")
                    work.template_hint = rendered.hint
                    continue
                if not isinstance(sample, Text) and _left_out(sample, chat, stage, work):
                    continue
                fitted = _cut_text(rendered, settings) if wants == "text" else _fit(sample, rendered, settings, stage,
                                                                                    work)  # fmt: skip
                if not fitted:
                    continue
                made.samples.append(int(at))
                made.rows.append(len(fitted))
                made.asked.append(fitted[0].train_on.index(1))
                told = wants != "text" and len(made.samples) % every == 0
                made.places.append(CLASSES.index(place_of(sample, settings.position.field)) if told else -1)
                for tokens in fitted:  # a conversation's samples are shuffled together, a text's blocks apart
                    rejected = isinstance(sample, Pair) and tokens is fitted[1]
                    writer.add(group, tokens, facts.task_of[at] if facts.told else -1, rejected=rejected)
                    made.groups.append(group)
                    made.no_end.append(wants != "text" and not _ends_trained(tokens, chat))
                    made.unknown.append(tokens.ids.count(unknown) if unknown is not None else 0)
                    group += wants == "text"
                group += wants != "text"
            done += len(batch)
            work.say(f"render {name}", done)
    made.each_once()
    made.lengths, made.supervised = np.array(writer.lengths), np.array(writer.supervised)
    return made


def _left_out(sample: Conversation | Pair, chat: Chat, stage: Stage, work: _Work) -> bool:
    """Counts what a sample has that the template does not write; True when that leaves an answer without a word, which
    goes to quarantine."""
    whole = {"": sample} if isinstance(sample, Conversation) else dict(zip(ANSWERS, sample.answered, strict=True))
    lost = {what for one in whole.values() for what in chat.unwritten(one.messages, sample.tools)}
    for what in sorted(lost):
        counts = work.facts.setdefault("unwritten", {})
        counts[what] = counts.get(what, 0) + 1
    if "tool calls" in lost:
        turns = [(which, at, one) for which, talk in whole.items() for at, one in enumerate(talk.messages, 1)]
        for which, number, one in turns:
            if one.train and one.extra.get("tool_calls") and not one.content.strip():
                reason = f"{which}turn {number}: an answer of tool calls alone, which the chat template does not write"
                work.reject(stage, sample.origin, reason, as_row(sample), rule="template", form="sample")
                return True
    return False


def _tokenised(
    numbers: np.ndarray, rows: Rows, chat: Chat, wants: str
) -> Generator[list[tuple[int, Sample, list[Tokens] | TemplateError]]]:
    """(number, sample, its tokens) in batches; a pair's are those of the chosen answer, then of the rejected one."""
    chunks = list(rows.chunks(numbers, RENDER, RENDER_BYTES))
    taken: deque[list[Any]] = deque()  # whose tokens are not there yet

    def batches() -> Iterator[list[Any]]:
        for chunk in chunks:
            taken.append([rows.sample(at) for at in chunk])
            yield taken[-1]

    made: Generator[Any]
    if wants == "text":
        made = ([[tokens] for tokens in chat.text_ids(batch)] for batch in batches())
    elif wants == "preference pair":
        answered = ([one for pair in batch for one in pair.answered] for batch in batches())
        made = (_two_by_two(found) for found in chat.render_all(answered, 2 * len(numbers)))
    else:
        made = chat.render_all(batches(), len(numbers))
    with closing(made):
        for chunk, tokens in zip(chunks, made, strict=True):
            yield list(zip(map(int, chunk), taken.popleft(), tokens, strict=True))


def _two_by_two(found: list[list[Tokens] | TemplateError]) -> list[list[Tokens] | TemplateError]:
    """Of conversations that are pairs, one after the other: the tokens of both, or why one of them has none."""
    return [
        chosen if isinstance(chosen, TemplateError) else rejected if isinstance(rejected, TemplateError)
        else [*chosen, *rejected]
        for chosen, rejected in zip(found[::2], found[1::2], strict=True)
    ]  # fmt: skip


def _fit(sample: Sample, group: list[Tokens], settings: DataSettings, stage: Stage, work: _Work) -> list[Tokens]:
    """A conversation's samples under `max_length`, or both of a pair; [] when it is removed or quarantined."""
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
    reason = "" if any(tokens.supervised for tokens in group) else "no token is supervised"
    if isinstance(sample, Pair):
        if not all(tokens.supervised for tokens in group):
            reason = "no token of one of the answers is supervised"
        elif group[0].ids == group[1].ids:
            reason = "the chosen and the rejected answer are the same tokens"
    if reason:
        reason += " after the cut" if longest > limit else ""
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


# balance


def _balance(made: Made, rows: Rows, facts: Facts, settings: DataSettings, seed: int, work: _Work) -> None:
    """How often each training sample is seen in an epoch: caps, distributions, weights, shares, in this order."""
    with work.stage("balance") as stage:
        stage.left = stage.came
        shares = {source: one.share for source, one in enumerate(settings.sources) if one.share is not None}
        tasks = settings.tasks
        if not (work.weights or shares or tasks.weights or tasks.caps or settings.balance) or not made.samples:
            return
        numbers = np.array(made.samples)
        files = rows.file_of[numbers]
        keys = rows.keys[numbers]
        names = [f"{bytes(key).hex()} {rows.origin(at)}" for key, at in zip(keys, made.samples, strict=True)]
        labels = facts.labels(numbers)
        times = np.ones(len(numbers), np.int64)
        known = {name for label in facts.tasks.labels for name in (label[0], named(label))}
        if strange := sorted({*tasks.weights, *tasks.caps} - known):
            raise DataError(
                f"no sample has the task {', '.join(map(repr, strange))}",
                where="data.tasks",
                harm="Its weight or cap would have no effect.",
                hint=f"There are: {', '.join(sorted(known))}.",
            )

        def settle(now: np.ndarray, rule: str, why: str) -> np.ndarray:
            for at in numbers[(times > 0) & (now == 0)]:
                work.remove(stage, rows.origin(at), rule, why)
            return now

        for level in (1, 2):  # a task's cap, then its sub-tasks'
            at_level = [named(label[:level]) if len(label) >= level else None for label in labels]
            most = {name: cap for name, cap in tasks.caps.items() if len(parsed(name)) == level}
            times = settle(cap_classes(times, at_level, most, names, seed), "over the cap of its task", str(most))
        for number, one in enumerate(settings.balance):
            times = settle(*_balanced(times, one, made, numbers, rows, names, seed, work, number))
        weights = np.array([work.weights.get(file, 1.0) for file in rows.files])[files]
        weights = weights * np.array([of_label(tasks.weights, label) or 1.0 for label in labels])
        times = settle(weigh(times, weights, names, seed), "left out by weight", "its weight is below one")
        if shares:
            source_of = np.array([work.source_of.get(file, -1) for file in rows.files])[files]
            given = give_shares(times, source_of, shares, names, seed)
            times = settle(given, "left out by its source's share", "the share needs fewer rows than the source has")
        for file, name in enumerate(rows.files):
            change = int((times[files == file] - 1).sum())
            if change:
                made.weighted[name] = change
        if (times != 1).any():
            _take(made, times)
        stage.left -= stage.removed.total()


def _balanced(
    times: np.ndarray, one: BalanceSettings, made: Made, numbers: np.ndarray, rows: Rows, names: list[str], seed: int,
    work: _Work, number: int,
) -> tuple[np.ndarray, str, str]:  # fmt: skip
    """(times, rule, reason) after one entry of `balance`."""
    order: list[str]
    if one.by == "length":
        starts = np.concatenate([[0], np.cumsum(made.rows)])[:-1].astype(np.int64)
        classes, order = length_classes(np.maximum.reduceat(made.lengths, starts), one.edges)
    elif one.by == "position":
        classes, order = [CLASSES[place] for place in made.places], list(CLASSES)
    else:
        classes = [phrasing(rows.prompt(int(at))) for at in numbers]
        order = [name for name, _ in Counter(classes).most_common(12)]
    unknown = sorted(set(one.to) - set(order)) if isinstance(one.to, dict) else []
    if unknown:
        raise DataError(
            f"there is no class {', '.join(map(repr, unknown))} of {one.by}",
            where=f"data.balance.{number}.to",
            harm="The samples would not be spread as asked.",
            hint=f"There are: {', '.join(order)}.",
        )
    before = seen_of(times, classes)
    if one.cap is not None:
        most = round(one.cap * len(numbers)) if one.cap < 1 else int(one.cap)
        now = cap_classes(times, classes, dict.fromkeys(before, max(1, most)), names, seed)
    else:
        now = distribute(times, classes, one, names, seed)
    after = seen_of(now, classes)
    figures = [{"class": name, "before": before[name], "after": after[name]} for name in order if before[name]]
    work.facts.setdefault("balance", []).append({"by": one.by, "how": one.how, "classes": figures})
    return now, f"balanced by {one.by}", f"its class has more than data.balance.{number} asks for"


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
    made.order = [number for number, count in zip(made.samples, times, strict=True) for _ in range(count)]
    made.rows_of_order = [rows for rows, count in zip(made.rows, times, strict=True) for _ in range(count)]
    made.asked = array("i", [asked for asked, count in zip(made.asked, times, strict=True) for _ in range(count)])
    made.places = [place for place, count in zip(made.places, times, strict=True) for _ in range(count)]
    made.samples = [number for number, count in zip(made.samples, times, strict=True) if count]
    made.rows = [count for count, seen in zip(made.rows, times, strict=True) if seen]
    made.kept = len(made.samples)


# what is told


def _report(
    settings: DataSettings, chat: Chat, wants: str, work: _Work, made: dict[PartName, Made], facts: Facts
) -> dict[str, Any]:  # fmt: skip
    """Everything the data report and the screen show, as plain values."""
    ledger = work.ledger
    parts = {}
    for name in PARTS:
        part = made[name]
        parts[name] = {
            "samples": len(part.order),  # an epoch's: with the copies that weights make
            "rows": len(part.lengths),  # more than samples where a template rewrites history or a text is cut in blocks
            "tokens": int(part.lengths.sum()),
            "supervised": int(part.supervised.sum()),
            "no_end": sum(part.no_end),
            "unknown": sum(part.unknown),
            "lengths": _histogram(part.lengths, settings.max_length),
            "prompts": _spread(np.array(part.asked, np.int64)),
            "answers": _spread(part.supervised),
            "places": {
                name: count for at, name in enumerate(CLASSES) if (count := sum(place == at for place in part.places))
            },
        }
    return {
        "samples": ledger.samples,
        "kept": {name: made[name].kept for name in PARTS},
        "quarantined": dict(ledger.total("quarantined").most_common()),
        "reasons": {rule: dict(counts.most_common(20)) for rule, counts in work.reasons.items()},
        "removed": {rule: n for rule, n in ledger.total("removed").items() if n},
        "repaired": dict(ledger.total("changed")),
        "stages": ledger.as_rows(),
        **work.facts,
        "tasks": _task_grid(made, facts),
        "weighted": made["train"].weighted,
        "sources": work.sources,
        "parts": parts,
        "max_length": settings.max_length,
        "too_long": settings.too_long,
        "template": chat.template_name,
        "notes": [
            *chat.notes,
            *([work.template_hint] if work.template_hint else []),
            *(
                [f"{turned:,} pairs prefer what another one rejects: the same answers to the same prompt, turned round"]
                if (turned := work.facts.get("contradictions", 0))
                else []
            ),
            *(
                f"the {what} of {count:,} sample{'s' * (count > 1)} are not written by this chat template: the model "
                "never sees them"
                for what, count in work.facts.get("unwritten", {}).items()
            ),
        ],
    }


def _task_grid(made: dict[PartName, Made], facts: Facts) -> dict[str, Any] | None:
    """Counts, tokens and lengths of every task and sub-task in every part; None where no sample has a task."""
    if not facts.told:
        return None
    grid = []
    for number, label in enumerate(facts.tasks.labels):
        line: dict[str, Any] = {"task": label[0], "subtask": label[1] if len(label) > 1 else "", "number": number}
        for name in PARTS:
            part = made[name]
            of_rows = np.repeat(np.array([facts.task_of[at] for at in part.order], np.int32), part.rows_of_order)
            mine = of_rows == number
            lengths = part.lengths[mine]
            line[name] = {
                "samples": sum(facts.task_of[at] == number for at in part.samples),
                "rows": int(mine.sum()),
                "tokens": int(lengths.sum()),
                "supervised": int(part.supervised[mine].sum()),
                "median": int(np.median(lengths)) if len(lengths) else 0,
            }
        grid.append(line)
    grid.sort(key=lambda line: (line["task"], line["subtask"]))
    return {"grid": grid, "came_from": {what: n for what, n in facts.tasks.came_from.items() if n}}


def _diversity(made: Made, rows: Rows, seed: int) -> dict[str, Any] | None:
    """Of at most diversity.SAMPLED training prompts, chosen by seed and content."""
    if not made.samples:
        return None
    numbers = made.samples
    if len(numbers) > SAMPLED:
        keys = rows.prompts
        numbers = sorted(numbers, key=lambda at: digest(seed, bytes(keys[at]).hex()))[:SAMPLED]
    return {"prompts": len(made.samples), **measure([rows.prompt(at) for at in numbers], seed)}


def _examples(made: Made, rows: Rows, facts: Facts, seed: int) -> list[dict[str, Any]]:
    """A few training samples to look at, chosen by seed and content."""
    keys = rows.keys
    chosen = sorted(
        made.samples[:: max(1, len(made.samples) // 500)], key=lambda at: digest(seed, bytes(keys[at]).hex())
    )
    shown = []
    for at in chosen[:EXAMPLES]:
        row = json.loads(rows.line(at))
        turns = [(m["role"], m["content"][:1500]) for m in row.get("messages", row.get("prompt", ()))]
        turns += [(answer, row[answer]["content"][:1500]) for answer in ("chosen", "rejected") if answer in row]
        if "text" in row:
            turns = [("text", row["text"][:1500])]
        task = named(facts.tasks.labels[facts.task_of[at]]) if facts.told else ""
        shown.append({"where": str(rows.origin(at)), "task": task, "turns": turns})
    return shown


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


def _spread(lengths: np.ndarray) -> dict[str, Any]:
    """Median, 95th percentile, longest, and a histogram over doublings: [[from, to, samples], ...]."""
    if not len(lengths):
        return {"median": 0, "high": 0, "longest": 0, "histogram": []}
    edges = [0, 8]
    while edges[-1] <= lengths.max():
        edges.append(2 * edges[-1])
    counts, _ = np.histogram(lengths, edges)
    return {
        "median": int(np.median(lengths)),
        "high": int(np.quantile(lengths, 0.95, method="higher")),
        "longest": int(lengths.max()),
        "histogram": [[a, b - 1, int(n)] for a, b, n in zip(edges, edges[1:], counts, strict=False)],
    }


def _nothing_to_train(report: dict[str, Any], run: RunDir, template_hint: str) -> DataError:
    reasons = [f"{n} {reason}" for reason, n in report["removed"].items()]
    for rule, n in report["quarantined"].items():
        most, count = max(report["reasons"][rule].items(), key=lambda item: item[1])
        reasons.append(f"{n} {rule} ({'' if count == n else 'most often: '}{most})")
    return DataError(
        f"no token is left to train on: of {report['samples']} samples "
        + ("; ".join(reasons) or "none is for training"),
        where=str(run.data),
        harm="Training would run and change nothing.",
        hint=template_hint
        or "See quarantine.jsonl and removed.jsonl; raise data.max_length, or change data.split or the sources' "
        "`split:`.",
    )


def summary(report: dict[str, Any]) -> str:
    """One line that adds up: samples = kept + quarantined + removed."""
    kept = sum(report["kept"].values())
    quarantined, removed = sum(report["quarantined"].values()), sum(report["removed"].values())
    parts = ", ".join(f"{report['kept'][name]:,} {name}" for name in PARTS)
    return (
        f"{report['samples']:,} samples = {kept:,} kept ({parts}) + {quarantined:,} quarantined + {removed:,} removed"
    )


def repairs_file(settings: DataSettings, run: RunDir) -> Path:
    return Path(settings.repairs) if settings.repairs else run.repairs


def kept_samples(run: RunDir, part: PartName) -> Iterator[Sample]:
    """The samples of a part of a prepared run, as they were said, one at a time."""
    path = run.data / f"{part}.jsonl"
    return (from_row(row) for row in read_jsonl(path)) if path.exists() else iter(())


def test_samples(run: RunDir) -> list[Conversation | Pair]:
    """The test part of a prepared run, as it was said."""
    return [sample for sample in kept_samples(run, "test") if not isinstance(sample, Text)]
