"""Where a step runs: one process, or several ranks of which each holds the whole model ("ddp").

This file and engines/ are all that knows torch.distributed and DeepSpeed. Ranks are started by
`fitout run --processes`, torchrun or anything else that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
Each rank computes its own micro-batches; gradients are summed once a step, after the last of them.

Why not torch's DistributedDataParallel: it counts on every rank calling the same module as often as the others with the
same parameters trained, which a step with an empty micro-batch, an objective's own forward and a method that chooses
its entries do not do (docs/parallel.md).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import FitoutError
from ..layout import Layout
from ..model.load import Pending
from ..model.methods.base import trainable
from ..objectives.base import Objective
from .optim import load_state_tensors, state_tensors
from .watch import Watch

BUCKET = 25_000_000  # numbers a reduction; as DDP's default bucket of 25 MB in spirit: large enough to amortise latency
COLLECTIVE_TIMEOUT = timedelta(hours=2)  # a rank that hangs in training is found by `watched`, long before

Make = Callable[[dict[str, nn.Parameter]], torch.optim.Optimizer]  # an optimizer of the trained parameters, by name


class Backend:
    """One process among `ranks`, on its device; fp32 until `compute_in` says otherwise."""

    kind = "ddp"
    stage = 0  # of ZeRO, as the planner counts: what is divided
    spreads = False  # the model's values come from the main rank in `engage`; the others need only its shapes
    joins = False  # every micro-batch has collectives of its own: a rank computes also those that are empty for it

    _store: ClassVar[dist.Store | None] = None

    def __init__(self, device: torch.device):
        self.device = device
        self.rank = int(os.environ.get("RANK", 0))
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))
        self._dtype: torch.dtype | None = None
        self._scaler: torch.amp.GradScaler | None = None
        self._watch: Watch | None = None
        if self.ranks > 1 or self.joins:
            self._connect()

    def _connect(self) -> None:
        if dist.is_initialized():
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            Backend._store, _, _ = next(dist.rendezvous("env://"))
        else:
            Backend._store = dist.HashStore()  # an engine that divides can do so over one process, to off-load
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",  # off-loaded parts are on the CPU
            store=dist.PrefixStore("collectives", Backend._store),
            rank=self.rank,
            world_size=self.ranks,
            timeout=COLLECTIVE_TIMEOUT,
        )

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def shares_steps(self) -> bool:
        """Whether a micro-batch cannot be given up here alone, because others compute it as well or an engine does."""
        return self.ranks > 1 or self.joins

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

    # the model in training

    def engage(self, model: Any, objective: Objective, make: Make) -> tuple[dict[str, nn.Parameter], Any]:
        """Readies the model, whose values stand, for steps: (trained parameters by name, optimizer)."""
        parameters = trainable(model)
        return parameters, make(parameters)

    def disengage(self, model: Any, parameters: dict[str, nn.Parameter], *, frozen_too: bool) -> None:
        """After the last step: the trained parameters, and all others if so, are plain whole tensors again on the main
        rank."""

    def loss(self, model: Any, objective: Objective, layout: Layout, total: float) -> Tensor:
        """The objective's loss of one micro-batch."""
        self.alive()
        with self.compute():
            return objective.loss(model, layout, total)

    def compute(self) -> AbstractContextManager:
        """The context of a forward: autocast where trained weights are kept in fp32 and computed in less."""
        return torch.autocast(self.device.type, self._dtype) if self._dtype else nullcontext()

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """`last` says that this is the step's last micro-batch."""
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

    # what a checkpoint holds

    @property
    def saves_aside(self) -> bool:
        """Whether checkpoints are written while the training goes on. On a GPU a full fine-tuning's state takes longer
        to write than hundreds of steps; on a CPU less than one step, and the writing takes from the same cores."""
        return self.device.type == "cuda"

    def weights(self, parameters: dict[str, nn.Parameter]) -> Mapping[str, Tensor | Pending]:
        """The trained parameters, whole."""
        return parameters

    def moments(
        self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
    ) -> Mapping[str, Tensor | Pending]:
        """The optimizer's state by parameter name, whole (see optim.state_tensors)."""
        return state_tensors(optimizer, parameters)

    def load_moments(
        self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor]
    ) -> None:
        """Puts back what `moments` gave, of any number of ranks."""
        load_state_tensors(optimizer, parameters, tensors)

    def bring_together(self, *groups: Mapping[str, Tensor | Pending]) -> None:
        """What a rank does while the main one writes `groups` in turn."""

    def state(self) -> dict:
        return self._scaler.state_dict() if self._scaler else {}

    def load_state(self, state: dict) -> None:
        if self._scaler and state:
            self._scaler.load_state_dict(state)

    # agreement between ranks

    def agree(self, choice: str, choices: Sequence[str]) -> str:
        """The main rank's choice, on every rank (each may have measured something else)."""
        if self.ranks == 1:
            return choice
        index = torch.tensor(choices.index(choice), device=self.device)
        dist.broadcast(index, 0)
        return choices[int(index)]

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

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """The main rank goes through the block alone, then the others do. They wait by asking the store, as long as it
        takes: a collective would run into its time-out over hours of data."""
        if self.ranks > 1 and not self.main:
            while not self._done(what):
                time.sleep(0.2)
        yield
        if self.ranks > 1 and self.main and Backend._store is not None:
            Backend._store.set(what, "done")

    def _done(self, what: str) -> bool:
        return Backend._store is None or Backend._store.check([what])

    # life and end

    @contextmanager
    def watched(self, folder: Path, seconds: float) -> Iterator[None]:
        """Inside, a process that computes nothing for so long is taken as hung (see watch.py)."""
        self._watch = Watch(folder / f"rank-{self.rank}.txt", seconds, self.rank, self.ranks)
        try:
            yield
        finally:
            self._watch.close()
            self._watch = None

    def alive(self) -> None:
        if self._watch:
            self._watch.beat()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Leaves the group. A collective that failed because another rank is gone ends in an error that says so."""
        if error is None:
            self.close()
        elif self.ranks > 1 and _is_lost(error):
            raise FitoutError(
                f"another rank is gone (rank {self.rank} of {self.ranks} noticed)",
                harm="A step needs all ranks, so this one ends too; the last checkpoint is complete.",
                hint="See what ended the other one first, then go on with the same command (for `fitout train` add "
                "--resume).",
            ) from error


def _is_lost(error: BaseException) -> bool:
    """Whether a collective says that its peers are gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)
