"""OASST trees: a prompt and its ranked replies, their replies, and so on (Open Assistant's export, one tree a row).

The form is Open Assistant's `ExportMessageTree`: messages of {text, role, rank, deleted, replies}, rank 0 the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from ...chat.types import Conversation, Message, Origin, Pair, Sample
from ..readers import json_kind
from .plug import Columns, Refused, Row, RowError
from .turns import check_order

ROLES = {"prompter": "user", "assistant": "assistant"}
Turns = tuple[dict[str, Any], ...]


class Oasst:
    """A conversation for each answer that ends a branch. Branches share their beginnings: every answer of the tree is
    trained once, in the shortest branch that has it (the last one to be too long), and context in the others."""

    name = "oasst"
    keys = "message_tree_id, prompt: {text, role, replies} (Open Assistant trees; `oasst_pairs` for their rankings)"
    fields: tuple[str, ...] = ()

    def matches(self, row: Row) -> bool:
        return isinstance(row.get("prompt"), dict) and "replies" in row["prompt"]

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        ends: list[tuple[Turns, str]] = []
        for turns, fault in branches(row):
            if not fault and said_by(turns[-1]) == "user":
                fault = "" if replies(turns[-1]) else "nobody has answered this turn"
                if not fault:
                    continue
            elif not fault and any(sound((*turns, question)) for question in sound(turns)):
                continue  # the branch goes on
            ends.append((turns, fault))
        trains: dict[int, Turns] = {}  # by answer, the branch that trains it
        for turns, fault in sorted(ends, key=lambda end: 0 if end[1] else sum(len(one["text"]) for one in end[0])):
            if not fault:
                for one in turns:
                    trains.setdefault(id(one), turns)
        found: list[Sample | Refused] = []
        for turns, fault in ends:
            here, last = Origin(origin.file, origin.line, len(found) + 1), turns[-1]
            if fault:
                found.append(Refused(here, fault, last.get("text")))
                continue
            messages = tuple(Message(said_by(one), one["text"], train=trains[id(one)] is turns) for one in turns)
            rank = {"rank": last["rank"]} if isinstance(last.get("rank"), int) else {}
            found.append(Conversation(messages, here, (), about(row) | rank))
        return found


class OasstPairs:
    """A preference pair for every two ranked answers to the same turns, the better one chosen."""

    name = "oasst_pairs"
    keys = Oasst.keys
    fields: tuple[str, ...] = ()

    def matches(self, row: Row) -> bool:
        return False  # the same rows as `oasst`; which of the two is meant has to be said

    def convert(self, row: Row, origin: Origin, columns: Columns | None = None) -> Sequence[Sample | Refused]:
        found: list[Sample | Refused] = []
        for turns, fault in branches(row):
            if fault:
                found.append(Refused(Origin(origin.file, origin.line, len(found) + 1), fault, turns[-1].get("text")))
            elif said_by(turns[-1]) == "user":
                prompt = tuple(Message(said_by(one), one["text"]) for one in turns)
                ranked = sorted((one for one in replies(turns[-1]) if is_ranked(one)), key=lambda one: one["rank"])
                for good, bad in combinations(ranked, 2):
                    here = Origin(origin.file, origin.line, len(found) + 1)
                    chosen, rejected = Message("assistant", good["text"]), Message("assistant", bad["text"])
                    ranks = {"ranks": [good["rank"], bad["rank"]]}
                    if good["text"] == bad["text"] or good["rank"] == bad["rank"]:
                        found.append(Refused(here, "two answers of the same text or rank", ranks))
                    else:
                        found.append(Pair(prompt, chosen, rejected, here, about(row) | ranks))
        if not found:
            raise RowError("nowhere in the tree are two ranked answers to the same turns")
        return found


def branches(row: Row) -> Iterator[tuple[Turns, str]]:
    """Every message of the tree with the turns before it, and what is wrong with it; what follows a bad one is left
    out with it. Raises RowError when there is no tree."""
    prompt = row.get("prompt")
    if not isinstance(prompt, dict):
        raise RowError(f"`prompt` is {json_kind(prompt)}, not a message with replies")
    todo: list[Turns] = [(prompt,)]
    while todo:
        turns = todo.pop()
        fault = wrong(turns)
        yield turns, fault
        if not fault:
            todo.extend((*turns, reply) for reply in reversed(replies(turns[-1])))


def wrong(turns: Turns) -> str:
    last = turns[-1]
    if not isinstance(last.get("text"), str) or not isinstance(last.get("replies", []), list):
        return "a message without text, or whose replies are no list"
    if not all(isinstance(reply, dict) for reply in last.get("replies", [])):
        return "a reply that is no message"
    if not isinstance(last.get("role"), str) or last["role"] not in ROLES:
        return "a message whose role is neither prompter nor assistant"
    if last.get("deleted") is True or last.get("review_result") is False:
        return "a message that was deleted or did not pass review"
    try:
        check_order([Message(said_by(one), one["text"]) for one in turns])
    except RowError as error:
        return error.reason
    return ""


def replies(message: dict[str, Any]) -> list[dict[str, Any]]:
    return message.get("replies") or []


def sound(turns: Turns) -> list[dict[str, Any]]:
    """The replies to the last turn with which nothing is wrong."""
    return [reply for reply in replies(turns[-1]) if not wrong((*turns, reply))]


def said_by(message: dict[str, Any]) -> str:
    return ROLES[message["role"]]


def is_ranked(message: dict[str, Any]) -> bool:
    rank = message.get("rank")
    fine = isinstance(rank, int) and not isinstance(rank, bool)
    return (
        fine
        and isinstance(message.get("text"), str)
        and bool(message["text"].strip())
        and (
            ROLES.get(str(message.get("role"))) == "assistant"
            and message.get("deleted") is not True
            and message.get("review_result") is not False
        )
    )


def about(row: Row) -> dict[str, Any]:
    return {key: row[key] for key in ("message_tree_id", "tree_state") if isinstance(row.get(key), str)}
