"""Parameter groups, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from . import TrainSettings


def make_optimizer(
    parameters: dict[str, nn.Parameter], settings: TrainSettings, rates: dict[str, float]
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); matrices decay, vectors (norms, biases) do not.

    `rates` are factors on the learning rate by parameter name (1 where not named); each group carries its `factor`.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decay = settings.weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, rates.get(name, 1.0)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": decay, "factor": factor} for (decay, factor), p in groups.items()],
        lr=0.0,
        betas=settings.betas,
        fused=True,
    )


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
    """The optimizer's state by parameter name: `NAME|exp_avg`, `NAME|exp_avg_sq`, `NAME|step`."""
    tensors = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}|{key}"] = value
    return tensors


def load_state_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, torch.Tensor]
) -> None:
    """Puts back what `state_tensors` gave, dtypes kept."""
    for key, value in tensors.items():
        name, _, field = key.rpartition("|")
        parameter = parameters[name]
        device = torch.device("cpu") if field == "step" and parameter.device.type == "cpu" else parameter.device
        optimizer.state[parameter][field] = value.to(device)
