"""From a recipe to prepared data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import RequestError
from ..rundir import RunDir
from .working import Screen, main_process

if TYPE_CHECKING:
    from ..chat.render import Chat
    from ..data.store import Prepared


def prepare_data(recipe: Recipe, directory: RunDir, chat: Chat, screen: Screen) -> tuple[Prepared, dict[str, Any]]:
    from ..data.prepare import prepare, summary

    if recipe.data.repairs and not Path(recipe.data.repairs).is_file():
        raise RequestError(
            f"there is no file {recipe.data.repairs}",
            where="data.repairs",
            harm="The rows that were repaired would be left out.",
            hint="Correct the path, or make the file: fitout data repair RECIPE.",
        )
    if recipe.objective.wants != "text":
        chat.check()
    for note in chat.notes:
        screen.say(note)
    prepared, report = prepare(
        recipe.data, chat, recipe.objective.wants, directory, seed=split_seed(recipe),
        trained=directory.read_status().get("data_fingerprint") if directory.has_training() else None,
        progress=screen.data_progress, say=screen.say,
    )  # fmt: skip
    screen.say(summary(report))
    for stage in report.get("stages", ()):  # data prepared by an earlier version have no record of them
        screen.say(f"  {stage['told']}")
    for line in told(report):
        screen.say(f"  {line}")
    for note in report["notes"]:
        if note not in chat.notes:  # those were told already
            screen.say(f"  {note}")
    part = report["parts"]["train"]
    share = 100 * part["supervised"] / max(1, part["tokens"])
    screen.say(f"training tokens: {part['tokens']:,}, of them trained {part['supervised']:,} ({share:.0f} %)")
    if unknown := part.get("unknown"):  # data prepared by an earlier version have no count of it
        screen.say(
            f"{unknown:,} training tokens are unknown to the tokenizer: what they stood for is lost to the model"
        )
    for name in ("validation", "test"):
        if getattr(recipe.data.split, name) and not report["kept"][name]:
            screen.say(f"no sample is left in the {name} part; a source of its own has `split: {name}`")
    if part["no_end"]:
        screen.say(f"{part['no_end']:,} training answers have no trained end of turn (cut to max_length)")
    if main_process():
        directory.update_status(data_fingerprint=prepared.fingerprint)
    return prepared, report


def told(report: dict[str, Any]) -> list[str]:
    """What was quarantined, removed and changed, a line for each rule, the commonest reasons with it."""
    lines = []
    for what in ("quarantined", "removed", "repaired"):
        for rule, count in report[what].items():
            reasons = report.get("reasons", {}).get(rule, {}) if what == "quarantined" else {}
            why = f" ({'; '.join(list(reasons)[:2])}{'; ...' if len(reasons) > 2 else ''})" if reasons else ""
            lines.append(f"{what} {count:,}: {rule}{why}")
    return lines


@dataclass(frozen=True)
class Repaired:
    """What `fitout data repair` found and did: the file of repairs, a line for each rule, and the data report."""

    path: Path
    rules: list[dict[str, Any]]  # rule, quarantined, suggested, and an example {where, how, before, after}
    admitted: int
    report: dict[str, Any]


def repair_data(
    recipe: Recipe, directory: RunDir, chat: Chat, accept: Sequence[str], screen: Screen
) -> Repaired:  # fmt: skip
    """Writes what could be repaired to `repairs.jsonl`, and prepares again with what is accepted there."""
    from ..data.prepare import repairs_file
    from ..data.repair import draft, read_repairs, shown
    from ..files import read_jsonl, write_jsonl

    if directory.has_training():
        raise RequestError(
            "this run has begun training",
            where=str(directory.path),
            harm="Repaired rows would change its data, and its checkpoints could not be gone on from.",
            hint="Repair under another --out or `name:`, and train anew.",
        )
    path = repairs_file(recipe.data, directory)
    if recipe.data.repairs and not path.exists():
        write_jsonl(path, [])
    _, report = prepare_data(recipe, directory, chat, Screen())
    quarantine = read_jsonl(directory.quarantine)
    known = {bad["rule"] for bad in quarantine}
    for rule in accept:
        if rule != "all" and rule not in known:
            raise RequestError(
                f"no row is quarantined under {rule!r}",
                where="--accept",
                hint=f"There are: {', '.join(sorted(known)) or 'none'}; or say all.",
            )
    before = read_repairs(path)
    lines = draft(quarantine, before, accept)
    if lines != before:
        write_jsonl(path, lines)
    _, report = prepare_data(recipe, directory, chat, screen)
    rules = []
    waiting = read_jsonl(directory.quarantine)  # what is there still, after the accepted ones went in
    for rule in sorted({bad["rule"] for bad in waiting}):
        here = [bad for bad in waiting if bad["rule"] == rule]
        found = [line for line in lines if line["id"] in {bad["id"] for bad in here} and line["how"]]
        raw = {bad["id"]: bad["row"] for bad in here}
        rules.append(
            {
                "rule": rule,
                "quarantined": len(here),
                "suggested": len(found),
                "example": {
                    "where": f"{found[0]['file']}:{found[0]['line']}",
                    "how": found[0]["how"],
                    "before": shown(raw[found[0]["id"]]),
                    "after": shown(found[0]["row"]),
                }
                if found
                else None,
            }
        )
    return Repaired(path, rules, report["repaired"].get("accepted repair", 0), report)


def split_seed(recipe: Recipe) -> int:
    return recipe.train.seed if recipe.data.split_seed is None else recipe.data.split_seed
