"""Samples as rows of other forms: what `data pull` and `data export` write; read back by the form's own format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from ..chat.types import Conversation, Message, Pair, Sample, Text

Row = dict[str, Any]


class Unwritable(ValueError):
    """Why a form cannot say what a sample says. Such a sample is left out and counted, never bent."""


def as_openai(sample: Sample) -> Row:
    """`messages` with everything a sample has; pairs as {prompt, chosen, rejected}, plain text as {text}.

    The rest of the row (task labels, ratings, ...) stands beside them and comes back as the sample's meta.
    """
    match sample:
        case Conversation():
            row: Row = {"messages": [said(message) for message in sample.messages]}
            if sample.tools:
                row["tools"] = list(sample.tools)
        case Pair():
            row = {
                "prompt": [said(message) for message in sample.prompt],
                "chosen": [said(sample.chosen)],
                "rejected": [said(sample.rejected)],
            }
            if sample.tools:
                row["tools"] = list(sample.tools)
        case Text():
            row = {"text": sample.text}
    return beside(row, sample)


def said(message: Message) -> Row:
    """A message as a row has it; `train: false` where an assistant's turn is context only."""
    hidden = message.role == "assistant" and not message.train
    return message.as_dict() | ({"train": False} if hidden else {})


def beside(row: Row, sample: Sample) -> Row:
    return row | {key: value for key, value in sample.meta.items() if key not in row}


# --- OpenAI's fine-tuning files ----------------------------------------------------------------------------------


def as_openai_finetuning(sample: Sample) -> Row:
    """A line of OpenAI's fine-tuning file: chat form, or for pairs the preference form. Nothing else stands in it."""
    match sample:
        case Conversation():
            return {"messages": wire(sample.messages)} | ({"tools": list(sample.tools)} if sample.tools else {})
        case Pair():
            return {
                "input": {"messages": wire(sample.prompt)} | ({"tools": list(sample.tools)} if sample.tools else {}),
                "preferred_output": wire((sample.chosen,)),
                "non_preferred_output": wire((sample.rejected,)),
            }
        case Text():
            raise Unwritable("plain text; OpenAI trains on conversations")


def wire(messages: tuple[Message, ...]) -> list[Row]:
    """Messages as OpenAI's interface has them: arguments as JSON text, every call with an id and its answer."""
    rows = []
    open_calls: list[str] = []
    for number, message in enumerate(messages, 1):
        extra = dict(message.extra)
        row: Row = {"role": message.role, "content": message.content}
        if message.role == "tool":
            named = extra.pop("tool_call_id", None)
            if named is None and open_calls:
                named = open_calls[0]
            if named not in open_calls:
                raise Unwritable("a tool's answer that belongs to no call")
            open_calls.remove(named)
            row["tool_call_id"] = named
        elif open_calls:
            raise Unwritable("a tool call that is not answered")
        calls = extra.pop("tool_calls", None)
        if calls:
            row["content"] = message.content or None
            row["tool_calls"] = [wire_call(call, f"call_{number}_{at}") for at, call in enumerate(calls, 1)]
            open_calls = [call["id"] for call in row["tool_calls"]]
        if name := extra.pop("name", None):
            row["name"] = name
        if extra:
            raise Unwritable(f"it has {', '.join(sorted(extra))}, which OpenAI's form does not")
        if message.role == "assistant" and not message.train:
            row["weight"] = 0
        rows.append(row)
    return rows


def wire_call(call: Row, named: str) -> Row:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {"id": call.get("id", named), "type": "function", "function": {**function, "arguments": arguments}}


NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ROLES = {"system", "user", "assistant", "tool"}
KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id"}


def openai_faults(row: Row) -> list[str]:
    """What OpenAI would refuse in a line: roles, empty turns, weights, names, calls (its guide to fine-tuning data).

    Written apart from `as_openai_finetuning`, as a check of it.
    """
    if "input" in row:
        faults = message_faults(row["input"].get("messages", []))
        for key in ("preferred_output", "non_preferred_output"):
            output = row.get(key)
            if not isinstance(output, list) or len(output) != 1 or output[0].get("role") != "assistant":
                faults.append(f"`{key}` is not one assistant message")
            else:
                faults += message_faults(output)
        return faults
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        return ["no messages"]
    faults = message_faults(messages)
    answers = [one for one in messages if one.get("role") == "assistant"]
    if not answers:
        faults.append("no assistant message")
    elif all(one.get("weight") == 0 for one in answers):
        faults.append("every assistant message has weight 0")
    if messages[-1].get("role") != "assistant":
        faults.append("the last message is not the assistant's")
    if unknown := set(row) - {"messages", "tools", "parallel_tool_calls"}:
        faults.append(f"unknown keys {sorted(unknown)}")
    names = [tool.get("function", {}).get("name") for tool in row.get("tools", [])]
    faults += [f"the tool name {name!r}" for name in names if not (isinstance(name, str) and NAME.fullmatch(name))]
    return faults


