"""DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054) by `deepspeed.initialize`.

Stage 1 divides the optimizer's state, 2 the gradients too, 3 the parameters too. Not through accelerate, whose
DeepSpeed path on a CPU lets every rank train the first one's data.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RequestError
from ...model.load import Pending
from ...model.methods.base import trainable
from ...objectives.base import Objective
from ..backend import Make
from .divided import Computed, Divided, replace

MOMENTS = ("exp_avg", "exp_avg_sq")


class Zero(Divided):
    def __init__(
        self, device: torch.device, *, stage: int, offload: bool = False, settings: dict[str, Any] | None = None
    ):
        """`settings` is a user's own DeepSpeed configuration, whose `zero_optimization` rules over `offload`."""
        if find_spec("deepspeed") is None:
            raise RequestError(
                "ZeRO needs DeepSpeed, which is not installed here",
                where=f"train.parallel: zero{stage}",
                hint="pip install 'fitout[deepspeed]', or use train.parallel: fsdp, which torch itself has.",
            )
        self.stage, self.kind, self.spreads = stage, f"zero{stage}", stage == 3
        self.settings = settings or {}
        self.zero = dict(self.settings.get("zero_optimization") or {"stage": stage})
        if offload:
            self.zero.setdefault("offload_optimizer", {"device": "cpu", "pin_memory": device.type == "cuda"})
        super().__init__(device)

    def _connect(self) -> None:
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("DS_LOG_LEVEL", "error")
        os.environ.setdefault("LOCAL_RANK", "0")  # which it asks for over one process, too
        super()._connect()
        # torch's, about the names that DeepSpeed calls its collectives by, in each of them
        warnings.filterwarnings("ignore", r"`torch\.distributed\..* is deprecated", FutureWarning)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        deepspeed.init_distributed(
            dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False, auto_mpi_discovery=False
        )

    def engage(self, model: Any, objective: Objective, make: Make) -> tuple[dict[str, nn.Parameter], Any]:
        import deepspeed

        root = Computed(model, objective, self.compute)
        model.fitout_device = self.device
        if self.spreads:
            self.spread(root, buffers_only=True)
            _make_room(root)
        parameters = trainable(model)
        optimizer = make(parameters)  # its groups go by shapes, which divided parameters do not have
        config = self._config()
        if self.stage == 3:
            deepspeed.zero.Init(module=root, config_dict_or_path=config)  # one by one: no device holds them all
            head = model.get_output_embeddings()
            if head is not None:  # read by the loss, which does not call it
                for parameter in head.parameters():
                    deepspeed.zero.register_external_parameter(root, parameter)
        self.engaged, *_ = deepspeed.initialize(model=root, optimizer=optimizer, config=config)
        return parameters, self.engaged.optimizer

    def _config(self) -> dict[str, Any]:
        """DeepSpeed's configuration: the user's own, with what the recipe decides."""
        config = {
            **copy.deepcopy(self.settings),
            "train_micro_batch_size_per_gpu": 1,  # counts of samples are ours
            "gradient_accumulation_steps": 1,
            "zero_optimization": {**self.zero, "stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's own AdamW off-loaded too: nothing to compile
        }
        if self._dtype:
            config["torch_autocast"] = {"enabled": True, "dtype": str(self._dtype).removeprefix("torch.")}
        return config

    def compute(self) -> AbstractContextManager:
        """Nothing: DeepSpeed has an autocast of its own, which knows what dtype to bring parameters together in. Before
        it is engaged, for a method that begins with gradients, torch's."""
        return super().compute() if self.engaged is None else nullcontext()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        if self.engaged is None:
            super().backward(loss)
            return
        self.engaged.set_gradient_accumulation_boundary(last)
        self.engaged.backward(loss * self.ranks, scale_wrt_gas=False)  # it takes the mean over ranks, we the sum

    def clip(self, optimizer: Any, parameters: list[nn.Parameter], limit: float | None) -> float:
        """DeepSpeed's step is one: clips, updates unless the gradients are not finite, and forgets them."""
        optimizer.clip_grad = limit or 0.0
        self.engaged.step()
        return float("inf") if optimizer.overflow else float(self.engaged.get_global_grad_norm())

    def update(self, optimizer: Any, *, finite: bool) -> None:
        """Done by `clip`."""

    def weights(self, parameters: dict[str, nn.Parameter]) -> Mapping[str, Tensor | Pending]:
        from deepspeed.utils import safe_get_full_fp32_param

        def pending(parameter: Any) -> Pending:
            return Pending(_shape(parameter), torch.float32, lambda: safe_get_full_fp32_param(parameter).cpu())

        return {name: pending(parameter) for name, parameter in parameters.items()}

    def moments(self, optimizer: Any, parameters: dict[str, nn.Parameter]) -> Mapping[str, Tensor | Pending]:
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [optimizer.state[flat] for flat in self._flat() if optimizer.state.get(flat)]
        if not states:
            return {}
        if self.stage < 3:  # DeepSpeed links once, after its first group's first update: the others have no state yet
            optimizer._hp_optimizer_states_linked = False
            optimizer._lazy_init_hp_params_optimizer_state()

        def pending(parameter: Any, key: str) -> Pending:
            return Pending(
                _shape(parameter), torch.float32, lambda: safe_get_full_optimizer_state(parameter, key).cpu()
            )

        step = states[0]["step"].detach().cpu()
        tensors: dict[str, Tensor | Pending] = {}
        for name, parameter in parameters.items():
            tensors.update({f"{name}|{key}": pending(parameter, key) for key in MOMENTS})
            tensors[f"{name}|step"] = step
        return tensors

    def load_moments(self, optimizer: Any, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]) -> None:
        steps = {float(value) for key, value in tensors.items() if key.endswith("|step")}
        if not steps:
            return
        for flat in self._flat():  # as the first step would make them
            optimizer.state[flat] = {
                "step": torch.tensor(max(steps), dtype=torch.float32, device=flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in parameters.items():
            for key in MOMENTS:
                self._put(parameter, tensors[f"{name}|{key}"], key)

    def _put(self, parameter: Any, value: Tensor, key: str) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if self.stage < 3:
            safe_set_full_optimizer_state(parameter, value.to(self.device), key)
            return
        size = parameter.partition_numel()  # the last part is filled up with zeros
        padded = torch.zeros(size * self.ranks, dtype=torch.float32)
        padded[: value.numel()] = value.flatten()
        safe_set_local_optimizer_state(parameter, padded[size * self.rank :][:size].to(self.device), key)

    def _flat(self) -> list[Tensor]:
        """The flat parts that the wrapped optimizer updates."""
        optimizer = self.engaged.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def disengage(self, model: Any, parameters: dict[str, nn.Parameter], *, frozen_too: bool) -> None:
        import deepspeed

        whole: dict[str, Tensor] = {}
        for name, tensor in self.weights(parameters).items():
            fetched = tensor.fetch() if isinstance(tensor, Pending) else tensor
            if self.main:
                whole[name] = fetched
        for name, parameter in model.named_parameters():
            if frozen_too and self.stage == 3 and name not in parameters:
                with deepspeed.zero.GatheredParameters([parameter]):
                    if self.main:
                        whole[name] = parameter.detach().cpu().clone()
        self.engaged.destroy()
        replace(model, whole)


def _make_room(module: nn.Module) -> None:
    """Memory for parameters on `meta`, whose values come from the main rank: pages that nobody touches take none."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, tensor in list(part._parameters.items()):
            if tensor is not None and tensor.is_meta:
                if id(tensor) not in made:
                    made[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="cpu"), tensor.requires_grad)
                part._parameters[name] = made[id(tensor)]


def _shape(parameter: Any) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)
