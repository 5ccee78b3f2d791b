"""From a recipe to prepared data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..rundir import RunDir
from .working import Screen, main_process

if TYPE_CHECKING:
    from ..chat.render import Chat
    from ..data.store import Prepared


def prepare_data(recipe: Recipe, directory: RunDir, chat: Chat, screen: Screen) -> tuple[Prepared, dict[str, Any]]:
    from ..data.prepare import prepare, summary

    if recipe.objective.wants == "conversation":
        chat.check()
    for note in chat.notes:
        screen.say(note)
    prepared, report = prepare(
        recipe.data, chat, recipe.objective.wants, directory, seed=split_seed(recipe), progress=screen.data_progress
    )
    screen.say(summary(report))
    for what in ("quarantined", "removed", "repaired"):
        for why, count in report[what].items():
            screen.say(f"  {what} {count:,}: {why}")
    part = report["parts"]["train"]
    share = 100 * part["supervised"] / max(1, part["tokens"])
    screen.say(f"training tokens: {part['tokens']:,}, of them trained {part['supervised']:,} ({share:.0f} %)")
    if unknown := part.get("unknown"):  # data prepared by an earlier version have no count of it
        screen.say(
            f"{unknown:,} training tokens are unknown to the tokenizer: what they stood for is lost to the model"
        )
    for name in ("validation", "test"):
        if getattr(recipe.data.split, name) and not report["kept"][name]:
            screen.say(f"no sample is in the {name} part (too few to split); a source of its own has `split: {name}`")
    if part["no_end"]:
        screen.say(f"{part['no_end']:,} training samples end without a trained end of turn (cut to max_length)")
    if main_process():
        directory.update_status(data_fingerprint=prepared.fingerprint)
    return prepared, report


def split_seed(recipe: Recipe) -> int:
    return recipe.train.seed if recipe.data.split_seed is None else recipe.data.split_seed
