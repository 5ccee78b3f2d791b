"""What `fitout init` chooses, key by key, each with its reason. The memory is the planner's arithmetic."""

from __future__ import annotations

import json
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import RequestError
from ..model import EMBEDDED
from ..model.methods import METHODS
from ..objectives import OrpoSettings
from .look import LOOKED_AT, Base, Lengths, Seen, block, measure

if TYPE_CHECKING:
    from ..plan.planner import Plan, Row

MB = 2**20
AIMS = {
    "form": "answers in a fixed form, short enough to be right or wrong",
    "chat": "style and chat: longer answers, where the manner counts",
    "knowledge": "new knowledge: facts that the base does not have",
    "labels": "classification: one of a set of labels",
    "text": "go on with plain text (pretraining on your own texts)",
}
KNOWLEDGE = (
    "Fine-tuning teaches form and manner well and facts badly: new facts are learned slowly, and while they are, "
    "invention grows (Gekhman et al., arXiv 2405.05904). Facts that change, or that must be right, belong into the "
    "prompt (retrieval). What helps here: the same fact asked in many ways, and plain texts trained on first."
)
OBJECTIVES = {
    "sft": "only the answers are trained, the questions are context",
    "pretrain": "every token is trained",
    "orpo": "learns the chosen answers and prefers them; dpo and simpo are for a model that can answer already",
}
KINDS = {one.model_fields["kind"].default: one for one in METHODS}
RANKS = {"form": 8, "labels": 8, "chat": 16, "knowledge": 32, "text": 32}
SMALL_RATES = {"full": 3e-4, "lora": 3e-3, "dora": 3e-3, "qlora": 3e-3, "adapter": 1e-2, "sparse": 3e-3}
STEPS = 200  # of training that `epochs` aims at, between 3 and 8 passes
MANY = 20_000  # samples from which a tenth for testing is more than scores need
SHORT = 60  # characters of a middling answer that is still a fixed form


@dataclass(frozen=True)
class Key:
    """One line of a recipe: `section.name: value` with the reason beside it. `value` is YAML on one line."""

    section: str
    name: str
    value: str
    why: str = ""


@dataclass(frozen=True)
class Wishes:
    """What was asked for: looked at, but nothing chosen. `machine` and `method` are None for the planner's choice."""

    seen: Seen
    base: Base
    machine: str | None = None
    aim: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Advice:
    """The keys of the recipe, and lines on what they go by."""

    keys: tuple[Key, ...]
    about: tuple[str, ...]
    method: str
    why: str
    aim: str
    fits: bool | None  # None: not known


def suggested_aim(seen: Seen) -> str:
    """What the data look made for."""
    if seen.plain:
        return "text"
    if seen.labels:
        return "labels"
    return "form" if seen.answer_characters <= SHORT else "chat"


def check(wishes: Wishes) -> None:
    """Raises RequestError for an aim or a method that the data do not allow."""
    seen, aim = wishes.seen, wishes.aim
    if wishes.method and wishes.method not in (*KINDS, "auto"):
        raise RequestError(f"--method {wishes.method!r} is not one of auto, {', '.join(KINDS)}")
    if aim is None:
        return
    if aim not in AIMS:
        raise RequestError(f"--aim {aim!r} is not one of {', '.join(AIMS)}")
    if (aim == "text") != seen.plain:
        want = "texts, which have no answers" if seen.plain else f"conversations ({seen.form}), not plain text"
        raise RequestError(
            f"--aim {aim} does not go with these data: they are {want}",
            where=seen.path,
            hint="Leave --aim out: it is taken from the data.",
        )
    if aim == "labels" and not seen.labels:
        raise RequestError(
            "these answers are no label set: too many differ, or too few come again",
            where=seen.path,
            hint="Take --aim form, or set evaluate.choices yourself.",
        )


