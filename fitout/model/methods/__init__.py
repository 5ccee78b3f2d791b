"""The fine-tuning methods. A method says what is trained, how it is saved and how it goes back into the base.

Adding one: a file beside this one with a class that has the members of `base.Method`, and its settings here, in
METHODS and in MethodSettings.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from .base import Method


class FullSettings(BaseModel):
    """Every weight is trained."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["full"] = "full"

    @property
    def default_lr(self) -> float:
        return 2e-5


class LoraSettings(BaseModel):
    """Low-rank adapters on linear layers (Hu et al., arXiv 2106.09685), in PEFT's names and files."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["lora"] = "lora"
    rank: int = Field(8, ge=1, description="width of the low-rank path")
    alpha: float = Field(32, gt=0, description="the path is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the low-rank path's input")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of linear layers to adapt (q_proj, v_proj, ...), or all but the head"
    )

    @property
    def default_lr(self) -> float:
        return 2e-4


METHODS = (FullSettings, LoraSettings)
MethodSettings = Annotated[FullSettings | LoraSettings, Field(discriminator="kind")]


def create(settings: FullSettings | LoraSettings) -> Method:
    """The method that `settings` asks for."""
    return import_module(f".{settings.kind}", __name__).create(settings)
