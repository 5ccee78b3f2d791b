"""What the objectives of preference share: both answers' log-probabilities of one forward, and gradients through them.

A pair's loss is a function of log p(chosen) and log p(rejected), so the slope of each target's cross-entropy is known
only when all of them are. The head is therefore gone through twice, in chunks each time: for the cross-entropies, and,
weighed by the slopes, for the gradients. What is differentiated is their weighed sum, which has the gradients of the
loss; the decoder runs once, and the prompt of both answers is computed once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from ..layout import Layout
from ..model.parts import DATA, part
from ..model.send import send
from .base import Objective, device_of, predict

FIGURES = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected", "chosen_loss")


class Preference(Objective):
    """Mean over the pairs of a step. `figures`: how often the chosen answer has the greater reward, by how much, both
    rewards (what each objective calls so), and the mean cross-entropy of the chosen answers' tokens.

    `log_probs` (P, 2) are those of the pairs of the last layout: the chosen and the rejected answers' tokens, summed.
    """

    figures = FIGURES

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self.log_probs = torch.zeros(0, 2)

    @abstractmethod
    def judge(self, log_probs: Tensor, tokens: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
        """The loss (P,) and both rewards (P, 2) of pairs, from the log-probabilities (P, 2) of their answers of so many
        `tokens` (P, 2), and those that the model gave them as training began."""

    def units(self, layouts: Sequence[Layout]) -> float:
        """Pairs."""
        return float(sum(len(layout.preferences) for layout in layouts))

    def loss(self, model: nn.Module, layout: Layout, total: float) -> Tensor:
        if not len(layout.preferences):  # what keeps ranks together
            return predict(model, layout).weighed()[0] * 0.0
        with part(DATA):
            once, place = _each_once(layout)
            host = (place, *_grouped(place, once.supervised),
                    *_grouped(_answer_of(layout), layout.preferences.size), layout.references)  # fmt: skip
            sent = send([torch.from_numpy(array) for array in host], device_of(model))
            again, alike, times, by_answer, tokens, references = sent
        predictions = predict(model, once)
        losses = predictions.losses()[again].double()
        trained = torch.is_grad_enabled()
        with torch.enable_grad():
            losses.requires_grad_()
            log_probs = _summed(-losses, by_answer, tokens).view(-1, 2)
            each, rewards = self.judge(log_probs, tokens.view(-1, 2), references)
            value = each.sum() / total
            slopes = torch.autograd.grad(value, losses)[0].float() if trained else None
        self.log_probs = log_probs.detach()
        self._note(rewards.detach(), -(log_probs.detach() / tokens.view(-1, 2))[:, 0])
        value = value.detach().float()
        if slopes is None:
            return value
        surrogate, _ = predictions.weighed(_summed(slopes, alike, times))
        return surrogate + (value - surrogate.detach())

    def noted(self) -> list[float]:
        sums, self._sums = self._sums, None
        return super().noted() if sums is None else sums.tolist()

    def _note(self, rewards: Tensor, chosen_loss: Tensor) -> None:
        chosen, rejected = rewards.unbind(1)
        each = (chosen > rejected, chosen - rejected, chosen, rejected, chosen_loss)
        sums = torch.stack([one.double().sum() for one in each])
        self._sums = sums if self._sums is None else self._sums + sums


def _each_once(layout: Layout) -> tuple[Layout, np.ndarray]:
    """The layout with each target once that several answers have in common (an answer may stand in many pairs), and
    where each of the given targets is among them."""
    both = np.stack([layout.target_at, layout.target_token], 1)
    _, first, place = np.unique(both, axis=0, return_index=True, return_inverse=True)
    names = ("target_at", "target_token", "target_weight", "target_sample")
    return replace(layout, **{name: getattr(layout, name)[first] for name in names}), place.ravel()


def _answer_of(layout: Layout) -> np.ndarray:
    """(N,) the answer that each target belongs to: its place among the layout's pairs, laid out flat."""
    rows = layout.preferences.ravel()
    order = np.argsort(rows)
    return order[np.searchsorted(rows, layout.target_sample, sorter=order)]


def _grouped(place: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """An order (N,) in which values of one place follow each other, and how many each of `count` places has."""
    return np.argsort(place, kind="stable"), np.bincount(place, minlength=count)


def _summed(values: Tensor, order: Tensor, lengths: Tensor) -> Tensor:
    """Sums of the values of each place, as `_grouped` has them: always in the same order, which adding by index has not
    on a GPU. Without its checks, for which the host would wait."""
    return torch.segment_reduce(values[order], "sum", lengths=lengths, initial=0.0, unsafe=True)
