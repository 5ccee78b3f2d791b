"""Writing model folders that other tools load: weights, tokenizer, template, stop ids, and a card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import errors_of_the_system, write_text

if TYPE_CHECKING:
    from ..chat.render import Chat

Facts = Mapping[str, Mapping[str, Any] | Sequence[Sequence[Any]]]  # title -> names and values, or rows below a head


def set_stop_ids(model: Any, chat: Chat) -> None:
    """Puts the ids that end a turn into the generation config, so that other engines stop where ours does.

    Sampling settings that the base brought along stay, as far as transformers still accepts them.
    """
    if model.generation_config is None or not chat.stop_ids:
        return
    own = model.generation_config.eos_token_id
    own = {own} if isinstance(own, int) else set(own or ())
    ids = sorted({*chat.stop_ids, *(own & chat.control_ids)})  # a config's mere default may name any ordinary token
    model.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]


def save_chat(chat: Chat, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template that was trained."""
    with errors_of_the_system(folder):
        chat.tokenizer.save_pretrained(folder)


def write_card(folder: Path, *, name: str, base: str, facts: Facts) -> None:
    """README.md of a model or adapter folder: what it is, how to load it, how it was made, what was measured.

    The head is the metadata that the Hugging Face hub reads. A README.md that a method wrote about its files is kept
    at the end.
    """
    from . import card

    format_notes = card.kept(folder)
    parts = [card.head(folder, base), f"# {name}", card.opening(folder, base), *card.usage(folder, base)]
    parts += [f"## {title}\n\n{table(values)}" for title, values in facts.items() if values]
    parts.append(card.licence(base))
    if format_notes:
        parts.append(f"{card.FORMAT}\n\n{format_notes}")
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")


def table(values: Mapping[str, Any] | Sequence[Sequence[Any]]) -> str:
    """A Markdown table: of names and values (what is not known is left out), or of rows whose first is the head."""
    known = [item for item in values.items() if item[1] is not None] if isinstance(values, Mapping) else []
    rows: list[Sequence[Any]] = [("", ""), *known] if isinstance(values, Mapping) else list(values)
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    if isinstance(values, Mapping):
        lines[0] = "| | |"
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
