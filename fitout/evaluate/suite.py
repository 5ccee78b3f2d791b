"""The suite: the same questions to the base and the tuned model, their answers scored side by side.

    questions = ask(conversations, settings)             which turn is asked, which is the reference
    answers   = answer(engine, questions, ...)           one model at a time; nothing of it is kept but text and numbers
    result    = score(questions, base, tuned, ...)       no model needed

`evaluate` does the three in order, with only one model open at any moment. A question is the conversation up to its
last supervised assistant turn (`train` is true); that turn is the reference. Earlier assistant turns stay as written,
so an error does not carry over from turn to turn.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ..chat.types import Conversation, Message, Pair
from ..errors import RequestError
from . import EvaluateSettings
from . import retention as retain
from .retention import Piece, Probe, Retention, RetentionResult
from .scores import (
    Comparison,
    Measure,
    Score,
    Tokenizer,
    bleu_tokenizer,
    compare,
    f1_tokens,
    measures,
    normalise,
    preferences,
    row_scores,
)


class Completion(Protocol):
    """What an engine gives back for one prompt. `error` says why it could not be answered at all, if so."""

    @property
    def text(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def error(self) -> str | None: ...


class Engine(Protocol):
    """The part of `fitout.engine.Engine` that evaluation needs."""

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        batch_size: int = 16,
        tools: Sequence[dict] = (),
        progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[Completion]: ...

    def complete(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 16,
        progress: Callable[[int, int], None] | None = None,
    ) -> Sequence[Completion]: ...

    def choose(
        self,
        conversations: Sequence[Sequence[Message]],
        choices: Sequence[Sequence[str]],
        *,
        mean: bool = False,
        tools: Sequence[dict] = (),
    ) -> list[list[float]]: ...

    def token_log_probs(self, texts: Sequence[str], max_length: int, *, batch_size: int = 16) -> list[list[float]]: ...


#: Columns by which scores are also told: preparing writes task, sub-task and where the key information stands.
DIMENSIONS = ("task", "subtask", "position", "language")

EngineSource = Engine | Callable[[], AbstractContextManager[Engine]]
Progress = Callable[[str, int, int], None]  # what is being done, how many are done, of how many


@dataclass(frozen=True)
class Question:
    """A prompt (all turns before the reference), the reference answer, and the labels to choose from, if any; of a pair
    the reference is the chosen answer, and `rejected` the other."""

    prompt: tuple[Message, ...]
    reference: str
    origin: str
    rejected: str = ""
    choices: tuple[str, ...] = ()
    tools: tuple[dict, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def last_said(self) -> str:
        return self.prompt[-1].content


@dataclass(frozen=True)
class Questions:
    """The questions of an evaluation. counts: conversations = asked + skipped (by reason) + beyond the limit."""

    asked: tuple[Question, ...]
    conversations: int
    skipped: dict[str, int]
    beyond_limit: int


@dataclass(frozen=True)
class Answers:
    """One model's answers, in the order of the questions.

    finish_reasons: "stop", "length" (ran into the token limit), "choice" (a label was chosen), or "error": the model
    could not be asked (the prompt fills its context, say), the text is empty, and `errors` says why. prefers: for
    questions with a rejected answer, whether a token of the chosen one is likelier on average; None for others.
    largest_batch: how many at a time since memory ran out, None where it did not.
    """

    texts: list[str]
    finish_reasons: list[str]
    errors: list[str]
    prefers: list[bool | None]
    completions: list[str]
    pieces: list[Piece]
    seconds: float
    largest_batch: int | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """Base against tuned: scores over all rows and by group, retention, and what was counted on the way.

    rows      one dict a question, as in predictions.jsonl: origin, task, prompt, reference, base, tuned, base_scores,
              tuned_scores
    groups    {"task": {"capitals": [Comparison, ...]}}, for each of DIMENSIONS that the rows' meta has
    counts    conversations, asked, skipped, empty answers and finish reasons of each model, seconds
    reading   the row score that sorts examples into fixed, broken and still wrong
    """

    scores: list[Comparison]
    groups: dict[str, dict[str, list[Comparison]]]
    retention: RetentionResult | None
    rows: list[dict[str, Any]]
    counts: dict[str, Any]
    notes: list[str]
    settings: dict[str, Any]
    reading: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, verdicts included, rows left out (they are predictions.jsonl and retention.jsonl)."""
        return {key: plain(getattr(self, key)) for key in self.__dataclass_fields__ if key != "rows"}


