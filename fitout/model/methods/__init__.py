"""The fine-tuning methods. A method says what is trained, how it is saved and how it goes back into the base.

Adding one: a file beside this one with a class derived from `base.Method`, and its settings here, in METHODS and in
MethodSettings; when it saves an adapter, the `peft_type` of its adapter_config.json in SAVED, and a function
`settings_of(folder)` in its file.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...errors import FitoutError, ModelError
from ...files import read_json

if TYPE_CHECKING:
    from ..shape import Shape
    from .base import Method
    from .cost import Cost


class _Settings(BaseModel):
    """What the settings of all methods have; each has `kind`, `default_lr` and `cost(shape)` besides."""

    model_config = ConfigDict(extra="forbid")

    def in_layers(self, layers: int) -> Self:
        """The same for a model that has so few layers, all else alike."""
        return self


class FullSettings(_Settings):
    """Every weight is trained, or all but a part that is named."""

    kind: Literal["full"] = "full"
    freeze: list[str] = Field(
        [], description="name patterns (model.embed_tokens, *.mlp.*) of parameters or modules that stay fixed"
    )
    last_layers: int | None = Field(
        None,
        ge=1,
        description="train only the last N decoder layers and what follows them; a head tied to the input embedding "
        "stays fixed with it",
    )

    @property
    def default_lr(self) -> float:
        return 2e-5

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.full(shape, freeze=self.freeze, last_layers=self.last_layers)

    def in_layers(self, layers: int) -> Self:
        last = None if self.last_layers is None else min(self.last_layers, layers)
        return self.model_copy(update={"last_layers": last})


class LowRankSettings(_Settings):
    """What LoRA and its kin have in common: which layers, how wide, how scaled, how begun."""

    rank: int = Field(8, ge=1, description="width of the low-rank path")
    alpha: float = Field(32, gt=0, description="the path is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the low-rank path's input")
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of linear layers to adapt (q_proj, v_proj, ...), or all but the head"
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="other ranks for layers whose name ends in a pattern (regular expression, first match)"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="other alphas, in the same way")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (arXiv 2312.03732)")
    lr_ratio: float = Field(1, gt=0, description="learning rate of B over that of A (LoRA+, arXiv 2402.12354)")
    init: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = Field(
        "default", description="how A and B begin; pissa (arXiv 2404.02948) and olora (2406.01775) take them from W"
    )
    train_also: list[str] = Field(
        [], description="whole modules trained and saved besides, by name (embed_tokens, lm_head, norm, ...)"
    )

    @property
    def default_lr(self) -> float:
        return 2e-4

    @model_validator(mode="after")
    def _patterns_and_ranks_make_sense(self) -> Self:
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is not a regular expression: {error}") from None
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.rank, *self.rank_pattern.values())):
            raise ValueError("init: orthogonal needs even ranks")
        return self

    def _sizes(self) -> dict[str, Any]:
        """What cost functions ask of any of these."""
        return {
            "rank": self.rank,
            "targets": self.targets,
            "rank_pattern": self.rank_pattern,
            "train_also": self.train_also,
            "decomposed": self.init in ("pissa", "olora"),
        }


class LoraSettings(LowRankSettings):
    """Low-rank adapters on linear layers (Hu et al., arXiv 2106.09685), in PEFT's names and files."""

    kind: Literal["lora"] = "lora"

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.lora(shape, **self._sizes())


class DoraSettings(LowRankSettings):
    """Weight-decomposed low-rank adapters (Liu et al., arXiv 2402.09353), in PEFT's names and files."""

    kind: Literal["dora"] = "dora"

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.dora(shape, **self._sizes())


class QloraSettings(LowRankSettings):
    """Low-rank adapters over a base held in 4 bits (Dettmers et al., arXiv 2305.14314), by bitsandbytes."""

    kind: Literal["qlora"] = "qlora"
    quant: Literal["nf4", "fp4"] = Field("nf4", description="the 16 values that weights are rounded to")
    double_quant: bool = Field(True, description="quantise the scales of the blocks too: 0.4 bits a weight less")
    dora: bool = Field(False, description="with DoRA's magnitudes")

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.qlora(shape, double_quant=self.double_quant, magnitudes=self.dora, **self._sizes())


