"""Preference pairs: the same prompt with a chosen and a rejected answer."""

from __future__ import annotations

import re
from typing import Any

from ...chat.types import Message, Origin, Pair, Sample
from ..content import normalised
from . import openai, sharegpt
from .alpaca import history
from .openai import TURNS
from .plug import Columns, Row, RowError, first_key, parsed, renamed, rest, text
from .prompt_completion import PROMPTS
from .turns import check_order, read_tools, turn_list, with_system


class Preference:
    """Answers are text, one message (OpenAI or ShareGPT form) or whole conversations that differ only in the last turn,
    also as one text with "Human:" and "Assistant:" before the turns (HH-RLHF).

    The prompt is what the conversations share; else `conversations` or `messages`; else `prompt` (or question, ...);
    else `instruction` and `input`. OpenAI's form has `input`, `preferred_output` and `non_preferred_output`.
    """

    name = "preference"
    keys = "chosen, rejected, and conversations, messages, prompt or instruction; or OpenAI's preference form"
    fields: tuple[str, ...] = (
        "chosen",
        "rejected",
        "conversations",
        "messages",
        "prompt",
        "instruction",
        "input",
        "history",
        "system",
        "tools",
    )

    def matches(self, row: Row) -> bool:
        return "chosen" in row and "rejected" in row or all(key in row for key in OPENAI)

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> list[Sample]:
        row = of_openai(renamed(row, columns))
        for key in ("chosen", "rejected"):
            if row.get(key) is None:
                raise RowError(f"no `{key}`")
        told = prompt_key(row)
        chosen, rejected = (read_answer(row[key], key, whole=told is None) for key in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise RowError("`chosen` and `rejected` answer different prompts")
        if len(chosen) > 1 and told is not None and not repeats(row[told], chosen[:-1]):
            raise RowError(f"`{told}` is not what `chosen` and `rejected` answer")
        asked, used = (chosen[:-1], ()) if len(chosen) > 1 else read_prompt(row)
        prompt = with_system(asked, text(row, "system"))
        for key, answer in (("chosen", chosen[-1]), ("rejected", rejected[-1])):
            try:
                check_order([*prompt, answer])
            except RowError as error:
                raise RowError(f"{key}: {error.reason}") from None
        if chosen[-1] == rejected[-1]:
            raise RowError("`chosen` and `rejected` are the same")
        meta = rest(row, {"chosen", "rejected", "system", "tools", *used})
        return [Pair(tuple(prompt), chosen[-1], rejected[-1], origin, meta, read_tools(row.get("tools")))]


OPENAI = ("input", "preferred_output", "non_preferred_output")


def of_openai(row: Row) -> Row:
    """A row of OpenAI's preference files in our words; others as they are."""
    if not all(isinstance(row.get(key), kind) for key, kind in zip(OPENAI, (dict, list, list), strict=True)):
        return row
    asked, chosen, rejected = (row[key] for key in OPENAI)
    others = {key: value for key, value in row.items() if key not in OPENAI}
    return others | {"messages": asked.get("messages"), "tools": asked.get("tools"), "chosen": chosen,
                     "rejected": rejected}  # fmt: skip


def prompt_key(row: Row) -> str | None:
    """The column that holds the prompt, if any."""
    key = next((key for key in (*TURNS, "instruction") if row.get(key)), None)
    return key or first_key(row, PROMPTS)


def repeats(prompt: Any, asked: list[Message]) -> bool:
    """Whether a prompt column says what the conversations say themselves, or a part of it."""
    turns = prompt if isinstance(prompt, list) else [prompt]
    texts = [str(turn.get("content", turn.get("value", "")) if isinstance(turn, dict) else turn) for turn in turns]
    said = [normalised(message.content) for message in asked]
    return all(any(normalised(text) in one or one in normalised(text) for one in said) for text in texts if text)


def read_answer(value: Any, key: str, *, whole: bool) -> list[Message]:
    """The messages of an answer, the last of them the assistant's; with `whole` a text may be of all the turns."""
    if isinstance(value, str):
        messages = transcript(value) if whole and TURN.match(value) else [Message("assistant", value)]
    else:
        messages = read_messages([value] if isinstance(value, dict) else value, key)
    if not messages or messages[-1].role != "assistant":
        raise RowError(f"`{key}` does not end with an assistant turn")
    return messages


TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def transcript(text: str) -> list[Message]:
    """The turns of one text, as HH-RLHF writes them (Bai et al., arXiv 2204.05862)."""
    _, *parts = TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True)]


def read_prompt(row: Row) -> tuple[list[Message], tuple[str, ...]]:
    """The messages before the answer, and the columns they came from."""
    key = prompt_key(row)
    if key in TURNS:
        return read_messages(parsed(row[key], f"`{key}`"), key), (key,)
    if row.get("instruction") is not None:
        asked = "\n".join(part for part in (text(row, "instruction"), text(row, "input")) if part)
        return [*history(row.get("history")), Message("user", asked)], ("instruction", "input", "history")
    if key is None:
        raise RowError("no prompt: neither `conversations`, `messages`, `prompt` nor `instruction`")
    if isinstance(row[key], list):
        return read_messages(row[key], key), (key,)
    return [Message("user", text(row, key))], (key,)


def read_messages(value: Any, key: str) -> list[Message]:
    """Messages of either form, told apart turn by turn."""
    return [
        (sharegpt if "from" in turn else openai).message(turn, number)
        for number, turn in enumerate(turn_list(value, key), 1)
    ]
