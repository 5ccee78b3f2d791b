"""WHAT IS MINIMISED. An objective says what samples it wants, how many units a batch counts, and what its loss is.

Adding one: its settings here and in OBJECTIVES, and a class with `wants`, `units` and `loss` in a file of that name.
Not here: how the loss is divided over micro-batches and ranks (train), which tokens are trained (chat, data).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from .base import Objective


class SftSettings(BaseModel):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["sft"] = "sft"

    @property
    def wants(self) -> str:
        return "conversation"


class PretrainSettings(BaseModel):
    """(Continued) pretraining: cross-entropy on every token of plain text."""

    model_config = ConfigDict(extra="forbid")
    kind: Literal["pretrain"] = "pretrain"

    @property
    def wants(self) -> str:
        return "text"


OBJECTIVES = (SftSettings, PretrainSettings)
ObjectiveSettings = Annotated[SftSettings | PretrainSettings, Field(discriminator="kind")]


def create(settings: SftSettings | PretrainSettings) -> Objective:
    """The objective that `settings` asks for."""
    return import_module(f".{settings.kind}", __name__).create(settings)
