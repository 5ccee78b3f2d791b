"""`fitout data push`, `pull` and `export`: words of the command line checked, results drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from rich.table import Table

from .. import verbs
from ..config import parse_yaml
from ..errors import RequestError

if TYPE_CHECKING:
    from .screen import Terminal

TOOLS = ("label-studio", "doccano")


def push(
    tool: str,
    file: Path,
    title: str | None,
    url: str | None,
    format: str | None,
    labels: Path | None,
    kind: str,
    annotators: int,
    draft: str | None,
    draft_model: str | None,
    screen: Terminal,
) -> None:
    done = verbs.push(
        cast(Any, one_of(tool, TOOLS, "TOOL")),
        file,
        title=title,
        url=url,
        format=format,
        labels=read_labels(labels) if labels else None,
        kind=cast(Any, one_of(kind, ("answers", "labels"), "--kind")),
        annotators=annotators,
        draft_by=draft,
        draft_model=draft_model,
        screen=screen.verbs,
    )
    if screen.machine:
        print(json.dumps(asdict(done), ensure_ascii=False))
        return
    screen.say(f"{done.tasks:,} tasks in project {done.project}: {done.page}")
    screen.say(f"afterwards: fitout data pull {tool} {done.project}")


def pull(
    tool: str, project: int | None, to: Path, rule: str, url: str | None, file: Path | None, screen: Terminal
) -> None:
    from ..data.annotate.agreement import RULES

    chosen = one_of(rule.replace("-", "_"), RULES, "--rule")
    tool = one_of(tool, TOOLS, "TOOL")
    done = verbs.pull(cast(Any, tool), project, to=to, rule=cast(Any, chosen), url=url, file=file, screen=screen.verbs)
    if screen.machine:
        print(
            json.dumps({**asdict(done), "answers": str(done.answers), "folder": str(done.folder)}, ensure_ascii=False)
        )
        return
    draw_agreement(done.agreement, screen)
    screen.say(f"answers {done.answers}; as the tool gave it, what is undecided and agreement beside it")
    screen.say(f"go on: fitout init {done.answers}")


def draw_agreement(agreement: Mapping[str, Any], screen: Terminal) -> None:
    if agreement.get("fleiss") or agreement.get("answer_overlap") is not None:
        table = Table(title="Agreement", title_justify="left")
        for name in ("what", "measure", "value", "tasks"):
            table.add_column(name)
        for field, kappa in agreement["fleiss"].items():
            table.add_row(field, "Fleiss' kappa, all annotators", shown(kappa), "")
        for one in agreement["cohen"]:
            people = " and ".join(one["annotators"])
            table.add_row(one["field"], f"Cohen's kappa, {people}", shown(one["kappa"]), str(one["tasks"]))
        if agreement["answer_overlap"] is not None:
            table.add_row("answers", "shared words, F1 of two answers", shown(agreement["answer_overlap"]), "")
        screen.console.print(table)


def shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.3f}"


def draw_written(done: verbs.Written, screen: Terminal) -> None:
    if screen.machine:
        print(json.dumps({**asdict(done), "folder": str(done.folder)}, ensure_ascii=False))
        return
    rows = ", ".join(f"{count:,} {part}" for part, count in done.rows.items()) or "no rows"
    left = sum(done.left_out.values())
    screen.say(f"{done.form}: {sum(done.rows.values()) + left:,} samples = {rows} + {left:,} left out")
    for reason, count in done.left_out.items():
        screen.say(f"  left out {count:,}: {reason}")
    if done.tokens:
        tokens = ", ".join(f"{count:,} {part}" for part, count in done.tokens.items())
        screen.say(f"tokens, counted with the tokenizer of {done.counted_with}: {tokens}; OpenAI's own differs")
        if done.cost is not None:
            screen.say(f"one epoch of the training part would cost {done.cost:,.2f}")
        if done.rows.get("train", 0) < FEWEST:
            screen.say(f"OpenAI asks for at least {FEWEST} training lines")
    for file in done.files:
        screen.say(f"{done.folder / file}")


FEWEST = 10  # training lines that OpenAI takes


def one_of(word: str, known: Sequence[str], where: str) -> str:
    if word not in known:
        from difflib import get_close_matches

        near = get_close_matches(word, known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Known are {', '.join(known)}."
        raise RequestError(f"{word!r} is not known", where=where, hint=hint)
    return word


def read_labels(path: Path) -> dict[str, list[str]]:
    """{task: [sub-task, ...]} of a JSON or YAML file."""
    try:
        labels = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"the labels cannot be read: {error}", where=str(path)) from None
    if isinstance(labels, list):
        labels = {label: [] for label in labels}
    fine = isinstance(labels, dict) and all(
        isinstance(task, str)
        and task
        and isinstance(subs, list | None)
        and all(isinstance(sub, str) for sub in subs or [])
        for task, subs in labels.items()
    )
    if not fine or not labels:
        raise RequestError("labels are {task: [sub-task, ...]} or a list of names", where=str(path))
    return {task: list(subs or []) for task, subs in labels.items()}
