"""Parameter groups, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..errors import RequestError
from . import TrainSettings

MAPS = ("qmap1", "qmap2")  # the 256 values of 8-bit moments: the same for all, made anew rather than saved


def make_optimizer(
    parameters: dict[str, nn.Parameter], settings: TrainSettings, rates: dict[str, float]
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); matrices decay, vectors (norms, biases) do not.

    `rates` are factors on the learning rate by parameter name (1 where not named); each group carries its `factor`.
    The 8-bit kinds keep both moments in 8 bits, in blocks of 256 (Dettmers et al., arXiv 2110.02861), where a parameter
    has at least 4,096 numbers; paged ones (arXiv 2305.14314) in memory that a GPU may move out.
    Raises RequestError where bitsandbytes is missing.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, rates.get(name, 1.0)), []).append(parameter)
    made: Any = [{"params": p, "weight_decay": decay, "factor": factor} for (decay, factor), p in groups.items()]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(made, lr=0.0, betas=settings.betas, fused=True)
    if find_spec("bitsandbytes") is None:
        raise RequestError(
            "8-bit optimizers need bitsandbytes, which is not installed here",
            where=f"train.optimizer: {settings.optimizer}",
            hint="pip install 'fitout[qlora]', or use train.optimizer: adamw.",
        )
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = AdamW8bit if settings.optimizer == "adamw_8bit" else PagedAdamW8bit
    return kind(made, lr=0.0, betas=settings.betas)


def optimizer_notes(settings: TrainSettings, device: torch.device) -> list[str]:
    """What a user should know about the optimizer on this device, one line each."""
    if settings.optimizer == "adamw" or device.type != "cpu":
        return []
    paged = "; there is nothing to page" if settings.optimizer.startswith("paged") else ""
    return [f"{settings.optimizer} on a CPU saves memory and costs time: its update is slower than adamw's{paged}"]


def learning_rate(step: int, total: int, peak: float, settings: TrainSettings) -> float:
    """The rate of step `step` (from 0) of `total`: linear warm-up, then cosine or linear to zero, or constant."""
    warmup = settings.warmup if settings.warmup >= 1 else math.ceil(settings.warmup * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (1 - done) if settings.schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * done))


def state_tensors(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """The optimizer's state by parameter name: `NAME|exp_avg`, `NAME|exp_avg_sq`, `NAME|step`, or what the 8-bit kinds
    have in their place (`state1`, `state2`, `absmax1`, `absmax2`)."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in MAPS:
                tensors[f"{name}|{key}"] = torch.as_tensor(value)
    return tensors


def load_state_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what `state_tensors` gave, dtypes kept."""
    _make_room(optimizer, {parameters[key.rpartition("|")[0]] for key in tensors})
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        state = optimizer.state[parameter]
        if isinstance(state.get(field), int):
            state[field] = int(value)
        elif field in state:  # in place: a paged buffer stays one
            state[field].copy_(value)
        else:
            device = torch.device("cpu") if field == "step" and parameter.device.type == "cpu" else parameter.device
            state[field] = value.to(device)


def _make_room(optimizer: Any, filled: set[nn.Parameter]) -> None:
    """Empty state as the first step would make it, where an optimizer makes its own kind of buffers (bitsandbytes)."""
    if not hasattr(optimizer, "init_state"):
        return
    for at, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter in filled:
                optimizer.init_state(group, parameter, at, index)
