"""What every fine-tuning method can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import ModelError, RequestError

# Runs the objective's backward on the samples of the coming steps. At each yield the gradient of one step, summed over
# micro-batches and ranks, stands in `.grad` of every parameter that requires one; the weights are left alone.
Gradients = Callable[[], Iterator[None]]


class Method:
    """A fine-tuning method over a loaded model. A method overrides what it does differently from the defaults here."""

    frozen_base = True  # the base stays as it is: it may be stored in the compute dtype, and merging means something
    unmergeable: str | None = None  # why what was trained cannot be folded into the plain architecture, when it cannot

    held: str | None = None  # how the base is held while it is computed with, where that is not as it is stored

    def load_kwargs(self, dtype: torch.dtype) -> dict[str, Any]:
        """What `from_pretrained` is asked for besides the dtype the base is stored and computed in (quantisation)."""
        return {}

    def trained_in(self, folder: Path) -> str | None:
        """The precision the base must be loaded in to be the one that the adapter in `folder` was trained over; None
        where any is as good."""
        return None

    def plain(self) -> Method:
        """The method that puts the same adapter over the base as it is stored; another one only where the base was
        trained over in other numbers (quantised)."""
        return self

    def in_fp32(self, model: nn.Module) -> None:
        """Has an applied model that was loaded in less compute in fp32, with the same weights to the last bit, so that
        logits are compared without the rounding of 16-bit sums."""
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()

    def notes(self, model: nn.Module) -> list[str]:
        """What a user should know about this model with this method, one line each."""
        return []

    def size(self, model: nn.Module) -> int:
        """How many parameters the model has."""
        return sum(parameter.numel() for parameter in model.parameters())

    def apply(self, model: nn.Module) -> None:
        """Makes the model trainable as the method wants; what is trained has requires_grad, all else has not."""
        raise NotImplementedError

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Factors on the learning rate by parameter name; those not named have 1."""
        return {}

    def begin(self, model: nn.Module, gradients: Gradients, alive: Callable[[], None] = lambda: None) -> None:
        """Called once before the first step of a new run, for a method that chooses what to train; one that takes long
        says that it is `alive`."""

    def after_step(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, total: int, gradients: Gradients
    ) -> None:
        """Called after optimizer step `step` (from 1) of `total`, for a method that changes what is trained."""

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """What a checkpoint needs besides the trained parameters and the optimizer's moments; the main rank's is given
        to all after `begin`."""
        return {}

    def restore(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Puts back what `state` gave."""

    def undivided(self, stage: int) -> str | None:
        """Why a run cannot be divided over ranks as ZeRO's stage does (1: optimizer state, 2: gradients too, 3:
        parameters too, as FSDP's); None where it can."""
        return None

    def save(self, model: nn.Module, folder: Path, *, base: str, revision: str | None = None) -> None:
        """Writes what was trained into `folder` (PEFT's format, the method's own, or Hugging Face's)."""
        raise NotImplementedError

    def load(self, model: nn.Module, folder: Path) -> None:
        """Reads what `save` wrote into a model this method was applied to. Raises ModelError when it does not fit."""
        raise NotImplementedError

    def merge(self, model: nn.Module) -> None:
        """Folds what was trained into the plain architecture, in place."""
        raise NotImplementedError


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name, in a stable order (module order); shared ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def count(parameters: dict[str, nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters.values())


def raise_to_fp32(parameters: dict[str, nn.Parameter]) -> bool:
    """Gives trained weights that are stored in less than fp32 fp32 masters, in place; whether there were any."""
    low = [parameter for parameter in parameters.values() if parameter.dtype != torch.float32]
    for parameter in low:
        parameter.data = parameter.data.float()
    return bool(low)


def copy_into(parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]) -> None:
    """Copies saved tensors over parameters of the same names; none may be missing."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def freeze_base(model: Any) -> None:
    """Nothing of the base is trained, except the embeddings of a grown vocabulary: its new rows mean nothing yet."""
    from ..load import embeddings

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if getattr(model, "fitout_grown_vocabulary", False):
        for module in embeddings(model).values():
            module.weight.requires_grad_(True)


def decoder_layers(model: Any) -> tuple[str, list[nn.Module]]:
    """The decoder's layers, first to last, and the name of the list that holds them."""
    config, decoder = model.config.get_text_config(decoder=True), model.get_decoder()
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            path = next(n for n, m in model.named_modules() if m is module)
            return path, list(module)
    raise RequestError(
        f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers",
        harm="There would be no telling which part of the model is meant.",
        hint="Take method: {kind: lora}, which goes by the names of linear layers.",
    )


def linear_layers(model: Any, targets: list[str] | str, *, head: bool = False, beside: Iterable[str] = ()) -> list[str]:
    """Names of the linear layers that `targets` means, none of them in the modules `beside`. `all-linear` is all but
    the head, which can be named where `head` allows it. Raises RequestError when there is none to adapt."""
    last, inside = model.get_output_embeddings(), tuple(f"{name}." for name in beside)
    head = head and targets != "all-linear"
    linear = [n for n, m in model.named_modules() if is_linear(m) and (head or m is not last)]
    if isinstance(targets, str):
        chosen = [n for n in linear if not _never_called(model, n)]
    else:
        chosen = chosen_by_name(linear, targets)
        _require_called(model, chosen)
    chosen = [n for n in chosen if not f"{n}.".startswith(inside)]
    if not chosen:
        raise nothing_to_adapt(targets)
    return chosen


def _never_called(model: Any, name: str) -> bool:
    """Whether this is a layer whose weight the model's own code multiplies by, so that what stands in the layer's place
    would compute nothing: the one that gives Mamba's time steps."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "dt_proj" and hasattr(model.get_submodule(owner), "A_log")


def _require_called(model: Any, chosen: list[str]) -> None:
    never = [name for name in chosen if _never_called(model, name)]
    if never:
        raise RequestError(
            f"method.targets names {never[0].rpartition('.')[2]}, a layer that this model never calls",
            harm="It would silently stay untrained: the model's own code multiplies by its weight itself.",
            hint="Leave it out, or train it with method: {kind: full}.",
        )


@torch.no_grad()
def is_linear(module: nn.Module) -> bool:
    """Whether this computes what a linear layer does: routers of experts are written as linear layers that do more."""
    if not isinstance(module, nn.Linear):
        return False
    weight, bias = module.weight, module.bias
    if type(module).forward is nn.Linear.forward or not weight.is_floating_point():
        return True
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=torch.float32).view(2, -1).to(weight)
    try:
        found, right = module(x), nn.functional.linear(x, weight, bias)
    except (RuntimeError, TypeError, ValueError):
        return False
    same = isinstance(found, torch.Tensor) and found.shape == right.shape
    return same and (found.is_meta or torch.allclose(found.float(), right.float(), rtol=0.02, atol=1e-4))


def nothing_to_adapt(targets: list[str] | str) -> RequestError:
    return RequestError(
        "method.targets leaves no linear layer to adapt",
        harm="Nothing would be trained.",
        hint="Train this model with method: {kind: full}."
        if targets == "all-linear"
        else "Use targets: all-linear; a model without linear layers is trained with method: {kind: full}.",
    )


def left_alone(model: nn.Module) -> list[str]:
    """What to know of weights of two dimensions and more that no method for linear layers trains: of layers that are
    never called, and of a mixture of experts whose experts are tensors of three dimensions."""
    never = [name for name, module in model.named_modules() if is_linear(module) and _never_called(model, name)]
    lines = []
    if never:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in never}))
        lines.append(
            f"{len(never)} layers ({leaves}) stay as they are: the model's own code reads their weights itself"
        )
    count, kinds = 0, set()
    for module in model.modules():
        for parameter in () if isinstance(module, nn.modules.conv._ConvNd) else module.parameters(recurse=False):
            if parameter.dim() == 3 and not parameter.requires_grad:
                count += parameter.numel()
                kinds.add(str(parameter.dtype).removeprefix("torch."))
    if count:
        lines.append(
            f"the experts' {count:,} parameters stay as they are, in {' and '.join(sorted(kinds))}: they are no linear "
            "layers; PEFT may read what is trained beside them otherwise: take the merged model elsewhere"
        )
    return lines


def chosen_by_name(linear: list[str], targets: list[str]) -> list[str]:
    """Those of the linear layers whose names end in one of `targets`. Raises RequestError for one that none ends in."""
    missing = [w for w in targets if not any(n == w or n.endswith("." + w) for n in linear)]
    if missing:
        known = sorted({n.rpartition(".")[2] for n in linear})
        raise RequestError(
            f"method.targets names layers this model does not have: {', '.join(missing)}",
            harm="They would silently stay untrained.",
            hint=f"Linear layers here: {', '.join(known)}; or targets: all-linear.",
        )
    return [n for n in linear if any(n == w or n.endswith("." + w) for w in targets)]


def fill(wanted: dict[str, torch.Tensor], saved: dict[str, torch.Tensor], folder: Path) -> None:
    """Copies a saved adapter over tensors of the same names. Raises ModelError unless names and shapes all fit."""
    faults = [f"{name} is missing" for name in sorted(wanted.keys() - saved.keys())]
    faults += [f"{name} is not known here" for name in sorted(saved.keys() - wanted.keys())]
    faults += [
        f"{name} has shape {tuple(saved[name].shape)}, the model wants {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & saved.keys())
        if saved[name].shape != wanted[name].shape
    ]
    if faults:
        raise ModelError(
            f"the adapter does not fit the model in {len(faults)} tensors: {faults[0]}",
            where=str(folder),
            harm="Loading it in part would give a model nobody trained.",
            hint="Use the base named in its adapter_config.json.",
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(saved[name])
