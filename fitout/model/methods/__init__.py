"""The fine-tuning methods. A method says what is trained, how it is saved and how it goes back into the base.

Adding one: a file beside this one with a class derived from `base.Method`, and its settings here, in METHODS and in
MethodSettings; when it saves an adapter, the `peft_type` of its adapter_config.json in SAVED, and a function
`settings_of(folder)` in its file.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...errors import FitoutError, ModelError
from ...files import read_json

if TYPE_CHECKING:
    from ..shape import Shape
    from .base import Method
    from .cost import Cost


class FullSettings(BaseModel):
    """Every weight is trained."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["full"] = "full"

    @property
    def default_lr(self) -> float:
        return 2e-5

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.full(shape)


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

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.lora(shape, rank=self.rank, targets=self.targets)


class AutoSettings(BaseModel):
    """The planner chooses: the best method that fits the memory at hand and the amount of data. The choice and its
    reasons are told, and recorded in the run's recipe in place of this."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["auto"] = "auto"

    @property
    def default_lr(self) -> float:
        raise self._not_chosen()

    def cost(self, shape: Shape) -> Cost:
        raise self._not_chosen()

    def _not_chosen(self) -> FitoutError:
        return FitoutError("method: auto has not been resolved", hint="fitout.verbs does that; or name a method.")


METHODS = (FullSettings, LoraSettings)
MethodSettings = Annotated[FullSettings | LoraSettings | AutoSettings, Field(discriminator="kind")]
SAVED = {"LORA": "lora"}  # peft_type of a saved adapter -> the file that reads it


def create(settings: MethodSettings) -> Method:
    """The method that `settings` asks for."""
    return import_module(f".{settings.kind}", __name__).create(settings)


def saved_in(folder: Path) -> Method:
    """The method that made the adapter in `folder`, with its settings. Raises ModelError for one that is not known."""
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind not in SAVED:
        raise ModelError(
            f"this adapter is of type {kind}, which Fitout does not compute",
            where=str(folder / "adapter_config.json"),
            hint=f"Known: {', '.join(SAVED)}. Merge it with the tool that made it, and use the merged model.",
        )
    return create(import_module(f".{SAVED[kind]}", __name__).settings_of(folder))
