"""fit(): resume, step, log, evaluate, save. The whole story of a run; the parts are in the files beside this one."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from ..data.batches import Batches, layouts_of
from ..data.store import Part
from ..errors import CheckError, FitoutError, RequestError, Stopped, changes
from ..layout import Layout, reaches
from ..model.memory import give_back, is_out_of_memory, recompute_activations
from ..model.methods.base import Method, copy_into, trainable
from ..model.parts import DATA, part
from ..objectives.base import Objective
from ..rundir import RunDir
from . import FIRST_BUDGET, RECOMPUTED, TrainSettings
from .ahead import Ahead
from .backend import Backend
from .checkpoint import Checkpoint, Checkpoints
from .guard import FiniteGuard, Interrupted, StopRequest
from .listeners import Listener
from .optim import learning_rate, make_optimizer
from .references import digest, load_references, require_finite, require_known, save_references
from .saver import Saver
from .step import StepResult, mean_loss, train_step

if TYPE_CHECKING:
    from .profile import Profile

T = TypeVar("T")
NAMED = 8  # rows that a message names
REFERRED = 512  # rows whose log-probabilities are computed at a time; of a pair both
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
    asked: int = 0  # tokens a micro-batch, at first
    budget: int = 0  # after halvings
    base_loss: float | None = None  # validation loss before the first step
    best_loss: float | None = None
    best_step: int | None = None
    worse: int = 0  # validations since the best
    last_loss: float | None = None
    validation: list[list[float | None]] = field(default_factory=list)  # [step, loss; None where it is not finite]
    stopped_early: bool = False
    references: str = ""  # digest of references.safetensors, where the objective refers to it


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
    """Trains to `total_steps`, or to early stopping. Raises Stopped (with a checkpoint saved) on SIGTERM and SIGINT:
    between two micro-batches, so that not even a long step or validation is waited for."""
    with StopRequest() as stop:
        run = _Run(job, backend, listeners if backend.main else (), stop)
        try:
            run.begin(resume)
            while run.at.step < job.total_steps and not run.at.stopped_early:
                run.step()
                run.saver.look()
                if run.evaluation_due():
                    run.evaluate()
                if run.save_due():
                    run.save()
                run.leave_when_asked()
            run.finish()
            run.leave_when_asked()
        except Interrupted:
            run.leave()
        finally:
            run.ahead.close()
            run.saver.close()
            if job.profile:
                job.profile.close()
            for listener in run.listening:
                listener.close()
    return run.at


class _Run:
    """The loop's state and its moves."""

    def __init__(self, job: Job, backend: Backend, listeners: Sequence[Listener], stop: StopRequest):
        self.job, self.backend, self.listeners, self.stop = job, backend, listeners, stop
        self.parameters = trainable(job.model)
        self.optimizer: Any = None  # made when the backend takes the model over
        self.checkpoints = Checkpoints(job.run.checkpoints)
        self.listening: list[Listener] = []  # those that were started
        self.finite = FiniteGuard(job.settings.on_nonfinite)
        self.first_budget = _first_budget(job.settings, backend)
        self.at = Progress(asked=self.first_budget, budget=self.first_budget)
        self.ahead = Ahead(self._make_layouts, job.total_steps)
        self.saver = Saver(self.checkpoints, backend, job.settings.keep_last, self._log)
        self.saved_step = -1
        self.recomputing = 0.0  # share of the layers that the backward pass goes through and computes again
        self.recomputed = 0.0  # the same as a share of all layers

    # beginning

    def begin(self, resume: bool) -> None:
        self.job.model.train()
        if self.job.settings.recompute:
            self._recompute_activations(self.job.settings.recompute)  # also for gradients that a method begins with
        checkpoint, passed_over = self.checkpoints.newest() if resume else (None, [])
        if checkpoint:
            self._restore(checkpoint)
            self._engage()
            self.backend.load_moments(self.optimizer, self.parameters, checkpoint.optimizer())
        else:
            self.job.method.begin(self.job.model, self._gradients, self.backend.alive)
            state = self.job.method.state(self.job.model)
            self.backend.same_everywhere([*self.parameters.values(), *state.values()])
            if state and self.backend.ranks > 1:
                self.job.method.restore(self.job.model, state)
            self._engage()
        for listener in self.listeners:
            listener.start({**self.job.info, "total_steps": self.job.total_steps, "from_step": self.at.step})
            self.listening.append(listener)
        if checkpoint or passed_over:
            self._tell("resumed", passed_over=passed_over)
        if self.job.objective.refers:
            self._refer()
        if (self.at.step == 0 or self.evaluation_due()) and not self._evaluated():  # a stop may have come within it
            self.evaluate()

    def _refer(self) -> None:
        """Gives the data the log-probabilities that the model gives their answers now, before the first step; those of
        then where the run goes on."""
        batches, path = self.job.batches, self.job.run.references
        needed = np.unique(np.concatenate([batches.rows(step) for step in range(self._first_epoch())]))
        parts = {"train": (batches.part, needed)}
        if self.job.validation:
            parts["validation"] = (self.job.validation, np.arange(len(self.job.validation)))
        if self.at.step == 0:
            start = time.perf_counter()
            found = {name: self._log_probs(*rows) for name, rows in parts.items()}
            for name, (its, rows) in parts.items():
                require_finite(found[name][rows], its, rows)
            if self.backend.main:
                save_references(path, found)
            self.at.references = digest(found)
            self.ahead.forget()  # what was made without them
            pairs = sum(len(rows) // 2 for _, rows in parts.values())
            self._tell("referred", pairs=pairs, seconds=round(time.perf_counter() - start, 1))
        else:
            found = load_references(path, self.at.references)
        for name, (its, rows) in parts.items():
            require_known(path, found[name][rows])
            its.references = found[name]

    def _first_epoch(self) -> int:
        """Steps until every row that is trained at all has been."""
        return min(self.job.total_steps, self.job.batches.steps_in_epoch(0))

    def _log_probs(self, part: Part, rows: np.ndarray) -> np.ndarray:
        """(rows of the part,) float64, of the trained tokens of each of some rows; NaN for the others."""
        found = np.full(len(part), np.nan)

        def compute(layouts: list[Layout]) -> list[tuple[np.ndarray, Any]]:
            made = []
            for layout in layouts:
                self._between()
                if layout.supervised or self.backend.joins:
                    self.backend.loss(self.job.model, objective, layout, 1.0)
                    made.append((layout.preferences, objective.log_probs))
            return made

        objective: Any = self.job.objective
        self.job.model.eval()
        with torch.no_grad():
            for chunk in np.split(rows, range(REFERRED, len(rows), REFERRED)):
                mine = np.zeros(len(chunk))
                for pairs, log_probs in self._in_memory(self._layouts_of(part, chunk), compute):
                    if len(pairs):  # each is on one rank
                        mine[np.searchsorted(chunk, pairs)] = log_probs.cpu().numpy()
                found[chunk] = self.backend.sum(*mine)
        self.job.model.train()
        return found

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
            told = changes(saved.get("recipe") or {}, wanted.get("recipe") or {})
            raise CheckError(
                f"the checkpoint was made with another {', another '.join(differs)}{f' ({told})' if told else ''}",
                where=str(checkpoint.folder),
                harm="Going on would mix two trainings.",
                hint="Undo the change, or start anew with another name or --out.",
            )
        self._put_back(checkpoint.weights())
        self.backend.load_state(checkpoint.state["backend"])
        self.at = Progress(**checkpoint.state["progress"])
        self.saved_step = self.at.step
        if self.at.step > self.job.total_steps:
            raise RequestError(
                f"{self.at.step:,} steps are done, and the recipe asks for {self.job.total_steps:,}",
                where=str(checkpoint.folder),
                harm="What was trained cannot be taken back.",
                hint="Ask for at least as many steps, or train anew with another name or --out.",
            )
        self.at.stopped_early = self._has_no_patience()
        if self.at.asked != self.first_budget:
            self.at.asked = self.at.budget = self.first_budget

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

        def backward(layouts: list[Layout]) -> None:
            (total,) = self.backend.sum(self.job.objective.units(layouts))
            for layout in layouts:
                if layout.supervised:
                    self.backend.alive()
                    with self.backend.compute():
                        loss = self.job.objective.loss(self.job.model, layout, total)
                    self.backend.backward(loss)

        for index in range(self.at.step, self.job.total_steps):
            self._in_memory(self._layouts(index), backward)
            self.backend.sum_gradients(p for p in self.job.model.parameters() if p.requires_grad)
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
            result = self._in_memory(self._layouts(index), lambda layouts: self._train(index, layouts))
            seconds = time.perf_counter() - start
            if profile:
                profile.saw(result, seconds, self.recomputed, self.backend.ranks)
        culprits = [] if result.finite else self._culprits(index, result.loss)
        if self.finite.too_many(result.finite, searching=self.backend.scales_loss and math.isfinite(result.loss)):
            self._give_up_on_numbers(index, culprits)
        self.at.step += 1
        self.job.method.after_step(self.job.model, self.optimizer, self.at.step, self.job.total_steps, self._gradients)
        self.at.tokens += result.tokens
        self.at.supervised += result.supervised
        self.at.seconds += seconds
        self.at.pairs += result.pairs
        self.at.padding += result.padding
        self.at.recomputed += self.recomputed * result.tokens
        self.at.last_loss = result.loss
        if not result.finite:
            self.at.skipped += 1
            self._tell("skipped", reason="gradients are not finite", rows=culprits)
        epoch, within = self.job.batches.epoch_of(index)
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
            **({"figures": result.figures} if result.figures else {}),
            **({"tasks": tasks} if (tasks := self.job.batches.tasks(index)) else {}),
        )
        if profile and (report := profile.take()):
            self._tell("profiled", **report)

    def _train(self, index: int, layouts: list[Layout]) -> StepResult:
        torch.manual_seed(_key(self.job.settings.seed, index, self.backend.rank))
        return train_step(
            self.job.model,
            self.job.objective,
            layouts,
            list(self.parameters.values()),
            self.optimizer,
            self.backend,
            self.job.settings.clip,
            self._between,
        )

    def _layouts(self, index: int) -> Callable[[], list[Layout]]:
        """This rank's micro-batches of a step, under the budget at the time they are asked for; how long that was
        waited for is counted."""

        def timed() -> list[Layout]:
            start = time.perf_counter()
            with part(DATA):
                layouts = self.ahead.get(index, self.at.budget)
            self.at.waited += time.perf_counter() - start
            return layouts

        return timed

    def _make_layouts(self, index: int, budget: int) -> list[Layout]:
        return self.job.batches.layouts(index, budget=budget, rank=self.backend.rank, ranks=self.backend.ranks)

    def _layouts_of(self, rows_of: Part, rows: np.ndarray) -> Callable[[], list[Layout]]:
        backend, how = self.backend, {"packing": self.job.batches.packing, "share": self.job.batches.share}
        return lambda: layouts_of(rows_of, rows, self.at.budget, backend.rank, backend.ranks, **how)

    # memory

    def _in_memory(self, layouts_now: Callable[[], list[Layout]], compute: Callable[[list[Layout]], T]) -> T:
        """What `compute` makes of the layouts; when memory runs out, of smaller ones of the same samples."""
        while True:
            layouts = layouts_now()
            try:
                return compute(layouts)
            except (RuntimeError, MemoryError) as error:
                if "modified by an inplace operation" in str(error):
                    raise _changed_in_place() from error
                if not is_out_of_memory(error) or self.backend.shares_steps:
                    raise  # the error goes before anything else is tried: its traceback holds the activations
            self.job.model.zero_grad(set_to_none=True)
            give_back(self.backend.device)
            self._need_less_memory(layouts)

    def _need_less_memory(self, layouts: list[Layout]) -> None:
        """Halves the micro-batch; when each is one sample, recomputes more activations; else gives up with advice."""
        largest = max(layout.tokens for layout in layouts)
        longest = max(max(reaches(layout.segments)) for layout in layouts)
        smaller = max(longest, min(self.at.budget, largest) // 2)
        if smaller < min(self.at.budget, largest):
            self.at.budget = smaller
            self._tell("oom", micro_batch_tokens=smaller)
        elif self.job.model.training and (share := self._more_to_recompute()):
            self._recompute_activations(share)
            self._tell("oom", gradient_checkpointing=share)
        else:
            raise FitoutError(
                f"memory ran out on a single sample of {longest} tokens",
                harm="The last checkpoint is complete; nothing after it was kept.",
                hint="Lower data.max_length, take method: {kind: lora}, or a smaller base model.",
            )

    def _more_to_recompute(self) -> float | None:
        """The next share of the layers to recompute; None where the recipe says how many, or all are."""
        if self.job.settings.gradient_checkpointing != "auto":
            return None
        return next((share for share in RECOMPUTED if share > self.recomputing), None)

    def _recompute_activations(self, share: float) -> None:
        self.recomputing = share
        self.recomputed = recompute_activations(self.job.model, share)

    # numbers that are not finite

    def _culprits(self, index: int, loss: float) -> list[str]:
        """The samples of a step whose own loss or gradients are not finite; all when each alone has finite ones.

        Only the loss is looked at where gradients are scaled (fp16): there they overflow while the scale is sought.
        """
        if self.backend.shares_steps or (self.backend.scales_loss and math.isfinite(loss)):
            return self._origins(self.job.batches.rows(index))
        batches, found = self.job.batches, []
        rows = batches.rows(index)
        for group in dict.fromkeys(batches.part.groups[rows].tolist()):
            mine = rows[batches.part.groups[rows] == group]
            try:
                if not self._finite_alone(index, mine):
                    found.append(mine)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
        self.job.model.zero_grad(set_to_none=True)
        return self._origins(np.concatenate(found) if found else rows)

    def _finite_alone(self, index: int, rows: np.ndarray) -> bool:
        """Whether loss and gradients of some rows by themselves are finite."""
        batches, finite = self.job.batches, True
        layouts = layouts_of(batches.part, rows, self.at.budget, packing=batches.packing, share=batches.share)
        total = self.job.objective.units(layouts)
        torch.manual_seed(_key(self.job.settings.seed, index, self.backend.rank))
        for layout in layouts:
            self._between()
            if layout.supervised == 0:
                continue
            loss = self.backend.loss(self.job.model, self.job.objective, layout, total)
            finite = finite and math.isfinite(float(loss.detach()))
            if finite and not self.backend.scales_loss:
                self.backend.backward(loss)
        finite = finite and all(bool(p.grad.isfinite().all()) for p in self.parameters.values() if p.grad is not None)
        self.job.model.zero_grad(set_to_none=True)
        return finite

    def _give_up_on_numbers(self, index: int, culprits: list[str]) -> None:
        """Ends the run before a step whose numbers are not finite, with a checkpoint of what was before it."""
        self.save_now()
        in_a_row = self.finite.in_a_row
        raise FitoutError(
            f"{in_a_row} steps in a row had no finite gradients (the last at step {index + 1})"
            if in_a_row > 1
            else f"step {index + 1} has no finite gradients, and train.on_nonfinite is stop",
            harm="The weights were left as they were before the first of them; a checkpoint is saved.",
            hint="Look at its rows, lower train.lr or set train.precision: fp32; the last step's rows: "
            + ", ".join(culprits[:NAMED]),
        )

    def _origins(self, rows: np.ndarray) -> list[str]:
        part = self.job.batches.part
        return [str(part.origin(int(row))) for row in rows[:NAMED]]

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
        loss, told = self._validation_loss(part)
        at.validation.append([at.step, loss if math.isfinite(loss) else None])
        if at.step == 0:
            at.base_loss = loss if math.isfinite(loss) else None
        elif math.isfinite(loss) and (at.best_loss is None or loss < at.best_loss):
            at.best_loss, at.best_step, at.worse = loss, at.step, 0
            self._tell("evaluated", validation_loss=loss, best=True, **told)
            self.save()
            return
        else:
            at.worse += 1
            at.stopped_early = self._has_no_patience()
        self._tell("evaluated", validation_loss=loss, best=False, **told)

    def _has_no_patience(self) -> bool:
        return self.job.settings.patience is not None and self.at.worse >= self.job.settings.patience

    def _validation_loss(self, part: Part) -> tuple[float, dict[str, Any]]:
        """The loss over a part; and what the objective tells beside it, and, where rows have tasks, each task's own
        loss and its share of the whole."""
        groups = part.tasks or {"": np.arange(len(part))}
        sums: dict[str, tuple[float, float]] = {}
        noted: Counter[str] = Counter()
        training = self.job.model.training
        self.job.model.eval()  # while memory is looked for, too: activations are not recomputed here
        try:
            for name, rows in groups.items():
                loss, figures, units = self._in_memory(self._layouts_of(part, rows), self._mean_loss)
                sums[name] = (loss * units if units else 0.0, units)
                noted.update({key: value * units for key, value in figures.items()})
        finally:
            self.job.model.train(training)
        whole, units = (sum(values) for values in zip(*sums.values(), strict=True))
        told: dict[str, Any] = {"figures": {key: value / units for key, value in noted.items()}} if noted else {}
        if not part.tasks:
            return loss, told
        by_task = {
            name: {"loss": summed / own, "share": summed / whole if whole else 0.0}
            for name, (summed, own) in sums.items()
            if own
        }
        return (whole / units if units else float("nan")), told | {"by_task": by_task}

    def _mean_loss(self, layouts: list[Layout]) -> tuple[float, dict[str, float], float]:
        """The loss over the layouts of all ranks, what the objective tells beside it, and their units."""
        (units,) = self.backend.sum(self.job.objective.units(layouts))
        return *mean_loss(self.job.model, self.job.objective, layouts, self.backend, self._between), units

    def _evaluated(self) -> bool:
        """Whether the validation of this step has been done (always so where there is nothing to validate on)."""
        return not self.job.validation or any(step == self.at.step for step, _ in self.at.validation)

    # saving

    def save_due(self) -> bool:
        return self.at.step % self.job.settings.save_every == 0

    def save(self) -> None:
        if self.saved_step == self.at.step:
            return
        self.backend.alive()
        self._require_finite_weights()
        weights, moments = self._weights(), self.backend.moments(self.optimizer, self.parameters)
        if self.backend.main:
            state = {"identity": self.job.identity, "progress": asdict(self.at), "backend": self.backend.state()}
            self.saver.save(self.at.step, weights, moments, state, self.at.best_step)
        self.backend.bring_together(weights, moments)
        self.backend.barrier()
        self.saved_step = self.at.step

    def _require_finite_weights(self) -> None:
        """Steps whose gradients are not finite are skipped; what a step that was far too large leaves is found here."""
        own = (getattr(p, "to_local", lambda p=p: p)() for p in self.parameters.values())
        if self.backend.any(any(not bool(p.detach().isfinite().all()) for p in own)):
            raise FitoutError(
                f"the weights are no longer finite after step {self.at.step}",
                where=str(self.job.run.path),
                harm="A model of them would answer nothing; they are not saved, the checkpoint before is kept.",
                hint="Lower train.lr, or set train.clip; then train anew under another name or --out.",
            )

    def save_now(self) -> None:
        """Saves, and no rank goes on before all is written: what ends one of them may end the others."""
        self.save()
        self.saver.wait()
        self.backend.barrier()

    def finish(self) -> None:
        """The last checkpoint, then the weights the run ends with."""
        self.save_now()
        self.backend.disengage(self.job.model, self.parameters, frozen_too=not self.job.method.frozen_base)
        self.parameters = trainable(self.job.model)
        best, whole = self.at.best_step, self.backend.main or not self.backend.spreads
        if whole and self.job.settings.keep == "best" and best is not None and best != self.at.step:
            self._put_back(self.checkpoints.at(best).weights())
        self._tell("finished", best_step=self.at.best_step, stopped_early=self.at.stopped_early)

    # leaving

    def _between(self) -> None:
        """Called between micro-batches. One rank alone can leave there; several leave together, between steps."""
        if not self.backend.shares_steps:
            self.stop.check()

    def leave_when_asked(self) -> None:
        """Ends the run, on all ranks, when one of them was asked to stop."""
        if self.backend.any(self.stop.name is not None):
            self.leave()

    def leave(self) -> None:
        self.save_now()
        raise Stopped(
            f"stopped by {self.stop.name or 'another rank'} after step {self.at.step} of {self.job.total_steps}; "
            "a checkpoint is saved",
            hint="Go on with the same command (for `fitout train` add --resume).",
        )

    # telling

    def _log(self, **row: Any) -> None:
        for listener in self.listeners:
            listener.row(row)

    def _tell(self, event: str, **facts: Any) -> None:
        self._log(event=event, step=self.at.step, **facts)


def _changed_in_place() -> FitoutError:
    return FitoutError(
        "this model changes in place what one of its layers gives, which this method needs for its gradients",
        harm="They would be those of other numbers.",
        hint="Take method: {kind: lora}, which does not keep what its layers give.",
    )


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
