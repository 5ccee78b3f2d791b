"""What a forward needs besides the weights, from the host to the device, without the host waiting for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """CPU tensors on the device. To a CUDA card they go as one copy out of pinned memory: PyTorch's plain `.to(device)`
    waits for all that was launched before it, and each of them would."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    order = sorted(range(len(tensors)), key=lambda at: -tensors[at].element_size())  # so that each begins aligned
    pieces = [tensors[at].reshape(-1).view(torch.uint8) for at in order]
    there = torch.cat(pieces).pin_memory().to(device, non_blocking=True).split([len(piece) for piece in pieces])
    found = {at: piece.view(tensors[at].dtype).view(tensors[at].shape) for at, piece in zip(order, there, strict=True)}
    return [found[at] for at in range(len(tensors))]
