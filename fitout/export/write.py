"""Writing model folders that other tools load: weights, tokenizer, template, stop ids, and a card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text

if TYPE_CHECKING:
    from ..chat.render import Chat


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
    chat.tokenizer.save_pretrained(folder)


def write_card(folder: Path, *, name: str, base: str, facts: dict[str, Any]) -> None:
    """README.md of a model folder: where it comes from, how it was trained, what was measured."""
    lines = ["---", f"base_model: {base}", "library_name: transformers", "tags: [fitout]", "---", f"# {name}", ""]
    lines.append(f"`{base}`, fine-tuned with Fitout.")
    for title, values in facts.items():
        if values:
            lines += ["", f"## {title}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
