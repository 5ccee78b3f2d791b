"""Supervised fine-tuning: mean cross-entropy over the supervised tokens of the whole step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..layout import Layout
from . import PretrainSettings, SftSettings
from .base import Objective, token_losses


class Sft(Objective):
    def units(self, layouts: Sequence[Layout]) -> float:
        """Supervised tokens, weighted."""
        return float(sum(layout.target_weight.sum() for layout in layouts))

    def loss(self, model: nn.Module, layout: Layout, total: float) -> Tensor:
        summed, _ = token_losses(model, layout)
        return summed / total


def create(settings: SftSettings | PretrainSettings) -> Sft:
    return Sft()
