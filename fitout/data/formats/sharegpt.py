"""ShareGPT: `conversations` of {from, value}, with function_call and observation for tools."""

from __future__ import annotations

from typing import Any

from ...chat.types import Message, Origin, Sample
from .openai import as_text, trained, turns_key
from .plug import Columns, Row, RowError, renamed
from .turns import conversation, read_calls, read_role, turn_list

#: What is read of a turn; lint tells of other keys.
READ = {"from", "value", "train", "weight"}


class ShareGPT:
    name = "sharegpt"
    keys = "conversations: [{from, value}], [tools], [system]"
    fields: tuple[str, ...] = ("conversations", "tools", "system")

    def matches(self, row: Row) -> bool:
        return turns_key(row, "from") is not None

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> list[Sample]:
        row = renamed(row, columns)
        key = turns_key(row, "from") or "conversations"
        if key not in row:
            raise RowError("no `conversations`")
        messages = [message(turn, number) for number, turn in enumerate(turn_list(row[key], key), 1)]
        return [conversation(messages, row, origin, (key,))]


def message(turn: dict[str, Any], number: int) -> Message:
    """One turn; a `function_call` is an assistant turn whose value is the call as JSON."""
    role = read_role(turn.get("from"), number)
    value = turn.get("value")
    if str(turn["from"]).strip().lower() == "function_call":
        return Message(role, "", trained(turn, number), extra={"tool_calls": read_calls(value, number)})
    return Message(role, as_text(value, f"turn {number}: `value`"), trained(turn, number))
