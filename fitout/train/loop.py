"""fit(): resume, step, log, evaluate, save. The whole story of a run; the parts are in the files beside this one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data.batches import Batches, layouts_of
from ..data.store import Part
from ..errors import CheckError, FitoutError, Stopped
from ..layout import Layout
from ..model.methods.base import Method, copy_into, trainable
from ..model.parts import DATA, part
from ..objectives.base import Objective
from ..rundir import RunDir
from . import FIRST_BUDGET, TrainSettings
from .ahead import Ahead
from .backend import Backend
from .checkpoint import Checkpoint, Checkpoints
from .guard import FiniteGuard, StopRequest, is_out_of_memory
from .listeners import Listener
from .optim import learning_rate, make_optimizer
from .step import StepResult, mean_loss, train_step

if TYPE_CHECKING:
    from .profile import Profile

STATE = "method|"  # before the names of a method's own state in a checkpoint's weights


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint."""

    step: int = 0  # steps done
    tokens: int = 0
    supervised: int = 0
    skipped: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # of them, seconds without data
    pairs: int = 0  # see Layout
    padding: int = 0
    recomputed: float = 0.0  # tokens whose layers were computed twice (as much as all of them)
    budget: int = 0  # tokens a micro-batch, after halvings
    base_loss: float | None = None  # validation loss before the first step
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0  # validations since the best
    last_loss: float | None = None
    validation: list[list[float]] = field(default_factory=list)  # [step, loss]
    stopped_early: bool = False


@dataclass(frozen=True)
class Job:
    """What to train, on what. Made by verbs; `identity` is what a checkpoint must agree with to go on from it."""

    model: Any
    method: Method
    objective: Objective
    batches: Batches
    validation: Part | None
    settings: TrainSettings
    lr: float
    total_steps: int
    run: RunDir
    identity: dict[str, Any]
    info: dict[str, Any]
    profile: Profile | None = None


def fit(job: Job, backend: Backend, listeners: Sequence[Listener], *, resume: bool = False) -> Progress:
    """Trains to `total_steps`, or to early stopping. Raises Stopped (with a checkpoint saved) on SIGTERM and SIGINT."""
    run = _Run(job, backend, listeners if backend.main else ())
    run.begin(resume)
    try:
        with StopRequest() as stop:
            while run.at.step < job.total_steps and not run.at.stopped_early:
                run.step()
                stopping = backend.any(stop.name is not None)
                if run.evaluation_due():
                    run.evaluate()
                if run.save_due() or stopping:
                    run.save()
                if stopping:
                    raise Stopped(
                        f"stopped by {stop.name or 'another rank'} after step {run.at.step} of {job.total_steps}; "
                        "a checkpoint is saved",
                        hint="Go on with the same command (for `fitout train` add --resume).",
                    )
        run.finish()
    finally:
        run.ahead.close()
        if job.profile:
            job.profile.close()
        for listener in run.listeners:
            listener.close()
    return run.at


