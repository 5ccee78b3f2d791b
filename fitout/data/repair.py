"""Bad rows: the rule that each fell under, a repair to suggest where one is certain enough, and repairs that a person
accepted.

A suggestion is only made when the repaired row converts; nothing is ever applied that was not accepted. Accepted
repairs stand in `repairs.jsonl` of the run directory, one a line, and belong to what made the prepared data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..chat.types import Conversation, Origin, Sample
from ..errors import DataError
from ..files import explain_os_errors
from .content import digest
from .formats import Columns, Format, Refused, RowError
from .formats.openai import TURNS
from .formats.turns import ROLES
from .readers import StrictJSON
from .rows import as_row, from_row

#: What a reason of a format means, in the words the report groups by; the first that is found in the reason.
RULES = (
    (r"the answer is empty|only an end marker|empty once", "empty answer"),
    (r"the user says nothing", "empty question"),
    (r"is due$|not the first$|tool calls|without tool calls", "role order"),
    (r"nothing answers it|no turns|is empty$", "no answer"),
    (r"spells the control token", "control token"),
    (r"is not known \(system", "unknown role"),
    (r"marked as bad|no assistant turn is trained", "marked not to train"),
    (r"vision-language", "not text"),
    (r"not text$|not an object$|not a list|must be|is text that is not JSON|pairs of text", "wrong type"),
    (r"^(an instance|instance \d+: )?no `|no prompt|without a name", "missing field"),
)
LONGEST = 200_000  # characters of a broken row that a repair is looked for in

Repairs = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Repair:
    """A row that could stand in place of a bad one: what was done to it, in words, and the row."""

    how: str
    row: Any


def rule_of(reason: str) -> str:
    """The named rule that a format's reason falls under."""
    return next((rule for pattern, rule in RULES if re.search(pattern, reason)), "not a sample")


def identity(origin: Origin, raw: Any) -> str:
    """Names a bad row by place and content, so that a repair is never applied to a row that has changed."""
    return digest(origin.file, origin.line, origin.part, raw).hex()[:16]


# suggesting


def suggest(raw: Any, origin: Origin, plug: Format, columns: Columns | None) -> Repair | None:
    """A repair of a row that could not be read (text) or converted (an object), if one of a few would make it whole."""
    if isinstance(raw, str):
        return _repaired_json(raw, origin, plug, columns)
    if not isinstance(raw, dict):
        return None
    for attempt in (_texts_for_values, _turns_in_order, _both):
        changed = attempt(raw)
        if changed is not None and _converts(changed.row, origin, plug, columns):
            return changed
    return None


def _converts(row: Any, origin: Origin, plug: Format, columns: Columns | None) -> bool:
    try:
        made = plug.convert(row, origin, columns)
    except RowError:
        return False
    return bool(made) and not any(isinstance(one, Refused) for one in made)


def _repaired_json(raw: str, origin: Origin, plug: Format, columns: Columns | None) -> Repair | None:
    """Broken JSON as json_repair reads it, and then a row that converts as it is or after one more repair."""
    if len(raw) > LONGEST or "{" not in raw:
        return None
    from json_repair import repair_json

    strict = StrictJSON()
    try:
        text = repair_json(raw[raw.index("{") :], ensure_ascii=False)
        row, _, fault = strict.decode(text)
    except (ValueError, RecursionError):
        return None
    if fault or not isinstance(row, dict) or not row:
        return None
    if _converts(row, origin, plug, columns):
        return Repair("JSON completed", row)
    further = suggest(row, origin, plug, columns)
    return Repair(f"JSON completed; {further.how}", further.row) if further else None


def _texts_for_values(row: dict[str, Any]) -> Repair | None:
    """Numbers, and lists of texts, in place of text."""
    changed = {}
    for key, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            changed[key] = str(value)
        elif isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            changed[key] = "\n".join(value)
    return Repair(f"{', '.join(changed)} written as text", {**row, **changed}) if changed else None


def _turns_in_order(row: dict[str, Any]) -> Repair | None:
    """Turns that alternate: neighbours of one role joined, what no one asked or answered left out."""
    key = next((key for key in TURNS if isinstance(row.get(key), list)), None)
    if key is None or not all(isinstance(turn, dict) for turn in row[key]):
        return None
    who, what = ("from", "value") if any("from" in turn for turn in row[key]) else ("role", "content")
    if not all(isinstance(turn.get(who), str) and isinstance(turn.get(what), str) for turn in row[key]):
        return None

    def role(turn: dict[str, Any]) -> str | None:
        return ROLES.get(turn[who].strip().lower())

    turns = [turn for turn in row[key] if turn[what].strip() or turn.get("tool_calls")]
    told = ["empty turns left out"] if len(turns) < len(row[key]) else []
    joined: list[dict[str, Any]] = []
    for turn in turns:
        if joined and role(turn) == role(joined[-1]) and role(turn) in ("system", "user", "assistant"):
            joined[-1] = {**joined[-1], what: joined[-1][what] + "\n\n" + turn[what]}
            told.append(f"neighbouring {role(turn)} turns joined")
        else:
            joined.append(dict(turn))
    first = 1 if joined and role(joined[0]) == "system" else 0
    if len(joined) > first and role(joined[first]) == "assistant":
        del joined[first]
        told.append("the answer that no one asked for left out")
    while len(joined) > first and role(joined[-1]) != "assistant":
        joined.pop()
        told.append("the last turn, which nothing answers, left out")
    if not told or len(joined) <= first:
        return None
    return Repair("; ".join(dict.fromkeys(told)), {**row, key: joined})


