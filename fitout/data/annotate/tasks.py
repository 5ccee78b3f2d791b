"""What is sent to an annotation tool and what comes back, for every tool alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...chat.types import Conversation, Message, Origin, Sample, Text
from ...errors import DataError, FitoutError
from .. import SourceSettings
from ..formats import Format, Refused, RowError, choose, convert
from ..formats.preference import read_prompt
from ..sources import BadRow, RawRow, probe, read
from .agreement import Agreement, Rule, Undecided, agreement, decide
from .annotation import Annotation

Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True)
class Task:
    """A question to be answered: the turns before the answer, and the answer there is to be corrected (or None).

    `label` is its task label, "task / sub-task" or a task alone, "" without one.
    """

    messages: tuple[Message, ...]
    origin: Origin
    answer: str | None = None
    label: str = ""
    tools: tuple[dict, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        """The task's fields as a tool stores them; `pull` makes the same conversation of them again."""
        fields: dict[str, Any] = {"messages": [said(message) for message in self.messages], "origin": str(self.origin)}
        if self.tools:
            fields["tools"] = list(self.tools)
        return fields | ({"meta": self.meta} if self.meta else {})


def said(message: Message) -> dict[str, Any]:
    return message.as_dict() | ({} if message.train else {"train": False})


@dataclass
class Collected:
    """The tasks of a source, and how many of its rows are none, by reason."""

    tasks: list[Task] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


def collect(source: SourceSettings, base: Path) -> Collected:
    """The tasks of a file: samples with their answers to be corrected, and rows that only ask.

    Raises DataError when the file cannot be read or asks nothing.
    """
    plug: Format | None
    try:
        plug = choose(probe(source, base), source.format, source.columns, source.path)
    except DataError:
        if source.format or not any(asked(row) for row in probe(source, base)):
            raise
        plug = None
    found = Collected()
    for row in read(source, base):
        if isinstance(row, BadRow):
            found.left_out[row.reason] += 1
            continue
        for part in convert(plug, row, source.columns) if plug else [Refused(row.origin, "no answer", row.row)]:
            task = task_of(part, row)
            if isinstance(task, Task):
                found.tasks.append(task)
            else:
                found.left_out[task] += 1
    if not found.tasks:
        reasons = "; ".join(f"{count} {reason}" for reason, count in found.left_out.most_common(3))
        raise DataError(f"no row asks anything: {reasons}", where=source.path, hint="Give rows with a question.")
    return found


def task_of(part: Sample | Refused, row: RawRow) -> Task | str:
    """A task, or why there is none."""
    if isinstance(part, Refused):
        messages = asked(row.row) if part.origin == row.origin else []
        return Task(tuple(messages), row.origin) if messages else part.reason
    if isinstance(part, Text):
        return Task((Message("user", part.text),), part.origin, meta=part.meta)
    if not isinstance(part, Conversation):
        return "preference pairs are not sent"
    *before, last = part.messages
    if last.extra or not last.train:
        return "an answer that is more than text (a tool call, reasoning) or is not trained"
    meta = dict(part.meta)
    levels = [meta.pop(key) for key in ("task", "subtask") if isinstance(meta.get(key), str) and meta[key]]
    return Task(tuple(before), part.origin, last.content, " / ".join(levels), part.tools, meta)


def asked(row: dict[str, Any]) -> list[Message]:
    """The turns of a row that nobody has answered yet; [] when it asks nothing."""
    try:
        messages, _ = read_prompt(row)
    except RowError:
        return []
    fine = bool(messages) and messages[-1].role in ("user", "tool") and bool(messages[-1].content.strip())
    return messages if fine else []


def require_all(there: int, sent: int, project: int, url: str) -> None:
    """Raises FitoutError where a server has not as many tasks as were sent to it."""
    if there != sent:
        raise FitoutError(
            f"{sent} tasks were sent and project {project} has {there}",
            where=url,
            harm="Some would never be annotated.",
            hint="Delete the project and push again; see the server's log.",
        )


def draft(tasks: Sequence[Task], answers: Sequence[str | None]) -> list[Task]:
    """The tasks with a model's answers in place of their own; where it gave none, as they were."""
    return [replace(task, answer=answer) if answer else task for task, answer in zip(tasks, answers, strict=True)]


def levels(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """The task labels of the tasks, as task -> its sub-tasks, in order of first use."""
    found: dict[str, list[str]] = {}
    for task in tasks:
        name, _, sub = task.label.partition(" / ")
        if name:
            subs = found.setdefault(name, [])
            if sub and sub not in subs:
                subs.append(sub)
    return found


# --- what comes back ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Returned:
    """A task as the tool has it, with everyone's annotations. `raw` is the tool's own row."""

    key: str
    data: dict[str, Any]
    annotations: tuple[Annotation, ...]
    raw: Any
    fault: str = ""  # why its annotations cannot be read


@dataclass
class Settled:
    """What a rule made of the annotations. tasks = answered + undecided + unanswered; a task may give several rows."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    undecided: list[dict[str, Any]] = field(default_factory=list)
    answered: int = 0
    unanswered: int = 0
    agreement: Agreement | None = None


Convert = Callable[[Returned, Annotation, Origin], Sequence[Sample | Refused]]


def settle(returned: Sequence[Returned], rule: Rule, where: str, convert: Convert) -> Settled:
    """One answer for every task, by the rule; what cannot be decided or converted is listed with the reason."""
    from ..writers import as_openai

    result = Settled()
    for number, task in enumerate(returned, 1):
        origin = Origin(where, number)
        if not task.annotations and not task.fault:
            result.unanswered += 1
            continue
        try:
            if task.fault:
                raise Undecided(task.fault)
            parts = convert(task, decide(task.annotations, rule), origin)
        except (Undecided, RowError) as error:
            result.undecided.append({"task": task.key, "reason": str(error), "row": task.raw})
            continue
        good = [part for part in parts if not isinstance(part, Refused)]
        result.answered += bool(good)
        result.rows += [as_openai(sample) for sample in good]
        for part in parts:
            if isinstance(part, Refused):
                result.undecided.append({"task": task.key, "reason": part.reason, "row": part.raw})
    result.agreement = agreement([task.annotations for task in returned if task.annotations])
    return result
