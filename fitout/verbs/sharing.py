"""How the ranks of a run share its work: which engine, what it cannot do, and what people are told."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import ModelError, RequestError
from ..rundir import RunDir
from .working import Screen

if TYPE_CHECKING:
    from ..data.batches import Batches
    from ..train.backend import Backend


def backend_for(
    recipe: Recipe, method: Any, group: Backend, batches: Batches, precision: str, grown: bool, screen: Screen
) -> Backend:
    """The backend that `train.parallel` means here. `group` is the ranks as connected, `batches` the run's.

    Raises RequestError for what the engine cannot do with this method, optimizer or precision.
    """
    from ..train.engines import open_backend
    from ..train.engines.asked import asked

    wanted = asked(recipe.train, os.environ)
    for note in wanted.notes:
        screen.say(note)
    if wanted.kind == "auto":
        kinds = ("ddp", "fsdp")
        kind = (
            "ddp"
            if group.ranks == 1 or not group.main
            else _by_memory(recipe, method, group, batches, precision, grown)
        )
        wanted = replace(wanted, kind=group.agree(kind, kinds))
        why = {"ddp": "each holds the whole model", "fsdp": "the model does not fit on each: parameters are divided"}
        if group.ranks > 1:
            screen.say(f"{group.ranks} ranks, {wanted.kind}: {why[wanted.kind]}")
    elif group.ranks > 1:
        screen.say(f"{group.ranks} ranks, {wanted.kind}, as the recipe says")
    if wanted.kind == "ddp":
        return group
    stage = 3 if wanted.kind == "fsdp" else int(wanted.kind[-1])
    for reason, key, hint in _obstacles(recipe, method, stage, precision):
        raise RequestError(
            f"{wanted.kind} cannot do this: {reason}",
            where=key,
            harm="What is trained would not be what the recipe says.",
            hint=hint,
        )
    return open_backend(wanted, group.device)


def _obstacles(recipe: Recipe, method: Any, stage: int, precision: str) -> list[tuple[str, str, str]]:
    """(reason, key, what to change) of everything that forbids a stage."""
    found = []
    if (reason := method.undivided(stage)) is not None:
        lighter = "zero1 or zero2" if stage == 3 and method.undivided(2) is None else "ddp"
        found.append((reason, f"method.kind: {recipe.method.kind}", f"Set train.parallel: {lighter}, or take lora."))
    if recipe.train.optimizer != "adamw":
        found.append((
            "moments in 8 bits go by blocks of whole parameters",
            f"train.optimizer: {recipe.train.optimizer}",
            "Use train.optimizer: adamw, whose moments are divided, or train.parallel: ddp.",
        ))  # fmt: skip
    if precision == "fp16":
        found.append((
            "fp16 needs its losses scaled, which is done for ddp only",
            "train.precision: fp16",
            "Use bf16 or fp32, or train.parallel: ddp.",
        ))  # fmt: skip
    return found


def _by_memory(recipe: Recipe, method: Any, group: Backend, batches: Batches, precision: str, grown: bool) -> str:
    """`fsdp` where the plan says that the whole model does not fit on each rank, and dividing it would."""
    from ..plan.machine import here
    from ..plan.planner import look, setup_of
    from .planning import _work_at, shape_and_cost

    if _obstacles(recipe, method, 3, precision):
        return "ddp"
    try:
        shape, cost = shape_and_cost(recipe, grown)
    except ModelError:  # the planner does not know it
        return "ddp"
    machine = here()
    if machine.kind == "cpu":
        machine = replace(machine, memory=machine.memory // int(os.environ.get("LOCAL_WORLD_SIZE", group.ranks)))
    work_at = _work_at(recipe, batches)

    def runs(stage: int) -> bool:
        setup = setup_of(recipe.train, precision, machine, devices=group.ranks, stage=stage)
        return look(shape, cost, recipe.method.kind, setup, recipe.train, work_at, machine).can_run

    return "fsdp" if not runs(0) and runs(3) else "ddp"


def require_shared(directory: RunDir) -> None:
    """The first rank's data must be seen by the others. Raises RequestError where a machine sees another folder."""
    if not directory.data_report.exists():
        raise RequestError(
            "the first rank has prepared the data here, and this machine does not see them",
            where=str(directory.path.absolute()),
            harm="Each machine would read and write a run directory of its own.",
            hint="Put the run directory on a file system that all machines share, with --out.",
        )


def tell_idle_devices(ranks: int, screen: Screen) -> None:
    """Cards that a single process leaves idle."""
    import torch

    if ranks == 1 and torch.cuda.is_available() and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        screen.say(f"this machine has {count} GPUs and one is used: --processes {count} uses all")
