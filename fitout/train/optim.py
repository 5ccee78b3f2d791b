"""Parameter groups, the optimizer and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from . import TrainSettings


def make_optimizer(parameters: dict[str, nn.Parameter], settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); matrices decay, vectors (norms, biases) do not."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=settings.betas, fused=True)


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
