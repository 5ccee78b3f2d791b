"""One optimizer step over micro-batches, normalised by units (supervised tokens) over all of them and all ranks.

Units are counted before the first forward, so each micro-batch's loss is divided by the step's total: a step of eight
micro-batches is the step of one batch, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import FitoutError
from ..layout import Layout
from ..model.memory import is_out_of_memory
from ..model.parts import OPTIMIZER, part
from ..objectives.base import Objective, padding
from .backend import Backend


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks. `pairs` are those of Layout, `padding` tokens that only fill rows up, `figures`
    the objective's, averaged over its units."""

    loss: float
    grad_norm: float
    finite: bool
    tokens: int
    supervised: int
    pairs: int
    padding: int
    figures: dict[str, float]


def train_step(
    model: nn.Module,
    objective: Objective,
    layouts: Sequence[Layout],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    backend: Backend,
    clip: float | None,
    between: Callable[[], None] = lambda: None,
) -> StepResult:
    """Forward and backward of every micro-batch, one sum over the ranks, clip, update.

    `between` is called before each micro-batch; what it raises ends the step with the weights untouched.
    """
    with backend.compute():
        filling = sum(padding(model, x) for x in layouts)
    total, tokens, supervised, pairs, filled = backend.sum(
        objective.units(layouts),
        sum(x.tokens for x in layouts),
        sum(x.supervised for x in layouts),
        sum(x.pairs for x in layouts),
        filling,
    )
    objective.noted()  # of what was computed for other purposes
    summed = torch.zeros((), dtype=torch.float64, device=backend.device)  # read once, when all is computed
    for index, layout in enumerate(layouts):
        between()
        if layout.supervised == 0 and not backend.joins:
            continue
        loss = backend.loss(model, objective, layout, total)
        backend.backward(loss, last=index == len(layouts) - 1)
        summed += loss.detach()
    with part(OPTIMIZER):
        backend.sum_gradients(parameters)
        norm = backend.clip(optimizer, parameters, clip)
        loss_sum, *noted = backend.sum(float(summed), *objective.noted())
        finite = norm == norm and norm != float("inf") and loss_sum == loss_sum
        _update(optimizer, backend, finite)
        optimizer.zero_grad(set_to_none=True)
    figures = _averages(objective, noted, total)
    return StepResult(loss_sum, norm, finite, int(tokens), int(supervised), int(pairs), int(filled), figures)


def _averages(objective: Objective, noted: Sequence[float], total: float) -> dict[str, float]:
    return {name: value / total for name, value in zip(objective.figures, noted, strict=True)} if total else {}


def _update(optimizer: torch.optim.Optimizer, backend: Backend, finite: bool) -> None:
    """The update. When memory runs out in it some weights may have moved and others not, so it cannot be repeated."""
    try:
        backend.update(optimizer, finite=finite)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FitoutError(
            "memory ran out in the optimizer's update",
            harm="Some weights may have moved and others not; nothing after the last checkpoint was kept.",
            hint="Smaller micro-batches do not help here: take method: {kind: lora}, train.optimizer: "
            "paged_adamw_8bit, or a smaller base model.",
        ) from error


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    objective: Objective,
    layouts: Sequence[Layout],
    backend: Backend,
    between: Callable[[], None] = lambda: None,
) -> tuple[float, dict[str, float]]:
    """The objective's loss over all ranks' layouts, and its figures; weights untouched, dropout off; `between` as in
    `train_step`."""
    training = model.training
    model.eval()
    objective.noted()
    try:
        summed = torch.zeros((), dtype=torch.float64, device=backend.device)
        for layout in layouts:
            between()
            if layout.supervised or backend.joins:
                summed += backend.loss(model, objective, layout, 1.0)
        loss_sum, total, *noted = backend.sum(float(summed), objective.units(layouts), *objective.noted())
    finally:
        model.train(training)
    return loss_sum / total if total else float("nan"), _averages(objective, noted, total)
