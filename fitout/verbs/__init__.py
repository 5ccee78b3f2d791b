"""One short function per verb; this room alone holds the whole recipe.

run = prepare -> train -> evaluate -> merge, going on where it stopped. The steps are in the files beside this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import RequestError, RunExistsError
from ..rundir import RunDir
from .annotating import pull, push
from .comparing import compare
from .delivering import can_load, combine, export, merge_into_base, unmergeable
from .evaluating import check_retention, evaluate_run
from .planning import plan, with_method
from .preparing import Repaired, prepare_data, repair_data
from .training import train_model
from .working import Screen, chat_of, import_libraries, main_process, recipe_of, run_directory, working
from .writing import Written, export_data

if TYPE_CHECKING:
    from ..chat.render import Chat
    from ..engine import Engine
    from ..evaluate.suite import EvaluationResult

__all__ = [
    "Screen",
    "Written",
    "Xray",
    "can_load",
    "combine",
    "compare",
    "evaluate",
    "export",
    "export_data",
    "merge",
    "open_engine",
    "plan",
    "prepare",
    "pull",
    "push",
    "recipe_of",
    "repair",
    "run",
    "run_directory",
    "train",
    "xray",
]


def run(
    recipe: Recipe, *, out: str | Path | None = None, profile: bool = False, screen: Screen | None = None
) -> RunDir:
    """prepare, train, evaluate, merge; a run that was stopped or killed goes on where it was."""
    screen = screen or Screen()
    directory = run_directory(recipe, out)
    check_retention(recipe)
    recipe = with_method(recipe, directory, screen)
    with working(directory, recipe, screen):
        train_model(recipe, directory, screen, resume=True, profile=profile)
        if main_process():
            evaluate_run(recipe, directory, screen)
            if recipe.export.merge:
                merge_into_base(recipe, directory, screen)
            directory.update_status(status="done")
    return directory


def train(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    profile: bool = False,
    screen: Screen | None = None,
) -> RunDir:
    """One training run. One that has begun training is refused without `resume`; with `profile` three steps are timed
    part by part."""
    directory = run_directory(recipe, out)
    if directory.has_training() and not resume and main_process():  # the other ranks may come when it is made
        raise RunExistsError(
            "this run exists already",
            where=str(directory.path),
            harm="Training into it would mix two runs.",
            hint="Go on with --resume, or choose another name or --out.",
        )
    screen = screen or Screen()
    recipe = with_method(recipe, directory, screen)
    with working(directory, recipe, screen):
        train_model(recipe, directory, screen, resume=resume, profile=profile)
    return directory


def prepare(recipe: Recipe, *, out: str | Path | None = None, screen: Screen | None = None) -> RunDir:
    """The data stages alone: report, quarantine, prepared parts."""
    directory = run_directory(recipe, out)
    screen = screen or Screen()
    with working(directory, recipe, screen):
        prepare_data(recipe, directory, chat_of(recipe), screen)
    return directory


def repair(
    recipe: Recipe, *, accept: Sequence[str] = (), out: str | Path | None = None, screen: Screen | None = None
) -> Repaired:
    """Suggests repairs of quarantined rows, and lets those that are accepted in again; `accept` names rules, or all."""
    directory = run_directory(recipe, out)
    screen = screen or Screen()
    with working(directory, recipe, screen):
        return repair_data(recipe, directory, chat_of(recipe), accept, screen)


@dataclass(frozen=True)
class Xray:
    """Prepared training rows and what is needed to show them."""

    chat: Chat
    part: Any
    report: dict[str, Any]


def xray(recipe: Recipe, *, out: str | Path | None = None, screen: Screen | None = None) -> Xray:
    """The training rows as they will be trained; prepares them first where that has not been done."""
    directory = run_directory(recipe, out)
    screen = screen or Screen()
    with working(directory, recipe, screen):
        chat = chat_of(recipe)
        prepared, report = prepare_data(recipe, directory, chat, screen)
    return Xray(chat, prepared.part("train"), report)


def evaluate(directory: RunDir, *, changes: Recipe | None = None, screen: Screen | None = None) -> EvaluationResult:
    """Base against tuned on the run's test part, and what was kept."""
    recipe = changes or recipe_of(directory)
    screen = screen or Screen()
    with working(directory, recipe, screen):
        return evaluate_run(recipe, directory, screen, again=True)


def merge(directory: RunDir, *, screen: Screen | None = None) -> Path:
    """The adapter folded into the base, in merged/; refused when the logits change."""
    recipe = recipe_of(directory)
    screen = screen or Screen()
    reason = unmergeable(recipe)
    if reason:
        raise RequestError(
            f"what {recipe.method.kind} trained cannot be merged: {reason}",
            where=str(directory.path),
            harm="A plain model folder would be another model.",
            hint=f"Use base and adapter: fitout chat {directory.path}, fitout serve {directory.path}.",
        )
    with working(directory, recipe, screen):
        return merge_into_base(recipe, directory, screen, again=True)


def open_engine(
    what: str | Path, *, adapter: str | None = None, precision: str = "auto", trust_remote_code: bool = False
) -> Engine:
    """A model, a run or `embedded:shell`, ready to talk."""
    import_libraries()
    from ..engine import Engine

    return Engine.open(what, adapter=adapter, precision=precision, trust_remote_code=trust_remote_code)
