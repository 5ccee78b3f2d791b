"""OpenAI messages: role and content, tool calls, per-message `train` (or OpenAI's own `weight`)."""

from __future__ import annotations

from typing import Any

from ...chat.types import Message, Origin, Sample
from ..readers import json_kind
from .plug import Columns, Row, RowError, renamed
from .turns import conversation, read_calls, read_role, turn_list

#: What is read of a message; lint tells of other keys.
READ = {"role", "content", "tool_calls", "function_call", "name", "tool_call_id", "train", "weight"}
READ |= {"reasoning_content", "reasoning", "thinking"}

#: Columns that may hold the turns.
TURNS = ("messages", "conversations", "conversation", "dialog")


class OpenAI:
    """`messages`: a list of {role, content}; see the message format of the Chat Completions and fine-tuning interfaces.

    `content` is text or a list of parts. Text parts are joined as they stand; `reasoning` and `tool_call` parts (an
    extended form in use) become reasoning_content and tool calls; any other part is refused.
    """

    name = "openai"
    keys = "messages: [{role, content}], [tools], [system]"
    fields: tuple[str, ...] = ("messages", "tools", "functions", "system")

    def matches(self, row: Row) -> bool:
        return turns_key(row, "role") is not None

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> list[Sample]:
        row = renamed(row, columns)
        key = turns_key(row, "role") or "messages"
        if key not in row:
            raise RowError("no `messages`")
        messages = [message(turn, number) for number, turn in enumerate(turn_list(row[key], key), 1)]
        return [conversation(messages, row, origin, (key,))]


def turns_key(row: Row, role_key: str) -> str | None:
    """The column that holds turns of the kind whose role is under `role_key`; None when there is none."""
    for key in TURNS:
        turns = row.get(key)
        if isinstance(turns, str) and turns.lstrip().startswith("[") and f'"{role_key}"' in turns:
            return key
        if isinstance(turns, list) and any(isinstance(turn, dict) and role_key in turn for turn in turns):
            return key
    return None


def message(turn: dict[str, Any], number: int) -> Message:
    """One message of a row; `number` is its place from 1, for reasons."""
    role = read_role(turn.get("role"), number)
    content, extra = read_content(turn.get("content"), number)
    calls = turn.get("tool_calls") or turn.get("function_call")
    if calls:
        extra["tool_calls"] = read_calls(calls, number)
    for key in ("name", "tool_call_id"):
        if turn.get(key) is not None:
            extra[key] = as_text(turn[key], f"turn {number}: `{key}`")
    for key in ("reasoning_content", "reasoning", "thinking"):
        if turn.get(key) is not None:
            extra["reasoning_content"] = as_text(turn[key], f"turn {number}: `{key}`")
            break
    if role != "assistant" and "tool_calls" in extra:
        raise RowError(f"turn {number}: tool calls in a {role} turn")
    return Message(role, content, trained(turn, number), extra=extra)


def read_content(content: Any, number: int) -> tuple[str, dict[str, Any]]:
    """Content as text, and what its parts hold besides text."""
    if content is None:  # as in an answer that is only tool calls; an answer with neither is found empty later
        return "", {}
    if isinstance(content, str):
        return content, {}
    if not isinstance(content, list):
        raise RowError(f"turn {number}: `content` is {json_kind(content)}, not text")
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        value = next((part[key] for key in ("text", "value") if part.get(key) is not None), None) if kind else part
        if kind == "text" or isinstance(part, str):
            texts.append(as_text(value, f"turn {number}: a text part"))
        elif kind == "reasoning":
            reasoning.append(as_text(value, f"turn {number}: a reasoning part"))
        elif kind == "tool_call":
            calls.extend(read_calls(value, number))
        else:
            shown = repr(kind) if isinstance(kind, str) else json_kind(part)
            raise RowError(
                f"turn {number}: a content part of kind {shown}; more than text comes with vision-language support"
            )
    extra: dict[str, Any] = {}
    if reasoning:
        extra["reasoning_content"] = "".join(reasoning)
    if calls:
        extra["tool_calls"] = calls
    return "".join(texts), extra


def trained(turn: dict[str, Any], number: int) -> bool:
    """Whether a turn is supervised: `train: true/false`, or `weight: 1/0` as OpenAI's fine-tuning files have it."""
    train, weight = turn.get("train"), turn.get("weight")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"turn {number}: `train` must be true or false")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"turn {number}: `weight` must be 0 or 1")
    return train is not False and weight != 0


def as_text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"{what} is {json_kind(value)}, not text")
    return value
