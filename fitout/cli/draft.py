"""`fitout init`: a recipe for a model and a data file, with the reason for each key."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..errors import RequestError
from ..files import write_text
from ..model import EMBEDDED
from .advise import Advice, Wishes, advise, check, draw
from .look import look_at_data, look_at_model

HEAD = "Written by `fitout init`. Keys left out have defaults; any key can be changed with --set KEY=VALUE."


def refuse(to: Path) -> None:
    """Raises RequestError when there is a file already, before anybody is asked anything."""
    if to.exists():
        raise RequestError("this file exists already", where=str(to), hint="Choose another with --to.")


def look(data: str | None, model: str | None, method: str | None, machine: str | None, aim: str | None) -> Wishes:
    """The wishes of the command line, looked at."""
    if data is None:
        raise RequestError(
            "which data? There is no terminal to ask on",
            where="fitout init",
            hint="Name them: fitout init DATA, a file, a folder or a hub id.",
        )
    wishes = Wishes(look_at_data(data), look_at_model(model or EMBEDDED), machine, aim, method)
    check(wishes)
    return wishes


def write_recipe(wishes: Wishes, to: Path) -> Advice:
    """Chooses every key and writes the recipe, which loads. Refuses to overwrite one."""
    from ..config import load

    advice = advise(wishes)
    stem = "".join(c if c.isalnum() or c in "._-" else "-" for c in wishes.seen.stem).strip("-._")
    name = stem if stem.isascii() and stem else "my-run"
    about = [textwrap.fill(line, 116, initial_indent="# ", subsequent_indent="#   ") for line in (HEAD, *advice.about)]
    refuse(to)
    write_text(to, "\n".join(about) + "\n\n" + draw(name, advice.keys))
    try:
        load(to)
    except RequestError:
        to.unlink()
        raise
    return advice