def message_faults(messages: list[Row]) -> list[str]:
    faults = []
    for number, one in enumerate(messages, 1):
        role, content, calls = one.get("role"), one.get("content"), one.get("tool_calls")
        if role not in ROLES:
            faults.append(f"message {number}: the role {role!r}")
        if unknown := set(one) - KEYS:
            faults.append(f"message {number}: unknown keys {sorted(unknown)}")
        if not (isinstance(content, str) and content) and not (role == "assistant" and calls and content is None):
            faults.append(f"message {number}: no content")
        if "weight" in one and (role != "assistant" or one["weight"] not in (0, 1)):
            faults.append(f"message {number}: a weight that is not 0 or 1, or not the assistant's")
        if "name" in one and not NAME.fullmatch(str(one["name"])):
            faults.append(f"message {number}: the name {one['name']!r}")
        if role == "tool" and not isinstance(one.get("tool_call_id"), str):
            faults.append(f"message {number}: a tool's answer without tool_call_id")
        for call in calls or []:
            function = call.get("function", {})
            if not isinstance(call.get("id"), str) or not isinstance(function.get("arguments"), str):
                faults.append(f"message {number}: a call without an id or with arguments that are not JSON text")
            if not NAME.fullmatch(str(function.get("name"))):
                faults.append(f"message {number}: the function name {function.get('name')!r}")
    return faults


def openai_tokens(row: Row, count: Callable[[str], int]) -> int:
    """Tokens of a line as OpenAI's published counting has them: 3 a message, 1 a name, 3 a line, and the texts.

    `count` gives a text's tokens; with another tokenizer than OpenAI's the sum is an estimate.
    """
    total = 3
    listed = [*row.get("messages", []), *row.get("input", {}).get("messages", [])]
    for one in [*listed, *row.get("preferred_output", []), *row.get("non_preferred_output", [])]:
        total += 3 + ("name" in one)
        total += sum(count(value) for key, value in one.items() if isinstance(value, str) and key != "tool_call_id")
        if one.get("tool_calls"):
            total += count(json.dumps([call["function"] for call in one["tool_calls"]], ensure_ascii=False))
    return total + (count(json.dumps(row["tools"], ensure_ascii=False)) if row.get("tools") else 0)


# --- Alpaca, ShareGPT --------------------------------------------------------------------------------------------


def as_alpaca(sample: Sample) -> Row:
    """instruction, input (always empty), output, system, history. Only questions and answers fit in it."""
    talk = conversation(sample, "Alpaca")
    turns = list(talk.messages)
    system = turns.pop(0).content if turns[0].role == "system" else ""
    if [turn.role for turn in turns] != ["user", "assistant"] * (len(turns) // 2) or any(turn.extra for turn in turns):
        raise Unwritable("it has tools, reasoning or other turns than question and answer")
    pairs = [[turns[at].content, turns[at + 1].content] for at in range(0, len(turns), 2)]
    *history, (instruction, output) = pairs
    row: Row = {"instruction": instruction, "input": "", "output": output}
    return beside(row | ({"system": system} if system else {}) | ({"history": history} if history else {}), sample)


def as_sharegpt(sample: Sample) -> Row:
    """conversations of {from, value} with function_call and observation; tools as JSON text."""
    talk = conversation(sample, "ShareGPT")
    turns = []
    for message in talk.messages:
        calls = message.extra.get("tool_calls")
        if set(message.extra) - {"tool_calls", "tool_call_id"} or (calls and message.content.strip()):
            raise Unwritable("it has reasoning, names or text beside a tool call")
        if calls:
            functions = [call["function"] for call in calls]
            value = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
            turns.append({"from": "function_call", "value": value})
        else:
            turns.append({"from": SHAREGPT[message.role], "value": message.content})
    row: Row = {"conversations": turns}
    if talk.tools:
        row["tools"] = json.dumps([tool["function"] for tool in talk.tools], ensure_ascii=False)
    return beside(row, sample)


SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}


def conversation(sample: Sample, form: str) -> Conversation:
    if not isinstance(sample, Conversation):
        raise Unwritable(f"a {'pair' if isinstance(sample, Pair) else 'plain text'}; {form} holds conversations")
    if any(message.role == "assistant" and not message.train for message in sample.messages):
        raise Unwritable(f"it has answers that are not to be trained, and {form} cannot say so")
    return sample
