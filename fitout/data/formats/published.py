"""Data sets with a form of their own: CLINC150, CrossWOZ, the model solutions of GSM8K."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from ...chat.types import Conversation, Message, Origin, Pair, Sample
from ..readers import json_kind
from .plug import Columns, Refused, Row, RowError
from .turns import check_answered, check_order, conversation, read_role


class Clinc:
    """CLINC150: lists of [text, intent] under the names of the parts; the part's name is kept as `part`.

    The intents' domains stand in a file of their own, {domain: [intent, ...]}.
    """

    name = "clinc150"
    keys = "train, val, test, oos_...: [[text, intent], ...] (CLINC150)"
    fields: tuple[str, ...] = ()

    def matches(self, row: Row) -> bool:
        return bool(row) and all(is_list_of_two(value) for value in row.values())

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        found: list[Sample | Refused] = []
        for part, rows in row.items():
            if not isinstance(rows, list):
                raise RowError(f"`{part}` is {json_kind(rows)}, not a list of [text, intent]")
            for one in rows:
                here = Origin(origin.file, origin.line, origin.part + len(found) + 1)
                if not (
                    isinstance(one, list)
                    and len(one) == 2
                    and all(isinstance(text, str) and text.strip() for text in one)
                ):
                    found.append(Refused(here, f"in `{part}`: not a [text, intent] of two texts", one))
                    continue
                messages = (Message("user", one[0]), Message("assistant", one[1]))
                found.append(Conversation(messages, here, (), {"part": part, "intent": one[1]}))
        if not found:
            raise RowError("all its lists are empty")
        return found


def is_list_of_two(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, list) and len(one) == 2 for one in value[:20])


class CrossWoz:
    """CrossWOZ: a map from ids to dialogues of `messages` between "usr" and "sys"."""

    name = "crosswoz"
    keys = "{id: {messages: [{role: usr or sys, content}], goal}} (CrossWOZ)"
    fields: tuple[str, ...] = ()

    def matches(self, row: Row) -> bool:
        return bool(row) and all(isinstance(one, dict) and "messages" in one and "goal" in one for one in row.values())

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        found: list[Sample | Refused] = []
        for number, (key, dialogue) in enumerate(row.items(), 1):
            here = Origin(origin.file, origin.line, origin.part + number)
            try:
                if not isinstance(dialogue, dict) or not isinstance(dialogue.get("messages"), list):
                    raise RowError("a dialogue without `messages`")
                turns = [spoken(turn, at) for at, turn in enumerate(dialogue["messages"], 1)]
                kind = {"task": dialogue["type"]} if isinstance(dialogue.get("type"), str) else {}
                found.append(conversation(turns, {"id": key, **kind}, here, ()))
            except RowError as error:
                found.append(Refused(here, error.reason, {key: dialogue}))
        if not found:
            raise RowError("no dialogues")
        return found


def spoken(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
        raise RowError(f"turn {number} has no text")
    role = {"usr": "user", "sys": "assistant"}.get(str(turn.get("role")))
    return Message(role or read_role(turn.get("role"), number), turn["content"])


class Gsm8kSolutions:
    """GSM8K's `example_model_solutions`: solutions of several models, each marked right or wrong. Every right one, the
    given solution among them, is preferred to every wrong one."""

    name = "gsm8k_solutions"
    keys = "question, ground_truth, MODEL: {solution, is_correct} (GSM8K model solutions)"
    fields: tuple[str, ...] = ()

    def matches(self, row: Row) -> bool:
        return "question" in row and "ground_truth" in row and any(is_solution(value) for value in row.values())

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        question, given = row.get("question"), row.get("ground_truth")
        if not isinstance(question, str) or not isinstance(given, str):
            raise RowError("`question` or `ground_truth` is no text")
        solutions = {model: value for model, value in row.items() if is_solution(value)}
        right = {"ground_truth": given} | {m: one["solution"] for m, one in solutions.items() if one["is_correct"]}
        wrong = {m: one["solution"] for m, one in solutions.items() if not one["is_correct"]}
        if not wrong:
            raise RowError("every solution is right; there is nothing to prefer one to")
        found: list[Sample | Refused] = []
        for (better, good), (worse, bad) in product(right.items(), wrong.items()):
            here = Origin(origin.file, origin.line, len(found) + 1)
            prompt = (Message("user", question),)
            chosen, rejected = Message("assistant", good), Message("assistant", bad)
            try:
                for answer in (chosen, rejected):
                    check_order([*prompt, answer])
                    check_answered([*prompt, answer])
                found.append(Pair(prompt, chosen, rejected, here, {"chosen_by": better, "rejected_by": worse}))
            except RowError as error:
                found.append(Refused(here, error.reason, {"chosen": good, "rejected": bad}))
        return found


def is_solution(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("solution"), str) and isinstance(value.get("is_correct"), bool)
    )
