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
from ..objectives.base import Objective
from .backend import Backend


@dataclass(frozen=True)
class StepResult:
    """What a step did; over all ranks except `tokens_here`."""

    loss: float
    grad_norm: float
    finite: bool
    tokens: int
    supervised: int


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
    total, tokens, supervised = backend.sum(
        objective.units(layouts), sum(x.tokens for x in layouts), sum(x.supervised for x in layouts)
    )
    loss_sum = 0.0
    for index, layout in enumerate(layouts):
        between()
        if layout.supervised == 0 and not backend.joins:
            continue
        loss = backend.loss(model, objective, layout, total)
        backend.backward(loss, last=index == len(layouts) - 1)
        loss_sum += float(loss.detach())
    backend.sum_gradients(parameters)
    (loss_sum,) = backend.sum(loss_sum)
    norm = backend.clip(optimizer, parameters, clip)
    finite = norm == norm and norm != float("inf") and loss_sum == loss_sum
    _update(optimizer, backend, finite)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_sum, norm, finite, int(tokens), int(supervised))


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
) -> float:
    """The objective's loss over all ranks' layouts, weights untouched, dropout off; `between` as in `train_step`."""
    training = model.training
    model.eval()
    try:
        total, summed = objective.units(layouts), 0.0
        for layout in layouts:
            between()
            if layout.supervised or backend.joins:
                summed += float(backend.loss(model, objective, layout, 1.0))
        summed, total = backend.sum(summed, total)
    finally:
        model.train(training)
    return summed / total if total else float("nan")