class AdapterSettings(_Settings):
    """Bottleneck adapters: small trained networks inside each decoder layer; nonlinear, so they cannot be merged.

    houlsby: after attention and after feed-forward (arXiv 1902.00751); pfeiffer: after feed-forward (arXiv 2005.00247);
    parallel: beside feed-forward, scaled (arXiv 2110.04366).
    """

    kind: Literal["adapter"] = "adapter"
    style: Literal["houlsby", "pfeiffer", "parallel"] = Field("pfeiffer", description="where the networks sit")
    reduction: float = Field(16, ge=1, description="their width is the model's hidden size divided by this")
    activation: Literal["relu", "gelu", "silu"] = "relu"
    scale: float = Field(1.0, gt=0, description="factor on what a parallel adapter adds; the other styles have none")

    @property
    def default_lr(self) -> float:
        return 1e-3

    @model_validator(mode="after")
    def _scale_has_a_place(self) -> Self:
        if self.scale != 1.0 and self.style != "parallel":
            raise ValueError("scale belongs to style: parallel")
        return self

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.adapter(shape, style=self.style, reduction=self.reduction, activation=self.activation)


class SparseSettings(_Settings):
    """A small share of the base's own entries is trained; the rest stays as it is. Merges exactly."""

    kind: Literal["sparse"] = "sparse"
    density: float = Field(0.01, ge=0.001, le=0.05, description="share of each layer's entries that is trained")
    select: Literal["magnitude", "gradient", "random"] = Field(
        "gradient",
        description="which: the largest, those with the largest squared gradients (Fisher) on the first steps' "
        "samples, or drawn by the seed",
    )
    redraw_every: int | None = Field(
        None, ge=1, description="steps after which entries that moved least give way to others (arXiv 2401.16405)"
    )
    targets: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="names of linear layers (q_proj, v_proj, ...), or all but the head"
    )

    @property
    def default_lr(self) -> float:
        return 5e-4

    def cost(self, shape: Shape) -> Cost:
        from . import cost

        return cost.sparse(shape, density=self.density, targets=self.targets, by_gradient=self.select == "gradient")


class AutoSettings(_Settings):
    """The planner chooses: the best method that fits the memory at hand and the amount of data. The choice and its
    reasons are told, and recorded in the run's recipe in place of this."""

    kind: Literal["auto"] = "auto"

    @property
    def default_lr(self) -> float:
        raise self._not_chosen()

    def cost(self, shape: Shape) -> Cost:
        raise self._not_chosen()

    def _not_chosen(self) -> FitoutError:
        return FitoutError("method: auto has not been resolved", hint="fitout.verbs does that; or name a method.")


METHODS = (FullSettings, LoraSettings, DoraSettings, QloraSettings, AdapterSettings, SparseSettings)
AnySettings = (
    FullSettings | LoraSettings | DoraSettings | QloraSettings | AdapterSettings | SparseSettings | AutoSettings
)
MethodSettings = Annotated[AnySettings, Field(discriminator="kind")]
SAVED = {  # peft_type of a saved adapter -> the file that reads it; PEFT has no types for the last two, they are ours
    "LORA": "lora",
    "BOTTLENECK": "adapter",
    "SPARSE": "sparse",
}


def create(settings: AnySettings) -> Method:
    """The method that `settings` asks for."""
    return import_module(f".{settings.kind}", __name__).create(settings)


def saved_shapes(folder: Path) -> dict[str, list[int]]:
    """Name and shape of each tensor of the adapter in `folder`. Raises ModelError when its weights cannot be read."""
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise ModelError(
            "this adapter has no adapter_model.safetensors",
            where=str(folder),
            hint="Pickled adapters (adapter_model.bin) are not opened: save it again with safetensors.",
        )
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"the adapter's weights cannot be read: {error}", where=str(path), hint="Copy the adapter again."
        ) from error


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