class _Run:
    """The loop's state and its moves."""

    def __init__(self, job: Job, backend: Backend, listeners: Sequence[Listener]):
        self.job, self.backend, self.listeners = job, backend, listeners
        self.parameters = trainable(job.model)
        self.optimizer: Any = None  # made when the backend takes the model over
        self.checkpoints = Checkpoints(job.run.checkpoints)
        self.finite = FiniteGuard()
        self.at = Progress(budget=_first_budget(job.settings, backend))
        self.ahead = Ahead(self._make_layouts, job.total_steps)
        self.saved_step = -1
        self.recomputed = 0.0  # share of the layers that are computed again in the backward pass

    # beginning

    def begin(self, resume: bool) -> None:
        checkpoint, passed_over = self.checkpoints.newest() if resume else (None, [])
        if checkpoint:
            self._restore(checkpoint)
            self._engage()
            self.backend.load_moments(self.optimizer, self.parameters, checkpoint.optimizer())
        else:
            self.job.method.begin(self.job.model, self._gradients)
            state = self.job.method.state(self.job.model)
            self.backend.same_everywhere([*self.parameters.values(), *state.values()])
            if state and self.backend.ranks > 1:
                self.job.method.restore(self.job.model, state)
            self._engage()
        for listener in self.listeners:
            listener.start({**self.job.info, "total_steps": self.job.total_steps, "from_step": self.at.step})
        if checkpoint or passed_over:
            self._tell("resumed", passed_over=passed_over)
        if self.job.settings.gradient_checkpointing is True:
            self._recompute_activations()
        self.job.model.train()
        if self.at.step == 0:
            self.evaluate()

    def _engage(self) -> None:
        """From here on the model is the backend's: parameters may be divided, and change only by its steps."""
        settings, rates = self.job.settings, self.job.method.rates(self.job.model)
        self.parameters, self.optimizer = self.backend.engage(
            self.job.model, self.job.objective, lambda parameters: make_optimizer(parameters, settings, rates)
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        saved, wanted = checkpoint.state["identity"], self.job.identity
        differs = [key for key in wanted if saved.get(key) != wanted[key]]
        if differs:
            raise CheckError(
                f"the checkpoint was made with another {', another '.join(differs)}",
                where=str(checkpoint.folder),
                harm="Going on would mix two trainings.",
                hint="Undo the change, or start anew with another name or --out.",
            )
        self._put_back(checkpoint.weights())
        self.backend.load_state(checkpoint.state["backend"])
        self.at = Progress(**checkpoint.state["progress"])
        self.saved_step = self.at.step
        if self.at.step < self.job.total_steps:
            self.at.stopped_early = False

    def _put_back(self, tensors: dict[str, torch.Tensor]) -> None:
        """Trained parameters, and what else the method needs, as `_weights` gave them."""
        own = {name.removeprefix(STATE): tensor for name, tensor in tensors.items() if name.startswith(STATE)}
        self.job.method.restore(self.job.model, own)
        copy_into(self.parameters, tensors)

    def _weights(self) -> dict[str, Any]:
        state = self.job.method.state(self.job.model)
        return {**self.backend.weights(self.parameters), **{STATE + name: tensor for name, tensor in state.items()}}

    def _gradients(self) -> Iterator[None]:
        """Backward over the samples of the coming steps; at each yield one step's gradients, of all ranks, stand in the
        model, divided by the step's units."""
        batches, backend = self.job.batches, self.backend
        for index in range(self.at.step, self.job.total_steps):
            layouts = batches.layouts(index, budget=self.at.budget, rank=backend.rank, ranks=backend.ranks)
            (total,) = backend.sum(self.job.objective.units(layouts))
            try:
                for layout in layouts:
                    if layout.supervised:
                        with backend.compute():
                            loss = self.job.objective.loss(self.job.model, layout, total)
                        backend.backward(loss)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise FitoutError(
                    "memory ran out while gradients were computed to choose what is trained",
                    harm="The choice would rest on a part of the samples.",
                    hint=f"Set train.micro_batch_tokens below {self.at.budget}, or choose without gradients.",
                ) from error
            backend.sum_gradients(p for p in self.job.model.parameters() if p.requires_grad)
            yield

    # one step

    def step(self) -> None:
        settings, index = self.job.settings, self.at.step
        rate = learning_rate(index, self.job.total_steps, self.job.lr, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        profile = self.job.profile
        with profile.step(self.job.model, self.job.total_steps - index) if profile else nullcontext():
            start = time.perf_counter()
            result = self._step_with_memory(index)
            seconds = time.perf_counter() - start
            if profile:
                profile.saw(result, seconds, self.recomputed, self.backend.ranks)
        self.finite.saw(result.finite, index + 1, self._origins(index))
        self.at.step += 1
        self.job.method.after_step(self.job.model, self.optimizer, self.at.step, self.job.total_steps, self._gradients)
        self.at.tokens += result.tokens
        self.at.supervised += result.supervised
        self.at.seconds += seconds
        self.at.pairs += result.pairs
        self.at.padding += result.padding
        self.at.recomputed += self.recomputed * result.tokens
        self.at.last_loss = result.loss
        epoch, within = self.job.batches.epoch_of(index)
        if not result.finite:
            self.at.skipped += 1
            self._tell("skipped", reason="gradients are not finite", rows=self._origins(index))
        self._log(
            step=self.at.step,
            epoch=round(epoch + (within + 1) / self.job.batches.steps_in_epoch(epoch), 4),
            loss=result.loss,
            lr=rate,
            grad_norm=result.grad_norm,
            tokens=result.tokens,
            supervised_tokens=result.supervised,
            tokens_per_second=round(result.tokens / seconds, 1),
            memory_mb=memory_mb(self.backend.device),
        )
        if profile and (report := profile.take()):
            self._tell("profiled", **report)

    def _layouts(self, index: int) -> list[Layout]:
        """What a step computes; how long that was waited for is counted."""
        start = time.perf_counter()
        with part(DATA):
            layouts = self.ahead.get(index, self.at.budget)
        self.at.waited += time.perf_counter() - start
        return layouts

    def _make_layouts(self, index: int, budget: int) -> list[Layout]:
        return self.job.batches.layouts(index, budget=budget, rank=self.backend.rank, ranks=self.backend.ranks)

    def _step_with_memory(self, index: int) -> StepResult:
        """The step; when memory runs out, the same step again in smaller micro-batches."""
        while True:
            torch.manual_seed(_key(self.job.settings.seed, index, self.backend.rank))
            layouts = self._layouts(index)
            try:
                return train_step(
                    self.job.model,
                    self.job.objective,
                    layouts,
                    list(self.parameters.values()),
                    self.optimizer,
                    self.backend,
                    self.job.settings.clip,
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.backend.ranks > 1:
                    raise
                self.optimizer.zero_grad(set_to_none=True)
                self._need_less_memory(max(layout.tokens for layout in layouts), error)

    def _need_less_memory(self, largest: int, error: BaseException) -> None:
        """Halves the micro-batch; when each is one sample, recomputes activations; else gives up with advice."""
        longest = int(self.job.batches.part.lengths.max())
        if self.backend.device.type == "cuda":
            torch.cuda.empty_cache()
        if largest > longest:
            self.at.budget = max(longest, min(self.at.budget, largest) // 2)
            self._tell("oom", micro_batch_tokens=self.at.budget)
        elif self.job.settings.gradient_checkpointing == "auto" and not self.recomputed:
            self._recompute_activations()
            self._tell("oom", gradient_checkpointing=True)
        else:
            raise FitoutError(
                f"memory ran out on a single sample of {longest} tokens",
                harm="The last checkpoint is complete; nothing after it was kept.",
                hint="Lower data.max_length, take method: {kind: lora}, or a smaller base model.",
            ) from error

    def _recompute_activations(self) -> None:
        self.recomputed = 1.0
        self.job.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def _origins(self, index: int) -> list[str]:
        part = self.job.batches.part
        return [str(part.origin(int(row))) for row in self.job.batches.rows(index)[:8]]

    # evaluation

    def evaluation_due(self) -> bool:
        every, step = self.job.settings.evaluate_every, self.at.step
        if step >= self.job.total_steps:
            return True
        return step % every == 0 if every else self.job.batches.epoch_of(step)[1] == 0

    def evaluate(self) -> None:
        """Validation loss; remembers the best and counts the patience."""
        part, at = self.job.validation, self.at
        if part is None or len(part) == 0:
            return
        loss, by_task = self._validation_loss(part)
        at.validation.append([at.step, loss])
        if at.step == 0:
            at.base_loss = loss
        elif at.best_loss is None or loss < at.best_loss:
            at.best_loss, at.best_step, at.worse = loss, at.step, 0
            self._tell("evaluated", validation_loss=loss, best=True, **by_task)
            self.save()
            return
        else:
            at.worse += 1
            at.stopped_early = self.job.settings.patience is not None and at.worse >= self.job.settings.patience
        self._tell("evaluated", validation_loss=loss, best=False, **by_task)

    def _validation_loss(self, part: Part) -> tuple[float, dict[str, Any]]:
        """The loss over a part; and, where its rows have tasks, each task's own loss and its share of the whole."""
        backend, objective = self.backend, self.job.objective
        groups = part.tasks or {"": np.arange(len(part))}
        sums: dict[str, tuple[float, float]] = {}
        for name, rows in groups.items():
            layouts = layouts_of(
                part,
                rows,
                self.at.budget,
                backend.rank,
                backend.ranks,
                packing=self.job.batches.packing,
                share=self.job.batches.share,
            )
            (units,) = backend.sum(objective.units(layouts))
            loss = mean_loss(self.job.model, objective, layouts, backend)
            sums[name] = (loss * units if units else 0.0, units)
        whole, units = (sum(values) for values in zip(*sums.values(), strict=True))
        if not part.tasks:
            return loss, {}
        by_task = {
            name: {"loss": summed / own, "share": summed / whole if whole else 0.0}
            for name, (summed, own) in sums.items()
            if own
        }
        return (whole / units if units else float("nan")), {"by_task": by_task}

    # saving

    def save_due(self) -> bool:
        return self.at.step % self.job.settings.save_every == 0

    def save(self) -> None:
        if self.saved_step == self.at.step:
            return
        weights, moments = self._weights(), self.backend.moments(self.optimizer, self.parameters)
        if self.backend.main:
            self.checkpoints.save(
                self.at.step,
                weights,
                moments,
                {"identity": self.job.identity, "progress": asdict(self.at), "backend": self.backend.state()},
            )
            self._tell("saved", path=str(self.checkpoints.path(self.at.step).name))
            self.checkpoints.prune(self.job.settings.keep_last, self.at.best_step)
        self.backend.bring_together(weights, moments)
        self.backend.barrier()
        self.saved_step = self.at.step

    def finish(self) -> None:
        """The last checkpoint, then the weights the run ends with."""
        self.save()
        self.backend.disengage(self.job.model, self.parameters, frozen_too=not self.job.method.frozen_base)
        self.parameters = trainable(self.job.model)
        best, whole = self.at.best_step, self.backend.main or not self.backend.spreads
        if whole and self.job.settings.keep == "best" and best is not None and best != self.at.step:
            self._put_back(self.checkpoints.at(best).weights())
        self._tell("finished", best_step=self.at.best_step, stopped_early=self.at.stopped_early)

    # telling

    def _log(self, **row: Any) -> None:
        for listener in self.listeners:
            listener.row(row)

    def _tell(self, event: str, **facts: Any) -> None:
        self._log(event=event, step=self.at.step, **facts)


def _first_budget(settings: TrainSettings, backend: Backend) -> int:
    if settings.micro_batch_tokens != "auto":
        return settings.micro_batch_tokens
    return FIRST_BUDGET[backend.device.type]


def _key(seed: int, step: int, rank: int) -> int:
    """The random stream of a step on a rank: it depends on what it belongs to, never on what came before."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def memory_mb(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) >> 20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
