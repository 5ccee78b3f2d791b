"""Checks and pieces that all conversation formats share: the order of turns, tool calls, tools, content in parts."""

from __future__ import annotations

from typing import Any

from ...chat.types import Conversation, Message, Origin
from ..readers import json_kind
from .plug import Row, RowError, parsed, rest, text

#: Words for a role, over all formats, and the role they mean.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}


def conversation(messages: list[Message], row: Row, origin: Origin, used: tuple[str, ...]) -> Conversation:
    """A checked conversation with the row's `system` and `tools`; the columns left over are its meta."""
    messages = with_system(messages, text(row, "system"))
    check_order(messages)
    check_answered(messages)
    tools = read_tools(row.get("tools") if row.get("tools") is not None else row.get("functions"))
    meta = rest(row, {*used, "system", "tools", "functions"})
    return Conversation(tuple(messages), origin, tools, meta)


def with_system(messages: list[Message], system: str) -> list[Message]:
    """Puts the `system` column first. An empty column says nothing; one that contradicts the turns is refused."""
    if not system.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content != system:
            raise RowError("a system turn and a `system` column that say different things")
        return messages
    return [Message("system", system), *messages]


def check_order(messages: list[Message]) -> None:
    """System only first; user and assistant in turn; tool turns only after tool calls. Raises RowError."""
    if not messages:
        raise RowError("no turns")
    before: Message | None = None
    for number, message in enumerate(messages, 1):
        role = message.role
        after = "first" if before is None else f"after {before.role}"
        if role == "system":
            if number > 1:
                raise RowError(f"turn {number}: a system turn that is not the first")
        elif role == "user":
            if before is not None and before.role == "assistant" and before.extra.get("tool_calls"):
                raise RowError(f"turn {number}: user after tool calls that no tool turn answers")
            if before is not None and before.role not in ("system", "assistant"):
                raise RowError(f"turn {number}: user {after}, where an assistant turn is due")
            if not message.content.strip():
                raise RowError(f"turn {number}: the user says nothing")
        elif role == "assistant":
            if before is None or before.role not in ("user", "tool"):
                raise RowError(f"turn {number}: assistant {after}, where a user turn is due")
            if not message.content.strip() and not message.extra.get("tool_calls"):
                raise RowError(f"turn {number}: the answer is empty")
        elif before is None or not (before.role == "tool" or before.extra.get("tool_calls")):
            raise RowError(f"turn {number}: tool {after}, without tool calls before it")
        before = message


def check_answered(messages: list[Message]) -> None:
    """The last turn is the assistant's and some assistant turn is trained. Raises RowError."""
    if messages[-1].role != "assistant":
        raise RowError(f"the last turn is the {messages[-1].role}'s; nothing answers it")
    if not any(message.role == "assistant" and message.train for message in messages):
        raise RowError("no assistant turn is trained (`train: false` or `weight: 0` on all of them)")


def read_role(word: Any, number: int) -> str:
    role = ROLES.get(word.strip().lower()) if isinstance(word, str) else None
    if role is None:
        shown = repr(word[:40]) if isinstance(word, str) else json_kind(word)
        raise RowError(f"turn {number}: the role {shown} is not known (system, user, assistant, tool)")
    return role


def turn_list(value: Any, key: str) -> list[dict[str, Any]]:
    """The turns of a row as a list of objects, also when they come as JSON text."""
    value = parsed(value, f"`{key}`")
    if not isinstance(value, list):
        raise RowError(f"`{key}` is {json_kind(value)}, not a list of turns")
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict):
            raise RowError(f"turn {number} is {json_kind(turn)}, not an object")
    return value


def read_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls as chat templates read them: {"type": "function", "function": {"name", "arguments": object}}.

    Takes that form and the bare {"name", "arguments"}, one or a list of them, arguments also as JSON text.
    """
    value = parsed(value, f"turn {number}: the tool call")
    if value is None:
        return []
    return [read_call(call, number) for call in (value if isinstance(value, list) else [value])]


def read_call(call: Any, number: int) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowError(f"turn {number}: a tool call is {json_kind(call)}, not an object")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise RowError(f"turn {number}: a tool call without a name")
    arguments = parsed(function.get("arguments"), f"turn {number}: the arguments of {name}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"turn {number}: the arguments of {name} are {json_kind(arguments)}, not an object")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def read_tools(value: Any) -> tuple[dict, ...]:
    """The tools on offer, each as {"type": "function", "function": {...}}; takes bare functions and JSON text too."""
    value = parsed(value, "`tools`")
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError("`tools` is not a list of objects")
    bare = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in value]
    tools = tuple({"type": "function", "function": function} for function in bare)
    if not all(isinstance(tool["function"].get("name"), str) for tool in tools):
        raise RowError("a tool without a name")
    return tools
