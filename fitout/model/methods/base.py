"""What every fine-tuning method can do."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import nn


class Method(Protocol):
    """A fine-tuning method over a loaded model."""

    frozen_base: bool  # the base stays as it is: it may be stored in the compute dtype, and merging means something

    def apply(self, model: nn.Module) -> None:
        """Makes the model trainable as the method wants; what is trained has requires_grad, all else has not."""

    def save(self, model: nn.Module, folder: Path, *, base: str, revision: str | None = None) -> None:
        """Writes what was trained into `folder` (PEFT or Hugging Face format)."""

    def merge(self, model: nn.Module) -> None:
        """Folds what was trained into the plain architecture, in place."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in a stable order (module order); shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def copy_into(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    """Copies saved tensors over parameters of the same names; the two sets must match exactly."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
