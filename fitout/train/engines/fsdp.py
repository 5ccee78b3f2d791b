"""FSDP2: torch's `fully_shard`, one group a decoder layer (Zhao et al., arXiv 2304.11277; per-parameter sharding).

Parameters, gradients and optimizer state are divided by rows. Around a layer's call its parameters are brought together
and freed again, so inside it everything, our fused forms included, works on plain whole tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ...model.load import Pending
from ...model.methods.base import decoder_layers, trainable
from ...objectives.base import Objective
from ..backend import Make
from ..optim import state_tensors
from .divided import Computed, Divided, replace


class Fsdp(Divided):
    kind = "fsdp"
    stage = 3
    spreads = True

    def __init__(self, device: torch.device, *, offload: bool = False, reshard: bool = True):
        self.offload, self.reshard = offload, reshard
        super().__init__(device)

    def engage(self, model: Any, objective: Objective, make: Make) -> tuple[dict[str, nn.Parameter], Any]:
        root = Computed(model, objective, self.compute)
        model.fitout_device = self.device
        how: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.ranks,)),
            "reshard_after_forward": self.reshard,
            "mp_policy": MixedPrecisionPolicy(param_dtype=self._dtype, reduce_dtype=torch.float32)
            if self._dtype
            else MixedPrecisionPolicy(),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.offload
            else OffloadPolicy(),
        }
        module: Any
        for module in (*decoder_layers(model)[1], root):
            self.spread(module)
            fully_shard(module, **how)
            module.set_gradient_divide_factor(1.0)  # losses are divided by totals over all ranks: gradients add up
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
        self.engaged = root
        parameters = trainable(model)
        return parameters, make(parameters)

    def compute(self) -> AbstractContextManager:
        """Nothing: the engine itself brings parameters together in the dtype they are computed in."""
        return nullcontext()

    def clip(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], limit: float | None) -> float:
        norm: Any = nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf"))
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def weights(self, parameters: dict[str, nn.Parameter]) -> Mapping[str, Tensor | Pending]:
        return {name: self._pending(parameter) for name, parameter in parameters.items()}

    def moments(self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> Mapping[str, Any]:
        return {name: self._pending(tensor) for name, tensor in state_tensors(optimizer, parameters).items()}

    def _pending(self, tensor: Any) -> Tensor | Pending:
        if not isinstance(tensor, DTensor):
            return tensor
        return Pending(tensor.shape, tensor.dtype, lambda: self._whole(tensor))

    def _whole(self, tensor: Any) -> Tensor:
        """The whole of a divided tensor; every rank must ask, the main one gets it on the CPU."""
        tensor = tensor.detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.cpu() if self.main else tensor

    def load_moments(
        self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
    ) -> None:
        for key, value in tensors.items():
            name, _, field = key.rpartition("|")
            parameter: Any = parameters[name]
            local = parameter.to_local().device
            if value.ndim:
                value = distribute_tensor(
                    value.to(self.device), parameter.device_mesh, parameter.placements, src_data_rank=None
                )
            optimizer.state[parameter][field] = value.to(local)

    def disengage(self, model: Any, parameters: dict[str, nn.Parameter], *, frozen_too: bool) -> None:
        whole = {}
        for name, parameter in model.named_parameters():
            if frozen_too or name in parameters:
                tensor = self._whole(parameter)
                if self.main:
                    whole[name] = tensor
        replace(model, whole)
