"""The questions of `fitout init`. Each answer is looked at at once, and asked for again when it fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TypeVar

import typer

from ..errors import FitoutError, RequestError
from ..model import EMBEDDED
from .advise import AIMS, KNOWLEDGE, Wishes, check, suggested_aim
from .look import Base, Seen, look_at_data, look_at_model

T = TypeVar("T")
HERE = "this"


def on_a_terminal() -> bool:
    """Whether somebody is there to answer."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def ask(model: str | None, method: str | None, machine: str | None, aim: str | None) -> Wishes:
    """Asks for the data and for what was not given. Ends with typer.Abort when the answers end."""
    seen = _until_good("Your data: a file, a folder or a hub id (hf://owner/name)", None, _data)
    base = look_at_model(model) if model else _until_good(
        "\nThe base model: a folder, a hub id (owner/name), or the one in the box", EMBEDDED, _model
    )  # fmt: skip
    on = machine or _until_good(f"\nWhere will it run? {HERE}, or a name", HERE, _machine)
    wishes = Wishes(seen, base, None if on == HERE else on, aim or _aim(seen), method)
    check(wishes)
    if wishes.aim == "knowledge":
        typer.echo(f"  {KNOWLEDGE}")
    typer.echo()
    return wishes


def _until_good(question: str, default: str | None, look: Callable[[str], T]) -> T:
    while True:
        answer = typer.prompt(question, default=default)
        try:
            return look(answer.strip())
        except FitoutError as error:
            for line in error.lines():
                typer.echo(f"  {line}")


def _data(answer: str) -> Seen:
    seen = look_at_data(answer)
    typer.echo(f"  {seen.told()}")
    return seen


def _model(answer: str) -> Base:
    base = look_at_model(answer)
    typer.echo(f"  {base.note}")
    return base


def _machine(answer: str) -> str:
    from ..plan.machine import machine

    found = machine(None if answer == HERE else answer)
    typer.echo(f"  {found.name}, {found.memory / 2**30:,.1f} GB of memory free")
    return answer


def _aim(seen: Seen) -> str:
    if seen.plain:
        typer.echo("\nThe data are plain text: the model will go on with such text.")
        return "text"
    choices = [aim for aim in AIMS if aim != "text" and (aim != "labels" or seen.labels)]
    typer.echo("\nWhat should the tuned model do?")
    for number, aim in enumerate(choices, 1):
        typer.echo(f"  {number}  {AIMS[aim]}")

    def chosen(answer: str) -> str:
        if answer in choices:
            return answer
        if answer.isascii() and answer.isdigit() and 1 <= int(answer) <= len(choices):
            return choices[int(answer) - 1]
        raise RequestError(f"{answer!r} is none of 1 to {len(choices)}")

    return _until_good("A number", str(choices.index(suggested_aim(seen)) + 1), chosen)
