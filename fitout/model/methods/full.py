"""Full fine-tuning: every weight is trained and saved as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from . import FullSettings
from .base import Method


class Full(Method):
    frozen_base = False

    def apply(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def save(self, model: nn.Module, folder: Path, *, base: str, revision: str | None = None) -> None:
        from ..load import save_model

        save_model(model, folder)

    def merge(self, model: nn.Module) -> None:
        """Nothing to fold in: the weights are the model."""


def create(settings: FullSettings) -> Full:
    return Full()