def advise(wishes: Wishes) -> Advice:
    """Every key with its reason. Raises RequestError for wishes that do not go together."""
    check(wishes)
    seen, base = wishes.seen, wishes.base
    aim = wishes.aim or suggested_aim(seen)
    lengths = measure(seen, base)
    before = [*_data(seen, base, lengths), *_length_of_training(seen, lengths)]
    plan, told = _plan(wishes, before, aim, lengths)
    kind, why, fits = _method(wishes, plan)
    row = next((r for r in plan.rows if (r.kind, r.precision) == (kind, plan.chosen.precision)), None) if plan else None
    keys = [
        Key("model", "base", _text(base.name), base.note),
        *(key for key in before if key.section == "data"),
        *_adapted(kind, why, aim),
        Key("objective", "kind", seen.objective, OBJECTIVES[seen.objective]),
        *(key for key in before if key.section == "train"),
        *_rates(kind, seen, base, plan, row),
        *_evaluation(seen, base, aim, lengths, plan),
        _export(kind),
    ]  # fmt: skip
    about = [
        f"Data: {seen.path.rpartition('/')[2]}, {seen.told()}.",
        f"Model: {base.name}: {base.note}.",
        f"Aim: {AIMS[aim]}" + ("." if wishes.aim else " (by the look of the data; --aim says otherwise)."),
        *([KNOWLEDGE] if aim == "knowledge" else []),
        *told,
    ]
    return Advice(tuple(keys), tuple(about), kind, why, aim, fits)


# data and the length of training


def _data(seen: Seen, base: Base, lengths: Lengths | None) -> Iterator[Key]:
    yield Key("data", "sources", f"[{{path: {_text(seen.path)}}}]",
              f"read as {seen.form}; {{path: ..., split: test}} makes a file of its own the test part")  # fmt: skip
    shares, why = _split(seen)
    train, validation, test = shares
    yield Key("data", "split", f"{{train: {train:g}, validation: {validation:g}, test: {test:g}}}", why)
    if lengths is None:
        limit = block(base.shape.context) if base.shape else 1024
        yield Key("data", "max_length", str(limit), "tokens; a guess: the tokenizer is not here to count with. What is "
                  "longer is dropped and counted")  # fmt: skip
    elif seen.plain:
        limit = block(base.shape.context if base.shape else None)
        yield Key("data", "max_length", str(limit), "texts are cut into blocks of so many tokens; nothing is lost")
    else:
        yield _max_length(seen, base, lengths)


def _max_length(seen: Seen, base: Base, lengths: Lengths) -> Key:
    context = base.shape.context if base.shape and base.shape.context else 2**31
    part_seen = seen.samples + seen.bad > LOOKED_AT
    of = f"of the first {lengths.samples:,} samples" if part_seen else f"of {lengths.samples:,} samples"
    outlier = lengths.longest > 4 * lengths.most and lengths.longest > 1024  # a few giants would only cost memory
    need = lengths.most if outlier else lengths.longest
    limit = min(_up(need * (1.25 if part_seen else 1.0), 64), context)
    why = f"tokens; the longest {of} has {lengths.longest:,}, 99 % have at most {lengths.most:,}"
    why += ", and some room for those not looked at" if part_seen else ""
    over = f", {lengths.too_long:,} more than the model's {context:,} positions" if lengths.too_long else ""
    return Key("data", "max_length", str(limit), f"{why}{over}; what is longer is dropped and counted")


def _split(seen: Seen) -> tuple[tuple[float, float, float], str]:
    if seen.plain:
        return (0.9, 0.1, 0), "texts ask no questions: the loss on the validation part is the score"
    if seen.samples >= MANY:
        share = max(0.01, round(1000 / seen.samples, 2))
        return (round(1 - 2 * share, 2), share, share), (
            f"of {seen.samples:,} samples {share * seen.samples:,.0f} for testing: enough for intervals of 3 points"
        )
    test = max(1, round(0.1 * seen.samples))
    wide = 100 * 1.96 * (0.25 / test) ** 0.5
    short = "; that is wide: a test file of your own would say more" if wide > 15 else ""
    return (0.8, 0.1, 0.1), f"{test:,} test questions: a score near 50 has an interval of +-{wide:.0f} points{short}"


def _length_of_training(seen: Seen, lengths: Lengths | None) -> Iterator[Key]:
    (share, _, _), _ = _split(seen)
    rows = seen.samples * (lengths.rows / max(1, lengths.samples) if lengths else 1)
    train = max(1, round(share * rows))
    size = next((size for size in (16, 8) if train / size >= 20), 4)
    steps = ceil(train / size)
    epochs = max(3, min(8, round(STEPS / steps)))
    what = "blocks" if seen.plain else "pairs" if seen.pairs else "samples"
    why = f"about {epochs * steps:,} steps; the weights kept are the best on the validation part, not the last"
    yield Key("train", "epochs", str(epochs), why)
    less = " (16 would make too few steps)" if size < 16 else ""
    yield Key("train", "batch_size", str(size),
              f"{what} a step{less}: about {steps:,} steps an epoch; micro-batches size themselves")  # fmt: skip


