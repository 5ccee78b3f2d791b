"""Bottleneck adapters inside a decoder layer, added to what attention or feed-forward gives before the residual sum.

houlsby   after attention and after feed-forward (Houlsby et al., arXiv 1902.00751, figure 2)
pfeiffer  after feed-forward only (Pfeiffer et al., arXiv 2005.00247)
parallel  beside feed-forward, on its input, scaled (He et al., arXiv 2110.04366, table 1)

Each is a submodule `adapter` of the block it belongs to, called by a forward hook: the base's names do not change, and
whatever calls the block (packing, a cache, recomputed activations) gets the adapted output.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import RequestError
from ...files import read_json, write_json, write_text
from ..load import hidden_width, write_tensors
from . import AdapterSettings
from .base import Method, decoder_layers, fill, freeze_base, trainable

ATTENTION = ("self_attn", "attention", "attn")
FEED_FORWARD = ("mlp",)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}

README = """\
A bottleneck adapter trained with Fitout, over `{base}`.

`peft_type: BOTTLENECK` in adapter_config.json is Fitout's own: PEFT has no such adapter and does not load it.
It is nonlinear, so it cannot be folded into the base's weights. `fitout chat`, `fitout serve` and
`fitout evaluate` compute base and adapter together.

Each tensor `LAYER.BLOCK.adapter.*` belongs to one block of the base. With x the block's input and y its output,
the block gives {formula}.
"""
FORMULA = {True: "y + scale * up(activation(down(x)))", False: "y + up(activation(down(y)))"}


class Bottleneck(nn.Module):
    """up(activation(down(x))) with biases, fp32 masters computed in x's dtype.

    `down` starts Kaiming-uniform and `up` at zero (as in arXiv 2110.04366), so that at first it adds exactly nothing.
    """

    def __init__(self, hidden: int, settings: AdapterSettings):
        super().__init__()
        width = max(1, round(hidden / settings.reduction))
        self.down = nn.Linear(hidden, width, dtype=torch.float32)
        self.up = nn.Linear(width, hidden, dtype=torch.float32)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.activation = ACTIVATIONS[settings.activation]
        self.parallel = settings.style == "parallel"
        self.scale = settings.scale

    def forward(self, x: Tensor) -> Tensor:
        down, up = ((m.weight.to(x.dtype), m.bias.to(x.dtype)) for m in (self.down, self.up))
        added = F.linear(self.activation(F.linear(x, *down)), *up)
        return added * self.scale if self.scale != 1.0 else added


def _adapted(block: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook: the block's output (the first of a tuple) with what its adapter adds."""
    first = output[0] if isinstance(output, tuple) else output
    seen = (args[0] if args else kwargs["hidden_states"]) if block.adapter.parallel else first
    first = first + block.adapter(seen)
    return (first, *output[1:]) if isinstance(output, tuple) else first


class Adapter(Method):
    unmergeable = "a bottleneck adapter is nonlinear, no weights of the base give the same function"

    def __init__(self, settings: AdapterSettings):
        self.settings = settings

    def apply(self, model: Any) -> None:
        freeze_base(model)
        insert(model, self.settings)

    def save(self, model: Any, folder: Path, *, base: str, revision: str | None = None) -> None:
        write_tensors(folder / "adapter_model.safetensors", dict(trainable(model)))
        config = {
            "peft_type": "BOTTLENECK",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": revision,
            **self.settings.model_dump(mode="json", exclude={"kind"}),
        }
        write_json(folder / "adapter_config.json", config)
        write_text(folder / "README.md", README.format(base=base, formula=FORMULA[self.settings.style == "parallel"]))

    def load(self, model: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        fill(dict(trainable(model)), load_file(folder / "adapter_model.safetensors"), folder)

    def merge(self, model: Any) -> None:
        raise RequestError(f"this adapter cannot be merged: {self.unmergeable}", hint="Serve base and adapter.")


def insert(model: Any, settings: AdapterSettings) -> None:
    """Gives every block that `settings.style` means its adapter."""
    hidden = hidden_width(model.config)
    path, layers = decoder_layers(model)
    kinds = [ATTENTION, FEED_FORWARD] if settings.style == "houlsby" else [FEED_FORWARD]
    for index, layer in enumerate(layers):
        for kind in kinds:
            block: Any = _block(layer, kind, f"{path}.{index}", type(model).__name__)
            block.adapter = Bottleneck(hidden, settings).to(next(block.parameters()).device)
            block.register_forward_hook(_adapted, with_kwargs=True)


def _block(layer: nn.Module, names: tuple[str, ...], where: str, model: str) -> nn.Module:
    for name in names:
        block = getattr(layer, name, None)
        if isinstance(block, nn.Module) and "residual" not in signature(block.forward).parameters:  # its sum is outside
            return block
    raise RequestError(
        f"{where} of {model} has no submodule {' or '.join(names)} that leaves the residual sum to its layer",
        harm="A layer without one would not be the method that was asked for.",
        hint=f"It has {', '.join(n for n, _ in layer.named_children())}. Take method: {{kind: lora}} for this model.",
    )


def settings_of(folder: Path) -> AdapterSettings:
    """The settings of a saved adapter."""
    config = read_json(folder / "adapter_config.json")
    return AdapterSettings(**{key: config[key] for key in ("style", "reduction", "activation", "scale")})


def create(settings: AdapterSettings) -> Adapter:
    return Adapter(settings)
