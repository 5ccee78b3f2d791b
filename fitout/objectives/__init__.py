"""WHAT IS MINIMISED. An objective says what samples it wants, how many units a batch counts, and what its loss is.

Adding one: its settings here and in OBJECTIVES, and a class with `units` and `loss` in a file of that name.
Not here: how the loss is divided over micro-batches and ranks (train), which tokens are trained (chat, data).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from .base import Objective


class _Settings(BaseModel):
    """`wants`: the kind of sample; `pace`: what the default learning rate is multiplied by."""

    model_config = ConfigDict(extra="forbid")
    wants: ClassVar[str]
    pace: ClassVar[float] = 1.0


class SftSettings(_Settings):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens."""

    kind: Literal["sft"] = "sft"
    wants: ClassVar[str] = "conversation"


class PretrainSettings(_Settings):
    """(Continued) pretraining: cross-entropy on every token of plain text."""

    kind: Literal["pretrain"] = "pretrain"
    wants: ClassVar[str] = "text"


class _PreferenceSettings(_Settings):
    wants: ClassVar[str] = "preference pair"


class OrpoSettings(_PreferenceSettings):
    """Odds ratio preference optimisation: learns the chosen answer and prefers it, from a base model, in one training.

    beta   weight of the odds ratio term (lambda in the paper)
    """

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(0.1, gt=0)
    pace: ClassVar[float] = 0.4  # 8e-6 for a full fine-tuning, as in the paper


class DpoSettings(_PreferenceSettings):
    """Direct preference optimisation: moves a model that can answer already towards what is chosen.

    beta   how dear it is to leave the model that training began with
    """

    kind: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0)
    pace: ClassVar[float] = 0.05  # 1e-6 for a full fine-tuning


class SimpoSettings(_PreferenceSettings):
    """Simple preference optimisation: as DPO, by mean log-probability, with a margin and without a reference.

    beta   scale of the reward
    gamma  the margin by which the chosen answer's reward is to be greater
    """

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0)
    gamma: float = Field(1.0, ge=0)
    pace: ClassVar[float] = 0.05


OBJECTIVES = (SftSettings, PretrainSettings, OrpoSettings, DpoSettings, SimpoSettings)
ObjectiveSettings = Annotated[
    SftSettings | PretrainSettings | OrpoSettings | DpoSettings | SimpoSettings, Field(discriminator="kind")
]


def create(settings: _Settings) -> Objective:
    """The objective that `settings` asks for."""
    return import_module(f".{settings.kind}", __name__).create(settings)  # type: ignore[attr-defined]
