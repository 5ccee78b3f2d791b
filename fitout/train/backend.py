"""Where a step runs: one process or several ranks. The only file that knows torch.distributed.

Ranks are started by torchrun or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
Each rank computes its own micro-batches; gradients are summed once a step, after the last of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25_000_000  # numbers a reduction; as DDP's default bucket of 25 MB in spirit: large enough to amortise latency


class Backend:
    """One process among `ranks`, on its device; fp32 until `compute_in` says otherwise."""

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self._dtype: torch.dtype | None = None
        self._scaler: torch.amp.GradScaler | None = None
        if self.ranks > 1 and not dist.is_initialized():
            kind = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(kind, timeout=timedelta(hours=2))  # one rank prepares data while the others wait

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled up before backward (fp16), by a factor that is sought on the way."""
        return self._scaler is not None

    def compute_in(self, precision: str, *, autocast: bool) -> None:
        """fp32, bf16 or fp16; with `autocast` where the trained weights themselves stay in fp32."""
        if autocast and precision != "fp32":
            self._dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        if precision == "fp16":
            self._scaler = torch.amp.GradScaler(self.device.type)

    def agree(self, choice: str, choices: Sequence[str]) -> str:
        """The main rank's choice, on every rank (each may have measured something else)."""
        if self.ranks == 1:
            return choice
        index = torch.tensor(choices.index(choice), device=self.device)
        dist.broadcast(index, 0)
        return choices[int(index)]

    def compute(self) -> AbstractContextManager:
        """The context of a forward: autocast where trained weights are kept in fp32 and computed in less."""
        return torch.autocast(self.device.type, self._dtype) if self._dtype else nullcontext()

    def backward(self, loss: Tensor) -> None:
        (self._scaler.scale(loss) if self._scaler else loss).backward()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Adds up the ranks' gradients (each is already divided by the step's total over all ranks)."""
        if self.ranks == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(g.numel() for g in bucket) >= BUCKET:
                self._sum_bucket(bucket)
                bucket = []
        self._sum_bucket(bucket)

    def _sum_bucket(self, bucket: list[Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([g.reshape(-1) for g in bucket])
        dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))

    def clip(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], limit: float | None) -> float:
        """Scales gradients down to norm `limit`; returns the norm before (2-norm over all parameters)."""
        if self._scaler:
            self._scaler.unscale_(optimizer)
        return float(nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf")))

    def update(self, optimizer: torch.optim.Optimizer, *, finite: bool) -> None:
        """Takes the optimizer step, unless the gradients are not finite."""
        if self._scaler:
            self._scaler.step(optimizer)
            self._scaler.update()
        elif finite:
            optimizer.step()

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the ranks, in fp64."""
        if self.ranks == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it holds on some rank: a decision that all must take together."""
        return self.sum(float(flag))[0] > 0

    def same_everywhere(self, tensors: Iterable[Tensor]) -> None:
        """Gives every rank the main one's values, in place."""
        if self.ranks > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, 0)

    def barrier(self) -> None:
        if self.ranks > 1:
            dist.barrier()

    def close(self) -> None:
        if self.ranks > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def state(self) -> dict:
        return self._scaler.state_dict() if self._scaler else {}

    def load_state(self, state: dict) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)