def from_report(report: Mapping[str, Any]) -> EvaluationResult:
    """The result that report.json holds; the rows stay in predictions.jsonl."""

    def comparison(saved: Mapping[str, Any] | None) -> Comparison | None:
        if saved is None:
            return None
        fields: dict[str, Any] = {key: value for key, value in saved.items() if key != "verdict"}
        scores: dict[str, Any] = {key: Score(**value) for key, value in fields.items() if isinstance(value, dict)}
        return Comparison(**{**fields, **scores})

    def comparisons(saved: Sequence[Mapping[str, Any]]) -> list[Comparison]:
        return [one for one in map(comparison, saved) if one]

    kept = report["retention"]
    if kept:
        groups = {name: one for name, saved in kept["groups"].items() if (one := comparison(saved))}
        overall, perplexity = comparison(kept["overall"]), comparison(kept["perplexity"])
        kept = RetentionResult(**{**kept, "overall": overall, "groups": groups, "perplexity": perplexity})
    return EvaluationResult(
        scores=comparisons(report["scores"]),
        groups={key: {name: comparisons(s) for name, s in group.items()} for key, group in report["groups"].items()},
        retention=kept,
        rows=[],
        **{key: report[key] for key in ("counts", "notes", "settings", "reading")},
    )


def plain(value: Any) -> Any:
    """Ready for JSON and UTF-8: dataclasses as dicts, comparisons with their verdict, half surrogate pairs as "?"."""
    if isinstance(value, Comparison):
        return {**asdict(value), "verdict": value.verdict}
    if isinstance(value, RetentionResult):
        return {key: plain(getattr(value, key)) for key in value.__dataclass_fields__ if key != "rows"}
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def evaluate(
    base: EngineSource,
    tuned: EngineSource,
    conversations: Sequence[Conversation | Pair],
    settings: EvaluateSettings,
    *,
    probes: Sequence[Probe | Mapping[str, Any]] | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Asks base, then tuned, and scores. `probes` are those that come with the base model (`retention: default`).

    A model is an engine, or a callable that gives a context manager of one: opened for its turn only, so that two
    models never share memory, and one model can be base with its adapter off and tuned with it on.
    """
    questions = ask(conversations, settings)
    asked = retain.load(settings.retention, probes)

    def answered(name: str, source: EngineSource) -> Answers:
        with opened(source) as engine:
            return answer(engine, questions, settings, retention=asked, progress=progress, name=name)

    return score(questions, answered("base", base), answered("tuned", tuned), settings, retention=asked)


@contextmanager
def opened(source: EngineSource) -> Iterator[Engine]:
    """The engine itself, or the one that a callable's context manager opens."""
    if hasattr(source, "generate"):
        yield source  # type: ignore[misc]
    else:
        with source() as engine:  # type: ignore[operator]
            yield engine


# ---------------------------------------------------------------------------------------------------------------------
# Questions


def ask(conversations: Sequence[Conversation | Pair], settings: EvaluateSettings) -> Questions:
    """Turns conversations and pairs into questions; what cannot be one is counted by reason.

    With a `limit`, rows are drawn at random (seeded) and keep their order: the first rows of a file are often all of
    one kind.
    """
    asked: list[Question] = []
    skipped: Counter[str] = Counter()
    for conversation in conversations:
        turn = _question(conversation, settings)
        if isinstance(turn, str):
            skipped[turn] += 1
        else:
            asked.append(turn)
    beyond = max(0, len(asked) - (settings.limit or len(asked)))
    if beyond:
        import numpy as np

        drawn = np.random.default_rng(settings.seed).choice(len(asked), size=len(asked) - beyond, replace=False)
        asked = [asked[at] for at in sorted(drawn.tolist())]
    return Questions(tuple(asked), len(conversations), dict(skipped), beyond)


def _question(conversation: Conversation | Pair, settings: EvaluateSettings) -> Question | str:
    """The question in a conversation or a pair, or the reason why there is none."""
    rejected = ""
    if isinstance(conversation, Pair):
        rejected, (conversation, _) = conversation.rejected.content, conversation.answered
    messages = conversation.messages
    turns = [at for at, message in enumerate(messages) if message.role == "assistant" and message.train]
    if not turns:
        return "no supervised assistant turn"
    last = turns[-1]
    if last == 0:
        return "nothing said before the answer"
    if not messages[last].content.strip():
        return "the reference has no text (a tool call, or empty)"
    own = conversation.meta.get("choices")
    choices = settings.choices or (own if isinstance(own, list | tuple) and "accuracy" in settings.metrics else ())
    return Question(
        prompt=messages[:last],
        reference=messages[last].content,
        origin=str(conversation.origin),
        rejected=rejected,
        choices=tuple(map(str, choices)),
        tools=conversation.tools,
        meta=conversation.meta,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def answer(
    engine: Engine,
    questions: Questions,
    settings: EvaluateSettings,
    *,
    retention: Retention | None = None,
    progress: Progress | None = None,
    name: str = "model",
) -> Answers:
    """One model's greedy answers (or most likely labels), probe completions and reading of the retention text."""
    started = time.monotonic()
    given: list[Given] = [Given("", "error")] * len(questions.asked)
    for rows in _calls(questions.asked):
        group = [questions.asked[row] for row in rows]
        if group[0].choices:
            found = _choose(engine, group, _told(progress, f"{name}: labels"))
        else:
            found = _generate(engine, group, settings, _told(progress, f"{name}: answers"))
        for row, one in zip(rows, found, strict=True):
            given[row] = one
    prefers = _prefer(engine, questions.asked, _told(progress, f"{name}: preferences"))
    completions, pieces = _remember(engine, retention, settings.batch_size, _told(progress, f"{name}: retention"))
    return Answers(
        texts=[one.text for one in given],
        finish_reasons=[one.finish_reason for one in given],
        errors=[one.error for one in given if one.error],
        prefers=prefers,
        completions=completions,
        pieces=pieces,
        seconds=round(time.monotonic() - started, 3),
        largest_batch=getattr(engine, "largest_batch", None),
    )


@dataclass(frozen=True)
class Given:
    text: str
    finish_reason: str
    error: str | None = None


def _told(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return (lambda done, total: progress(what, done, total)) if progress else None


def _calls(asked: Sequence[Question]) -> list[list[int]]:
    """Rows that one call of the engine can answer: chosen or generated, with the same tools."""
    kinds: dict[str, list[int]] = {}
    for row, question in enumerate(asked):
        kind = json.dumps([bool(question.choices), question.tools], sort_keys=True, default=str)
        kinds.setdefault(kind, []).append(row)
    return list(kinds.values())


def _generate(
    engine: Engine, group: Sequence[Question], settings: EvaluateSettings, told: Callable[[int, int], None] | None
) -> list[Given]:
    found = engine.generate(
        [question.prompt for question in group],
        max_new_tokens=settings.max_new_tokens,
        temperature=0.0,
        batch_size=settings.batch_size,
        tools=group[0].tools,
        progress=told,
    )
    return [Given(one.text, "error" if one.error else one.finish_reason, one.error) for one in found]


def _choose(engine: Engine, group: Sequence[Question], told: Callable[[int, int], None] | None) -> list[Given]:
    """The label with the largest summed log-probability, end of turn included; the first one where they tie.

    One question a call: an engine refuses a question that does not fit its context, and the others are still to be
    answered.
    """
    found = []
    for question in group:
        try:
            [scores] = engine.choose([question.prompt], [question.choices], tools=question.tools)
            found.append(Given(question.choices[max(range(len(scores)), key=scores.__getitem__)], "choice"))
        except RequestError as error:
            found.append(Given("", "error", error.message))
        if told:
            told(len(found), len(group))
    return found


def _prefer(engine: Engine, asked: Sequence[Question], told: Callable[[int, int], None] | None) -> list[bool | None]:
    """Answers.prefers; None also for a question that does not fit the engine's context with an answer."""
    found: list[bool | None] = [None] * len(asked)
    pairs = [row for row, question in enumerate(asked) if question.rejected.strip()]
    for done, row in enumerate(pairs, 1):
        question = asked[row]
        with suppress(RequestError):
            answers = (question.reference, question.rejected)
            [(chosen, rejected)] = engine.choose([question.prompt], [answers], mean=True, tools=question.tools)
            found[row] = chosen > rejected
        if told:
            told(done, len(pairs))
    return found


def _remember(
    engine: Engine, retention: Retention | None, batch_size: int, told: Callable[[int, int], None] | None
) -> tuple[list[str], list[Piece]]:
    """Completions of the probes, and the reading of the text."""
    completions: list[str] = []
    pieces: list[Piece] = []
    if retention and retention.probes:
        prompts = [probe.prompt for probe in retention.probes]
        longest = retain.completion_tokens(retention.probes)
        found = engine.complete(prompts, max_new_tokens=longest, batch_size=batch_size, progress=told)
        completions = [one.text for one in found]
    if retention:
        for start in range(0, len(retention.pieces), batch_size):
            texts = retention.pieces[start : start + batch_size]
            found_rows = engine.token_log_probs(texts, retain.WINDOW_TOKENS, batch_size=batch_size)
            pieces += [retain.piece(row) for row in found_rows]
            if told:
                told(len(pieces), len(retention.pieces))
    return completions, pieces


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(
    questions: Questions,
    base: Answers,
    tuned: Answers,
    settings: EvaluateSettings,
    *,
    retention: Retention | None = None,
) -> EvaluationResult:
    """Scores two models' answers to the same questions. Without a question there are no scores, and a note says so."""
    asked = questions.asked
    found = preferences(base.prefers, tuned.prefers) + measures(
        settings.metrics,
        [question.reference for question in asked],
        base.texts,
        tuned.texts,
        prompts=[question.last_said for question in asked],
        words=settings.words,
        one_label_set=bool(settings.choices) or not any(question.choices for question in asked),
    )
    base_rows, tuned_rows = row_scores(found, len(asked))
    return EvaluationResult(
        scores=[compare(measure, settings.samples, settings.seed) for measure in found],
        groups=_groups(asked, found, settings),
        retention=_retention(retention, base, tuned, settings),
        rows=[
            plain(_row(question, base.texts[at], tuned.texts[at], base_rows[at], tuned_rows[at]))
            for at, question in enumerate(asked)
        ],
        counts=_counts(questions, base, tuned),
        notes=_notes(asked, base, tuned, settings, retention),
        settings=settings.model_dump(),
        reading=_reading(base_rows, tuned_rows),
    )


def _groups(
    asked: Sequence[Question], found: Sequence[Measure], settings: EvaluateSettings
) -> dict[str, dict[str, list[Comparison]]]:
    """Scores by each of DIMENSIONS, where the rows say it; rows that do not are in a group of their own."""
    groups: dict[str, dict[str, list[Comparison]]] = {}
    for dimension in DIMENSIONS:
        named: dict[str, list[int]] = {}
        for row, question in enumerate(asked):
            named.setdefault(str(question.meta.get(dimension) or "(not given)"), []).append(row)
        if set(named) - {"(not given)"} and found:
            groups[dimension] = {}
            for name, rows in sorted(named.items()):
                parts = [measure.only(rows) for measure in found]
                groups[dimension][name] = [
                    compare(part, settings.samples, settings.seed) for part in parts if len(part.rows)
                ]
    return groups


def _retention(
    asked: Retention | None, base: Answers, tuned: Answers, settings: EvaluateSettings
) -> RetentionResult | None:
    if asked is None:
        return None
    if asked.probes:
        return retain.compare_probes(asked, base.completions, tuned.completions, settings.samples, settings.seed)
    return retain.compare_perplexity(asked, base.pieces, tuned.pieces, settings.samples, settings.seed)


def _row(question: Question, base: str, tuned: str, base_scores: dict, tuned_scores: dict) -> dict[str, Any]:
    return {
        "origin": question.origin,
        "task": question.meta.get("task"),
        "prompt": [message.as_dict() for message in question.prompt],
        "reference": question.reference,
        "base": base,
        "tuned": tuned,
        "base_scores": base_scores,
        "tuned_scores": tuned_scores,
    }


def _counts(questions: Questions, base: Answers, tuned: Answers) -> dict[str, Any]:
    def of(answers: Answers) -> dict[str, Any]:
        return {
            "empty": sum(not text.strip() for text in answers.texts),
            "finish_reasons": dict(Counter(answers.finish_reasons)),
            "seconds": answers.seconds,
        }

    return {
        "conversations": questions.conversations,
        "asked": len(questions.asked),
        "skipped": questions.skipped,
        "beyond_limit": questions.beyond_limit,
        "base": of(base),
        "tuned": of(tuned),
    }


def _notes(
    asked: Sequence[Question], base: Answers, tuned: Answers, settings: EvaluateSettings, retention: Retention | None
) -> list[str]:
    """What a reader of the numbers has to know, in whole sentences."""
    n = len(asked)
    notes = []
    if not asked:
        notes.append("There was no row to evaluate: no score could be computed.")
    for name, answers in (("base", base), ("tuned model", tuned)):
        if cut := answers.finish_reasons.count("length"):
            limit = settings.max_new_tokens
            notes.append(
                f"The {name} ran into the limit of {limit} tokens in {cut} of {n} answers, scored as they are."
            )
        if errors := answers.errors:
            notes.append(f"The {name} could not answer {len(errors)} of {n} questions, scored as zero: {errors[0]}.")
        if answers.largest_batch:
            notes.append(
                f"Memory ran out while the {name} answered; from then on {answers.largest_batch} at a time, which "
                "changes no answer."
            )
        if empty := sum(not text.strip() for text in answers.texts) - len(answers.errors):
            notes.append(f"The {name} gave {empty} empty answers of {n}, scored as zero.")
    if alien := sum(bool(q.choices) and normalise(q.reference) not in map(normalise, q.choices) for q in asked):
        notes.append(f"{alien} of {n} references are none of the choices; no answer to them can be right.")
    if "f1" in settings.metrics and (bare := sum(not f1_tokens(q.reference) for q in asked)):
        notes.append(f"{bare} of {n} references are signs or articles only; F1 is exact match there.")
    if "rouge" in settings.metrics and (bare := sum(not Tokenizer().tokenize(q.reference) for q in asked)):
        notes.append(f"{bare} of {n} references have neither letters nor digits; ROUGE is zero there.")
    if "rouge" in settings.metrics and (single := sum(len(Tokenizer().tokenize(q.reference)) == 1 for q in asked)):
        notes.append(f"{single} of {n} references are a single token; ROUGE-2 is zero there, even for a right answer.")
    kinds = Counter(bleu_tokenizer(q.reference, q.last_said) for q in asked)
    if "bleu" in settings.metrics and len(kinds) > 1:
        parts = ", ".join(f"{count} rows tok:{kind}" for kind, count in sorted(kinds.items()))
        notes.append(f"The references are in more than one script, so BLEU is given for each: {parts}.")
    if retention is None and settings.retention == "default":
        notes.append(
            "Retention was not measured: no probes came with the base. Set evaluate.retention to some of yours."
        )
    return notes


def _reading(base: Sequence[dict[str, float]], tuned: Sequence[dict[str, float]]) -> str | None:
    """The row score that sorts examples: right or wrong where anything was ever right, else the degree of overlap."""
    for name in ("accuracy", "exact_match"):
        if any(row.get(name) for rows in (base, tuned) for row in rows):
            return name
    present = set(base[0]) if base else set()
    return next((name for name in ("f1", "rougeL", "accuracy", "exact_match") if name in present), None)
