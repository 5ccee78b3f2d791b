"""Prompt and completion, under the many names that question and answer go by; a column of labels is an answer too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...chat.types import Message, Origin, Sample
from ..readers import json_kind
from . import openai
from .doccano import WHICH
from .plug import Columns, Row, RowError, first_key, renamed, text
from .turns import conversation, turn_list

PROMPTS = ("prompt", "question", "query", "input", "source", "text")
ANSWERS = ("completion", "response", "answer", "std_answer", "output", "target", "label")


class PromptCompletion:
    """One question and its answer. Both may be lists of messages, as TRL's conversational form has them; answers within
    the prompt are then context, unless a turn says `train: true` itself."""

    name = "prompt_completion"
    keys = f"prompt (or {', '.join(PROMPTS[1:])}), completion (or {', '.join(ANSWERS[1:])}), [system]"
    fields: tuple[str, ...] = ("prompt", "completion", "system", "tools")

    def matches(self, row: Row) -> bool:
        return first_key(row, PROMPTS) is not None and first_key(row, ANSWERS) is not None

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> list[Sample]:
        row = renamed(row, columns)
        prompt, answer = first_key(row, PROMPTS), first_key(row, ANSWERS)
        if prompt is None or answer is None:
            raise RowError(f"no `{'prompt' if prompt is None else 'completion'}`")
        messages = turns(row, prompt, "user") + turns(row, answer, "assistant")
        return [conversation(messages, row, origin, (prompt, answer))]


def turns(row: Row, key: str, role: str) -> list[Message]:
    """A field as messages: text is one turn of `role`, a list of messages is itself; of a `user`'s field, the prompt,
    what does not say itself whether it is trained is context."""
    value: Any = row[key]
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        given = turn_list(value, key)
        messages = [openai.message(turn, number) for number, turn in enumerate(given, 1)]
        return [
            replace(one, train=False) if role == "user" and not {"train", "weight"} & turn.keys() else one
            for one, turn in zip(messages, given, strict=True)
        ]
    if isinstance(value, list):
        # Label columns are often lists of one (Doccano, SQuAD-like answers); more than one has no single answer.
        if len(value) != 1 or not isinstance(value[0], str):
            inside = "of " + str(len(value)) if len(value) != 1 else f"holding {json_kind(value[0])}"
            raise RowError(f"`{key}` is a list {inside}, not one text" + (f"; {WHICH}" if len(value) > 1 else ""))
        return [Message(role, value[0])]
    return [Message(role, text(row, key))]