# the method


def _plan(wishes: Wishes, keys: list[Key], aim: str, lengths: Lengths | None) -> tuple[Plan | None, list[str]]:
    """All methods on the machine, and lines on what fits there; None where the model's shape is not known."""
    from .. import verbs
    from ..config import build
    from ..plan import duration

    base = wishes.base
    if base.shape is None:
        return None, [f"No plan: {base.note}. `fitout plan` says what fits once it can."]
    kind = _named(wishes) or "lora"
    drawn = [*keys, *_adapted(kind, "", aim), Key("objective", "kind", wishes.seen.objective)]
    raw: dict[str, Any] = yaml.safe_load(draw("plan", drawn))
    raw["model"] = {"base": base.folder}
    guess: dict[str, Any] = (
        {} if lengths else {"length": max(2, round(wishes.seen.characters / 3)), "samples": wishes.seen.samples}
    )
    with tempfile.TemporaryDirectory(prefix="fitout-init-") as folder:
        plan = verbs.plan(build(raw), device=wishes.machine, out=folder, **guess)
    machine, precision = plan.machine, plan.chosen.precision
    parts = [
        f"{row.kind} {row.memory.peak / MB:,.0f} MB"
        + ("" if row.fits else " (with smaller micro-batches)" if row.change else " (does not fit)")
        + f", {duration(row.total_seconds)}"
        for row in plan.rows
        if row.precision == precision and row.stage == 0
    ]
    how = "predicted from a measured speed" if machine.measured else "by a maker's data sheet, not measured here"
    lengths_known = "" if lengths else "; lengths are guessed at 3 characters a token"
    return plan, [
        f"Machine: {machine.name}, {machine.memory / MB:,.0f} MB free. Memory and time in {precision}, {how}"
        f"{lengths_known}: {'; '.join(parts)}."
    ]


def _named(wishes: Wishes) -> str | None:
    return None if wishes.method == "auto" else wishes.method


def _method(wishes: Wishes, plan: Plan | None) -> tuple[str, str, bool | None]:
    """(kind, why, whether it fits)."""
    from ..plan.planner import choose

    asked = _named(wishes)
    if plan is None:
        return (
            asked or "lora",
            "as asked for" if asked else "a low-rank adapter: little memory, merges, every engine",
            None,
        )
    if asked:
        row = plan.chosen
        return asked, f"as asked for; {_needs(row, plan)}", row.can_run
    try:
        kind, reasons = choose(plan, plan.chosen.precision)
    except RequestError as error:
        return "qlora", f"the lightest, and even it {error.message.partition(': ')[2] or error.message}", False
    lacks = "; it needs `pip install 'fitout[qlora]'`" if kind == "qlora" and not find_spec("bitsandbytes") else ""
    return kind, "; ".join(reasons) + lacks, True


def _needs(row: Row, plan: Plan) -> str:
    need, have = row.lightest.peak / MB, plan.machine.memory / MB
    return f"it needs {need:,.0f} of {have:,.0f} MB" + ("" if row.can_run else " and does not fit")


def _adapted(kind: str, why: str, aim: str) -> Iterator[Key]:
    """The method's keys, with reasons for those that are chosen here."""
    yield Key("method", "kind", kind, why)
    if kind in ("lora", "dora", "qlora"):
        rank = RANKS[aim]
        size = {8: "a form is a small change, and 8 is enough for one", 16: "some room for manner"}
        yield Key(
            "method", "rank", str(rank), size.get(rank, "more is to be stored than a form; larger costs memory only")
        )
        yield Key("method", "alpha", str(2 * rank), "twice the rank: the path is scaled by alpha / rank")
        yield Key("method", "targets", "all-linear", "attention alone learns less (arXiv 2305.14314, 2405.09673)")
    elif kind == "adapter":
        yield Key(
            "method", "style", "houlsby", "two networks a layer; did better than pfeiffer's one (docs/methods.md)"
        )
        yield Key("method", "reduction", "16", "their width is the model's divided by this")
    elif kind == "sparse":
        yield Key("method", "density", "0.05", "share of the entries; 5 % did better than 1 % (docs/methods.md)")
        yield Key("method", "select", "gradient", "those whose gradients are largest on the first steps")


