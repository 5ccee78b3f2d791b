"""To an annotation tool and back: tasks out, drafted by a model where asked; answers, agreement and a decision in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import FitoutError, RequestError
from .working import Screen, import_libraries

if TYPE_CHECKING:
    from ..data.annotate.agreement import Rule
    from ..data.annotate.tasks import Task

Tool = Literal["label-studio", "doccano"]
DRAFT_KEY = "FITOUT_DRAFT_KEY"
MAX_DRAFT = 512  # tokens of a drafted answer


@dataclass(frozen=True)
class Pushed:
    """What was sent: `left_out` rows by reason; tasks + left out = rows and samples of the file."""

    project: int
    page: str
    tasks: int
    drafted: int
    left_out: dict[str, int]


@dataclass(frozen=True)
class Pulled:
    """What came back: tasks = answered + undecided + unanswered."""

    tasks: int
    answered: int
    undecided: int
    unanswered: int
    rows: int
    reasons: dict[str, int]
    agreement: dict[str, Any]
    answers: Path
    folder: Path


def push(
    tool: Tool,
    data: Path,
    *,
    title: str | None = None,
    url: str | None = None,
    format: str | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    kind: Literal["answers", "labels"] = "answers",
    annotators: int = 1,
    draft_by: str | None = None,
    draft_model: str | None = None,
    screen: Screen | None = None,
) -> Pushed:
    """Sends the rows of a file as tasks to a new project.

    labels    task -> sub-tasks; where it is not given, those of the data
    draft_by  a run, a model, or the address of an OpenAI-compatible server (with `draft_model`) that answers first
    """
    from ..data import SourceSettings
    from ..data.annotate import tasks as work
    from ..data.annotate.doccano_server import Doccano
    from ..data.annotate.label_studio_server import LabelStudio

    screen = screen or Screen()
    server = LabelStudio(url) if tool == "label-studio" else Doccano(url)
    if server.client.plain:
        screen.say(f"{server.client.url} is plain HTTP to another machine: credentials and data can be read on the way")
    found = work.collect(SourceSettings(path=str(data), format=format), Path())
    for reason, count in found.left_out.most_common():
        screen.say(f"  left out {count:,}: {reason}")
    tasks, drafted = found.tasks, 0
    if draft_by:
        answers = draft(tasks, draft_by, draft_model, screen)
        drafted = sum(answer is not None for answer in answers)
        screen.say(f"drafted {drafted:,} of {len(tasks):,} answers")
        tasks = work.draft(tasks, answers)
    taxonomy = dict(labels) if labels is not None else work.levels(tasks)
    title = title or data.stem

    def say(done: int, of: int) -> None:
        screen.evaluation_progress("push", done, of)

    if isinstance(server, LabelStudio):
        by = (draft_model or Path(draft_by).name) if draft_by else "as it was"
        project = server.push(title, tasks, taxonomy, annotators=annotators, drafted_by=by, say=say)
    elif kind == "labels" and not taxonomy:
        raise RequestError("no labels to choose from", where=str(data), hint="Name them with --labels FILE.")
    else:
        project = server.push(title, tasks, taxonomy, kind=kind, annotators=annotators, say=say)
    return Pushed(project, server.page(project), len(tasks), drafted, dict(found.left_out))


def pull(
    tool: Tool,
    project: int | None,
    *,
    to: Path,
    rule: Rule = "majority",
    url: str | None = None,
    file: Path | None = None,
    screen: Screen | None = None,
) -> Pulled:
    """Brings the annotations of a project, or of a Label Studio JSON export, into a folder.

    export.json (or .jsonl)  everything, as the tool gave it
    answers.jsonl            one answer a task, by the rule; ready to be a source of a recipe
    undecided.jsonl          the tasks that have annotations and no answer, with the reason
    agreement.json           kappa and overlap of the annotators
    """
    from collections import Counter

    from ..data.annotate.doccano_server import Doccano
    from ..data.annotate.label_studio_server import LabelStudio, read_export
    from ..data.annotate.tasks import Returned, settle
    from ..data.formats.label_studio import answered
    from ..files import atomic_open, write_json, write_jsonl

    screen = screen or Screen()
    if (project is None) == (file is None):
        raise RequestError(
            "name a project or an exported file", where="data pull", hint="pull TOOL PROJECT, or --file F."
        )
    if tool == "doccano":
        if project is None:
            raise RequestError(
                "files of Doccano are read without a server",
                where=str(file),
                hint="Name the file as a source of a recipe.",
            )
        content, returned = Doccano(url).pull(project)
        kept = to / "export.jsonl"
    else:
        content = LabelStudio(url).pull(project) if project is not None else read_bytes(file)
        returned = read_export(content, str(file or f"project {project}"))
        kept = to / "export.json"

    def convert(task: Returned, annotation: Any, origin: Any) -> Sequence[Any]:
        return answered(task.data, annotation, len(task.annotations), task.key, origin)

    settled = settle(returned, rule, kept.name, convert)
    with atomic_open(kept) as out:
        out.write(content)
    write_jsonl(to / "answers.jsonl", settled.rows)
    write_jsonl(to / "undecided.jsonl", settled.undecided)
    agreement = settled.agreement.as_dict() if settled.agreement else {}
    write_json(to / "agreement.json", agreement)
    undecided = len(returned) - settled.answered - settled.unanswered
    reasons = Counter(row["reason"] for row in settled.undecided)
    screen.say(
        f"{len(returned):,} tasks = {settled.answered:,} answered + {undecided:,} undecided + "
        f"{settled.unanswered:,} not annotated; {len(settled.rows):,} rows"
    )
    for reason, count in reasons.most_common():
        screen.say(f"  undecided {count:,}: {reason}")
    return Pulled(
        len(returned), settled.answered, undecided, settled.unanswered, len(settled.rows), dict(reasons), agreement,
        to / "answers.jsonl", to,
    )  # fmt: skip


def read_bytes(file: Path | None) -> bytes:
    assert file is not None
    try:
        return file.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read the file: {error.strerror}", where=str(file)) from None


def draft(tasks: Sequence[Task], by: str, model: str | None, screen: Screen) -> list[str | None]:
    """An answer for each task; None where the model gave none (an error, an empty answer)."""
    if by.startswith(("http://", "https://")):
        return _ask_server(tasks, by, model, screen)
    import_libraries()
    from ..engine import Engine

    engine = Engine.open(by)
    given = engine.generate(
        [list(task.messages) for task in tasks],
        max_new_tokens=MAX_DRAFT,
        progress=lambda done, of: screen.evaluation_progress("draft", done, of),
    )
    return [None if one.error or not one.text.strip() else one.text for one in given]


def _ask_server(tasks: Sequence[Task], url: str, model: str | None, screen: Screen) -> list[str | None]:
    """Chat completions (OpenAI's interface) of eight tasks at a time; a task that fails is left without a draft."""
    from concurrent.futures import ThreadPoolExecutor

    from ..data.annotate.http import Client

    if not model:
        raise RequestError("which model should answer?", where=url, hint="Name it with --draft-model.")
    client = Client(url, "The drafting server")
    if os.environ.get(DRAFT_KEY):
        client.headers["Authorization"] = f"Bearer {os.environ[DRAFT_KEY]}"
    failed: list[FitoutError] = []

    def ask(task: Task) -> str | None:
        body = {
            "model": model,
            "messages": [message.as_dict() for message in task.messages],
            "max_tokens": MAX_DRAFT,
            "temperature": 0,
            **({"tools": list(task.tools)} if task.tools else {}),
        }
        try:
            said = client.post("/chat/completions", body)["choices"][0]["message"].get("content")
        except FitoutError as error:
            failed.append(error)
            return None
        except (KeyError, IndexError, TypeError, AttributeError):
            failed.append(FitoutError("an answer without choices", where=url))
            return None
        return said if isinstance(said, str) and said.strip() else None

    answers: list[str | None] = []
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(ask, tasks):
            answers.append(answer)
            screen.evaluation_progress("draft", len(answers), len(tasks))
    if failed and not any(answers):
        raise failed[0]
    if failed:
        screen.say(f"{len(failed):,} tasks have no draft: {failed[0].message}")
    return answers
