"""One optimizer step over micro-batches, normalised by units (supervised tokens) over all of them and all ranks.

Units are counted before the first forward, so each micro-batch's loss is divided by the step's total: a step of eight
micro-batches is the step of one batch, whatever their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..layout import Layout
from ..model.parts import OPTIMIZER, part
from ..objectives.base import Objective, padding
from .backend import Backend


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks. `pairs` are those of Layout, `padding` tokens that only fill rows up."""

    loss: float
    grad_norm: float
    finite: bool
    tokens: int
    supervised: int
    pairs: int
    padding: int


def train_step(
    model: nn.Module,
    objective: Objective,
    layouts: Sequence[Layout],
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    backend: Backend,
    clip: float | None,
) -> StepResult:
    """Forward and backward of every micro-batch, one sum over the ranks, clip, update."""
    with backend.compute():
        filling = sum(padding(model, x) for x in layouts)
    total, tokens, supervised, pairs, filled = backend.sum(
        objective.units(layouts),
        sum(x.tokens for x in layouts),
        sum(x.supervised for x in layouts),
        sum(x.pairs for x in layouts),
        filling,
    )
    summed = torch.zeros((), dtype=torch.float64, device=backend.device)  # read once, when all is computed
    for index, layout in enumerate(layouts):
        if layout.supervised == 0 and not backend.joins:
            continue
        loss = backend.loss(model, objective, layout, total)
        backend.backward(loss, last=index == len(layouts) - 1)
        summed += loss.detach()
    with part(OPTIMIZER):
        backend.sum_gradients(parameters)
        norm = backend.clip(optimizer, parameters, clip)
        (loss_sum,) = backend.sum(float(summed))
        finite = norm == norm and norm != float("inf") and loss_sum == loss_sum
        backend.update(optimizer, finite=finite)
        optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_sum, norm, finite, *map(int, (tokens, supervised, pairs, filled)))


@torch.no_grad()
def mean_loss(model: nn.Module, objective: Objective, layouts: Sequence[Layout], backend: Backend) -> float:
    """The objective's loss over all ranks' layouts, weights untouched, dropout off."""
    training = model.training
    model.eval()
    try:
        summed = torch.zeros((), dtype=torch.float64, device=backend.device)
        for layout in layouts:
            if layout.supervised or backend.joins:
                summed += backend.loss(model, objective, layout, 1.0)
        loss_sum, total = backend.sum(float(summed), objective.units(layouts))
    finally:
        model.train(training)
    return loss_sum / total if total else float("nan")