def _rates(kind: str, seen: Seen, base: Base, plan: Plan | None, row: Row | None) -> Iterator[Key]:
    if base.small:
        lr, why = SMALL_RATES[kind], "small models take large rates: about what did best on the embedded model"
    else:
        lr = KINDS[kind]().default_lr
        why = {"full": "the usual rate for all weights"}.get(kind, "the usual rate; ten times that of full fine-tuning")
        if kind in ("adapter", "sparse"):
            why = "a beginning"
    if seen.pairs:
        lr, why = lr * OrpoSettings.pace, "a smaller one than to learn answers alone, as in the paper"
    yield Key("train", "lr", f"{lr:.1e}", f"{why}; `fitout compare` tries others beside it")
    here = f"; here {plan.chosen.precision}" if plan else ""
    yield Key("train", "precision", "auto", f"bf16 where it pays, else fp32{here}")
    for key, value in (row.change if row else {}).items():
        need = f"{row.memory.peak / MB:,.0f} MB without it, {row.lightest.peak / MB:,.0f} with" if row else ""
        yield Key("train", key.removeprefix("train."), str(value).lower(), need)


# evaluation and export


def _evaluation(seen: Seen, base: Base, aim: str, lengths: Lengths | None, plan: Plan | None) -> Iterator[Key]:
    if aim == "labels":
        yield Key("evaluate", "choices", "[" + ", ".join(map(_text, seen.labels)) + "]",
                  "all answers in the data; the label that the model finds most likely is its answer")  # fmt: skip
        yield Key(
            "evaluate", "metrics", "[accuracy]", "with macro-F1, which counts rare labels as much as frequent ones"
        )
    elif aim != "text":
        metrics, why = {
            "form": ("[exact_match, f1]", "an answer is right or wrong; f1 says how near"),
            "chat": ("[rouge, bleu]", "overlap with one reference says little about manner: read some predictions too"),
            "knowledge": ("[exact_match, f1, rouge]", "whether the facts are there, in whatever words"),
        }[aim]
        yield Key("evaluate", "metrics", metrics, why)
        if lengths:
            most = min(1024, max(16, _up(1.5 * lengths.answers, 16)))
            yield Key("evaluate", "max_new_tokens", str(most), f"99 % of the answers have at most {lengths.answers:,}")
        slow = plan is not None and plan.machine.kind == "cpu" and plan.shape.parameters > 50e6
        if slow and seen.samples > 1000:
            yield Key("evaluate", "limit", "100", "test questions; generating on a CPU takes long")
    if base.name == EMBEDDED:
        yield Key("evaluate", "retention", "default", "the probes that come with this base: what is forgotten shows")
    else:
        yield Key("evaluate", "retention", "default", "this base brings no probes, so forgetting is not measured: "
                  "give a .jsonl of {prompt, answer} or a text file of what must stay")  # fmt: skip


def _export(kind: str) -> Key:
    if kind == "adapter":
        return Key("export", "merge", "false", "bottlenecks are nonlinear: served as base and adapter (`fitout serve`)")
    what = (
        "the trained model is plain already"
        if kind == "full"
        else "a plain Hugging Face folder, checked against the adapter"
    )
    return Key("export", "merge", "true", what)


# drawing


def draw(name: str, keys: Iterable[Key]) -> str:
    """The recipe as YAML, each key with its reason: beside it where that is short, else above it."""
    lines = [f"name: {name}"]
    sections: dict[str, list[Key]] = {}
    for key in keys:
        sections.setdefault(key.section, []).append(key)
    for section, inside in sections.items():
        lines += ["", f"{section}:"]
        width = max((len(_plain(key)) for key in inside if len(_plain(key)) + len(key.why) < 110), default=0)
        for key in inside:
            lines += _drawn(key, width)
    return "\n".join(lines) + "\n"


def _plain(key: Key) -> str:
    return f"  {key.name}: {key.value}"


def _drawn(key: Key, width: int) -> list[str]:
    if not key.why:
        return [_plain(key)]
    beside = f"{_plain(key):<{width}}   # {key.why}"
    if len(beside) <= 120:
        return [beside]
    return [*textwrap.wrap(key.why, 112, initial_indent="  # ", subsequent_indent="  # "), _plain(key)]


def _text(value: str) -> str:
    """A string as YAML on one line."""
    return json.dumps(value, ensure_ascii=False)


def _up(value: float, step: int) -> int:
    return step * ceil(value / step)
