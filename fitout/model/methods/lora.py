"""LoRA in PEFT's parameters, names and files, with a leaner module than PEFT's (it imports PEFT nowhere)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ModelError, RequestError
from ...files import read_json, write_json
from ..fused import gated_lora_linear, lora_linear, swiglu
from ..load import embeddings, write_tensors
from . import LoraSettings
from .base import Method, copy_into

PREFIX = "base_model.model."  # PEFT wraps the model twice; its file names keep that


class LoraLinear(nn.Module):
    """A frozen linear layer with a trained low-rank path; A is Kaiming-uniform and B zero, as in PEFT."""

    def __init__(self, base: nn.Linear, settings: LoraSettings):
        super().__init__()
        self.base = base
        self.lora_A = nn.Parameter(torch.empty(settings.rank, base.in_features, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.rank, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self.scale = settings.alpha / settings.rank
        self.dropout = settings.dropout
        self.to(base.weight.device)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def delta(self) -> Tensor:
        """What the low-rank path adds to the weight, (out, in) in fp32."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            low = F.linear(F.dropout(x, self.dropout), self.lora_A.to(x.dtype))
            return self.base(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))
        return lora_linear(x, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The layer of silu(gate) * up, which is not kept for the backward."""
        if type(self) is not LoraLinear or (self.training and self.dropout > 0):
            return self(swiglu(gate, up))
        return gated_lora_linear(gate, up, self.base.weight, self.base.bias, self.lora_A, self.lora_B, self.scale)


class Lora(Method):
    def __init__(self, settings: LoraSettings):
        self.settings = settings

    def apply(self, model: Any) -> None:
        grown = getattr(model, "fitout_grown_vocabulary", False)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in self._targets(model):
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, LoraLinear(getattr(owner, leaf), self.settings))
        if grown:  # new role tokens mean nothing yet: their embeddings are trained and saved with the adapter
            for module in embeddings(model).values():
                module.weight.requires_grad_(True)

    def _targets(self, model: Any) -> list[str]:
        head = model.get_output_embeddings()
        linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
        if self.settings.targets == "all-linear":
            return linear
        wanted = self.settings.targets
        chosen = [n for n in linear if any(n == w or n.endswith("." + w) for w in wanted)]
        missing = [w for w in wanted if not any(n == w or n.endswith("." + w) for n in linear)]
        if missing:
            known = sorted({n.rpartition(".")[2] for n in linear})
            raise RequestError(
                f"method.targets names layers this model does not have: {', '.join(missing)}",
                harm="They would silently stay untrained.",
                hint=f"Linear layers here: {', '.join(known)}; or targets: all-linear.",
            )
        return chosen

    def save(self, model: Any, folder: Path, *, base: str, revision: str | None = None) -> None:
        names = sorted(adapters(model))
        grown = getattr(model, "fitout_grown_vocabulary", False)
        config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": revision,
            "r": self.settings.rank,
            "lora_alpha": self.settings.alpha,
            "lora_dropout": self.settings.dropout,
            "target_modules": sorted({n.rpartition(".")[2] for n in names})
            if isinstance(self.settings.targets, str)
            else list(self.settings.targets),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "modules_to_save": None,
            "rank_pattern": {},
            "alpha_pattern": {},
        }
        write_tensors(folder / "adapter_model.safetensors", self._tensors(model, with_embeddings=grown))
        write_json(folder / "adapter_config.json", config)

    def _tensors(self, model: Any, *, with_embeddings: bool) -> dict[str, Tensor]:
        tensors = {}
        for name, layer in adapters(model).items():
            tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach()
            tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach()
        if with_embeddings:
            for name, module in embeddings(model).items():
                tensors[f"{PREFIX}{name}.weight"] = module.weight.detach()
        return tensors

    def load(self, model: Any, folder: Path) -> None:
        from safetensors.torch import load_file

        saved = load_file(folder / "adapter_model.safetensors")
        wanted: dict[str, nn.Parameter] = {}
        for name, layer in adapters(model).items():
            wanted[f"{PREFIX}{name}.lora_A.weight"] = layer.lora_A
            wanted[f"{PREFIX}{name}.lora_B.weight"] = layer.lora_B
        for name, module in embeddings(model).items():
            if f"{PREFIX}{name}.weight" in saved:
                wanted[f"{PREFIX}{name}.weight"] = module.weight
        _require_same(set(wanted), set(saved), folder)
        for name, parameter in wanted.items():
            if saved[name].shape != parameter.shape:
                raise ModelError(
                    f"{name} has shape {tuple(saved[name].shape)}, the model wants {tuple(parameter.shape)}",
                    where=str(folder),
                    harm="The adapter belongs to another base model or rank.",
                    hint="Use the base named in its adapter_config.json.",
                )
        copy_into(wanted, saved)

    def merge(self, model: Any) -> None:
        """W <- W + s B A for every adapted layer, summed in fp32 and rounded once to the weight's own dtype."""
        with torch.no_grad():
            for name, layer in adapters(model).items():
                weight = layer.base.weight
                weight.copy_((weight.float() + layer.delta()).to(weight.dtype))
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, layer.base)


def adapters(model: Any) -> dict[str, LoraLinear]:
    """The adapted layers by their name in the base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _require_same(wanted: set[str], saved: set[str], folder: Path) -> None:
    if wanted == saved:
        return
    missing, extra = sorted(wanted - saved), sorted(saved - wanted)
    raise ModelError(
        f"the adapter does not fit the model: {len(missing)} tensors missing, {len(extra)} unknown"
        + (f" (first: {(missing or extra)[0]})" if missing or extra else ""),
        where=str(folder),
        harm="Loading it in part would give a model nobody trained.",
        hint="Use the base named in its adapter_config.json.",
    )


SUPPORTED = {"use_dora": False, "use_rslora": False, "bias": "none", "modules_to_save": None}


def settings_of(folder: Path) -> LoraSettings:
    """The settings of a saved PEFT adapter; what this method does not compute is refused by name."""
    config = read_json(folder / "adapter_config.json")
    wrong = [] if config.get("peft_type") == "LORA" else [f"peft_type {config.get('peft_type')}"]
    wrong += [f"{key}: {config[key]}" for key, only in SUPPORTED.items() if config.get(key, only) not in (only, None)]
    wrong += [key for key in ("rank_pattern", "alpha_pattern", "layers_to_transform") if config.get(key)]
    if wrong:
        raise ModelError(
            f"this adapter uses {', '.join(wrong)}, which Fitout does not compute yet",
            where=str(folder / "adapter_config.json"),
            harm="Ignoring it would change what the adapter does.",
            hint="Merge it with the tool that made it, and use the merged model as model.base.",
        )
    targets = config["target_modules"]
    return LoraSettings(
        rank=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout", 0.0), targets=targets
    )


def create(settings: LoraSettings) -> Lora:
    return Lora(settings)