def _both(row: dict[str, Any]) -> Repair | None:
    turned = _turns_in_order(row)
    written = _texts_for_values(turned.row) if turned else None
    return Repair(f"{turned.how}; {written.how}", written.row) if turned and written else None


def without_control(sample: Sample, control: Sequence[str]) -> Repair | None:
    """A conversation whose spelled control tokens are broken up by a blank, so that they stay readable text."""
    if not isinstance(sample, Conversation):
        return None
    pattern = re.compile("|".join(re.escape(token) for token in sorted(filter(None, control), key=len, reverse=True)))
    row = as_row(sample)

    def apart(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: found[0][0] + " " + found[0][1:], value)
        if isinstance(value, list):
            return [apart(one) for one in value]
        if isinstance(value, dict):
            return {apart(key): apart(one) for key, one in value.items()}
        return value

    changed = {**row, "messages": apart(row["messages"]), "tools": apart(row["tools"])}
    return Repair("control tokens broken up by a blank", changed) if changed != row else None


# accepted


def read_repairs(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that people edit; none where there is no file. Raises DataError for one that is no object."""
    if not path.exists():
        return []
    found = []
    with explain_os_errors(path, "read"):
        lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row = error
        if not isinstance(row, dict):
            raise DataError(
                f"this is no repair: {row if isinstance(row, Exception) else 'not an object'}",
                where=f"{path}:{number}",
                harm="What was accepted there would be left out.",
                hint="Correct the line: one JSON object, as `fitout data repair` writes them.",
            )
        found.append(row)
    return found


def accepted(path: Path) -> Repairs:
    """The accepted repairs in a file, by the identity of the row they are for; none where there is no file.

    Raises DataError for an accepted line without a row.
    """
    found: Repairs = {}
    for number, row in enumerate(read_repairs(path), 1):
        if row.get("accept") is not True:
            continue
        if not isinstance(row.get("id"), str) or not row.get("row"):
            raise DataError(
                "an accepted repair without `id` or `row`",
                where=f"{path}:{number}",
                harm="There is nothing to put in place of the bad row.",
                hint="Write the repaired row under `row`, or set `accept` to false.",
            )
        found[row["id"]] = row
    return found


def readmitted(repair: dict[str, Any], origin: Origin, plug: Format, columns: Columns | None) -> Iterator[Any]:
    """The samples of an accepted repair, at the origin of the row it replaces, or a Refused with the reason."""
    row = repair["row"]
    try:
        if repair.get("as") == "sample":
            yield from_row(row)
            return
        made = plug.convert(row, origin, columns) if isinstance(row, dict) else []
        if not made:
            raise RowError("the accepted repair is not an object")
        yield from made
    except RowError as error:
        yield Refused(origin, f"the accepted repair: {error.reason}", row)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        yield Refused(origin, f"the accepted repair is no sample: {error!r}", row)


def draft(
    quarantine: list[dict[str, Any]], before: list[dict[str, Any]], accept: Sequence[str]
) -> list[dict[str, Any]]:
    """Lines for `repairs.jsonl`: what is there already, then each quarantined row with its suggested repair, for a
    person to accept or to edit. `accept` names rules (or `all`) whose suggestions are accepted."""
    lines = {line["id"]: dict(line) for line in before}
    for bad in quarantine:
        if bad["id"] not in lines:
            repair = bad.get("repair")
            lines[bad["id"]] = {
                "accept": False,
                **{key: bad[key] for key in ("id", "file", "line", "part", "rule", "reason", "as")},
                "how": repair["how"] if repair else None,
                "row": repair["row"] if repair else bad["row"],
            }
    still = {bad["id"] for bad in quarantine}
    for line in lines.values():
        if line["id"] in still and line["how"] and ("all" in accept or line["rule"] in accept):
            line["accept"] = True
    return list(lines.values())


def shown(row: Any, longest: int = 160) -> str:
    """A row in one line, for a table."""
    text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
    return text if len(text) <= longest else text[: longest - 1] + "…"
