"""What the engines that divide a model share: one module that they hook, and values that come from the main rank."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...layout import Layout, Segment
from ...model.load import Pending, in_order
from ...objectives.base import Objective
from ..backend import Backend

FILLER = Layout(  # one token, trained with weight 0: all collectives of a micro-batch, and gradients of exactly nothing
    ids=np.zeros(1, np.int64),
    positions=np.zeros(1, np.int64),
    segments=(Segment(0, 1),),
    target_at=np.zeros(1, np.int64),
    target_token=np.zeros(1, np.int64),
    target_weight=np.zeros(1, np.float32),
    target_sample=np.zeros(1, np.int64),
)


class Computed(nn.Module):
    """A model's loss as a module of its own, the root of what an engine hooks.

    An engine brings divided parameters together around a module's call. Fitout reads the head's weight without calling
    the head (model/fused.py, in chunks of supervised rows), so the call that the engine sees must be one that holds
    both the decoder's and that reading: this one.
    """

    def __init__(self, model: nn.Module, objective: Objective, context: Callable[[], AbstractContextManager]):
        super().__init__()
        self.model, self.objective, self.context = model, objective, context

    def forward(self, layout: Layout, total: float) -> Tensor:
        with self.context():
            return self.objective.loss(self.model, layout, total)


class Divided(Backend):
    """A backend whose engine divides optimizer state, gradients or parameters; `engaged` is what it calls."""

    joins = True
    engaged: Any = None

    def loss(self, model: Any, objective: Objective, layout: Layout, total: float) -> Tensor:
        self.alive()
        return self.engaged(layout if layout.supervised else FILLER, total)

    def sum_gradients(self, parameters: Any) -> None:
        """Done by the engine, during the backward; before it is engaged by the ranks themselves."""
        if self.engaged is None:
            super().sum_gradients(parameters)

    def same_everywhere(self, tensors: Any) -> None:
        """Done by `engage`, from the main rank."""
        if not self.spreads:
            super().same_everywhere(tensors)

    def bring_together(self, *groups: Any) -> None:
        if not self.main:
            for group in groups:
                for name in in_order(group):
                    tensor = group[name]
                    if isinstance(tensor, Pending):
                        tensor.fetch()

    def spread(self, module: nn.Module, *, buffers_only: bool = False) -> None:
        """Gives every rank the main one's parameters and buffers of `module`, on the device; on the others they may be
        on `meta` before. Parts that are divided already are left alone."""
        made: dict[int, Any] = {}
        for part in module.modules():
            for tensors in (part._buffers,) if buffers_only else (part._parameters, part._buffers):
                for name, tensor in list(tensors.items()):
                    if tensor is not None and not is_divided(tensor):
                        if id(tensor) not in made:
                            made[id(tensor)] = self._from_main(tensor)
                        tensors[name] = made[id(tensor)]

    def _from_main(self, tensor: Tensor) -> Any:
        data = tensor.detach()
        data = data.to(self.device) if self.main else torch.empty_like(data, device=self.device)
        if self.ranks > 1:
            dist.broadcast(data.view(torch.uint8) if data.dtype in NOT_SENT else data, 0)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(data, requires_grad=tensor.requires_grad)
        return data


NOT_SENT = (torch.int16, torch.uint16, torch.bool)  # gloo has no collectives of these


def is_divided(tensor: Any) -> bool:
    """Whether a tensor is already a part of one (a DTensor, or DeepSpeed's)."""
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")


def replace(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Puts plain parameters in the place of divided ones, by name; those that share one go on sharing it."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    made: dict[str, nn.Parameter] = {}
    for part in model.modules():
        for key, parameter in list(part._parameters.items()):
            name = known.get(id(parameter)) if parameter is not None else None
            if name in whole:
                if name not in made:
                    made[name] = nn.Parameter(whole[name], requires_grad=parameter.requires_grad)  # type: ignore
                part._parameters[key] = made[name]
