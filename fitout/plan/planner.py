"""Every method on a machine: peak memory by term, time, whether it fits and what to turn; the choice for `auto`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from ..errors import RequestError
from ..model.methods.cost import Cost
from ..model.shape import Shape
from ..train import FIRST_BUDGET, RECOMPUTED, TrainSettings
from .estimate import MB, Memory, Setup, exchange_seconds, memory, seconds
from .machine import Machine
from .work import MicroBatch, Work, WorkAt

LARGE = 10_000  # samples from which full fine-tuning learns more than LoRA does (Biderman et al., arXiv 2405.09673)
MARGIN = 0.85  # of the memory, that a method chosen for `auto` may be predicted to need
ORDER = ("full", "lora", "qlora")  # what `auto` tries, best first; full only from LARGE samples on


class Steps(Protocol):
    def step(self, shape: Shape, cost: Cost, step: tuple[MicroBatch, ...]) -> float:
        """Seconds of a step."""


class Rehearsed(Protocol):
    """What `rehearsal.Rehearsal` is to the planner."""

    def tempo(self, kind: str, cost: Cost, setup: Setup, budget: int) -> Steps | None:
        """How fast a method is on the machine at hand; None where it cannot be tried."""


@dataclass(frozen=True)
class Row:
    """One way to train: `change` holds the keys to set so that it fits (empty when it fits as the recipe says, or when
    nothing helps), `lightest` the memory with them (with all that was tried, when nothing helps)."""

    kind: str
    precision: str
    stage: int
    devices: int
    trained: int
    memory: Memory
    fits: bool
    change: dict[str, Any]
    lightest: Memory
    step_seconds: float
    epoch_seconds: float
    total_seconds: float
    rehearsed: bool = False  # the time was found by doing some steps, not by arithmetic

    @property
    def can_run(self) -> bool:
        return self.fits or bool(self.change)

    def as_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        plain["memory"] = {
            "peak_mb": round(self.memory.peak / MB),
            "moment": self.memory.moment,
            "terms_mb": {name: round(size / MB, 1) for name, size in self.memory.terms.items()},
        }
        plain["lightest"] = {"peak_mb": round(self.lightest.peak / MB), "moment": self.lightest.moment}
        for key in ("step_seconds", "epoch_seconds", "total_seconds"):
            plain[key] = float(f"{plain[key]:.4g}")
        return plain


@dataclass(frozen=True)
class Plan:
    """All rows; `chosen` is the recipe's own method as it would run."""

    machine: Machine
    shape: Shape
    work: Work
    rows: tuple[Row, ...]
    chosen: Row
    advice: tuple[str, ...]
    past: str | None

    def as_dict(self) -> dict[str, Any]:
        return {
            "machine": {
                "name": self.machine.name,
                "memory_mb": round(self.machine.memory / MB),
                "speed_measured": self.machine.measured,
            },
            "model": {
                "family": self.shape.family,
                "parameters": self.shape.parameters,
                "layers": self.shape.layers,
                "hidden": self.shape.hidden,
                "vocabulary": self.shape.vocab,
            },
            "work": {
                "samples": self.work.samples,
                "steps_per_epoch": round(self.work.steps_per_epoch),
                "total_steps": self.work.total_steps,
                "tokens_per_step": round(self.work.tokens_per_step),
                "largest_micro_batch": self.work.largest.tokens,
                "longest_sample": self.work.longest,
            },
            "rows": [row.as_dict() for row in self.rows],
            "chosen": self.chosen.as_dict(),
            "advice": list(self.advice),
            "past": self.past,
        }


def make_plan(
    shape: Shape,
    costs: dict[str, Cost],
    chosen: str,
    train: TrainSettings,
    precision: str,
    work_at: WorkAt,
    machine: Machine,
    *,
    devices: int = 1,
    past: str | None = None,
    rehearsal: Rehearsed | None = None,
) -> Plan:
    """`costs` by method kind; `chosen` and `precision` are what the recipe means on this machine."""
    setups = list(_setups(precision, train, machine, devices))
    rows = tuple(
        look(shape, costs[kind], kind, setup, train, work_at, machine, rehearsal) for kind in costs for setup in setups
    )
    [own] = [row for row in rows if (row.kind, row.precision, row.stage) == (chosen, precision, 0)]
    return Plan(
        machine=machine,
        shape=shape,
        work=work_at(first_budget(train, machine.kind), devices),
        rows=rows,
        chosen=own,
        advice=tuple(advice(shape, costs[chosen], own, rows, train, work_at, machine)),
        past=past,
    )


def _setups(precision: str, train: TrainSettings, machine: Machine, devices: int) -> Iterator[Setup]:
    low = "bf16" if machine.bf16 else "fp16"
    others = [kind for kind in ("fp32", low) if kind != precision and (machine.kind == "cuda" or kind != "fp16")]
    for kind in (precision, *others):
        for stage in range(4) if devices > 1 else (0,):
            yield setup_of(train, kind, machine, devices=devices, stage=stage)


def setup_of(train: TrainSettings, precision: str, machine: Machine, *, devices: int = 1, stage: int = 0) -> Setup:
    return Setup(
        precision=precision,
        device=machine.kind,
        optimizer=train.optimizer,
        recompute=train.recompute,
        devices=devices,
        stage=stage,
        resident=machine.resident,
    )


def first_budget(train: TrainSettings, device: str) -> int:
    return FIRST_BUDGET[device] if train.micro_batch_tokens == "auto" else train.micro_batch_tokens


def look(
    shape: Shape, cost: Cost, kind: str, setup: Setup, train: TrainSettings, work_at: WorkAt, machine: Machine,
    rehearsal: Rehearsed | None = None,
) -> Row:  # fmt: skip
    """One method in one setup: as the recipe says, and, where that does not fit, with what makes it fit."""
    work = work_at(first_budget(train, setup.device), setup.devices)
    asked = memory(shape, cost, setup, work)
    fits = asked.peak <= machine.memory
    change: dict[str, Any] = {}
    lightest, used, used_setup = asked, work, setup
    if not fits:
        for keys, smaller, lighter in _remedies(setup, train, work_at, work.longest):
            lightest, used, used_setup = memory(shape, cost, lighter, smaller), smaller, lighter
            if lightest.peak <= machine.memory:
                change = keys
                break
    budget = change.get("train.micro_batch_tokens", first_budget(train, setup.device))
    tempo = rehearsal.tempo(kind, cost, used_setup, budget) if rehearsal and (fits or change) else None
    step = _mean_step(shape, cost, used_setup, used, machine, tempo)
    return Row(
        kind=kind,
        precision=setup.precision,
        stage=setup.stage,
        devices=setup.devices,
        trained=cost.trained,
        memory=asked,
        fits=fits,
        change=change,
        lightest=lightest,
        step_seconds=step,
        epoch_seconds=step * work.steps_per_epoch,
        total_seconds=step * work.total_steps,
        rehearsed=tempo is not None,
    )


def _mean_step(shape: Shape, cost: Cost, setup: Setup, work: Work, machine: Machine, tempo: Steps | None) -> float:
    """Seconds of a step, on average over the run."""
    micro_batches = sum(len(step) for step in work.timed) / len(work.timed)
    exchange = exchange_seconds(shape, cost, setup, micro_batches, machine.link)
    if tempo is None:
        return exchange + seconds(shape, cost, setup, work, machine.speed)
    return exchange + sum(tempo.step(shape, cost, step) for step in work.timed) / len(work.timed)


def _remedies(
    setup: Setup, train: TrainSettings, work_at: WorkAt, longest: int
) -> Iterator[tuple[dict[str, Any], Work, Setup]]:
    """What the loop itself does when memory runs out, in its order: smaller micro-batches, then recomputing more and
    more layers."""
    budget = first_budget(train, setup.device)
    work = work_at(budget, setup.devices)
    while work.largest.tokens > longest:
        budget = max(longest, min(budget, work.largest.tokens) // 2)
        work = work_at(budget, setup.devices)
        yield {"train.micro_batch_tokens": budget}, work, setup
    smallest = {} if budget == first_budget(train, setup.device) else {"train.micro_batch_tokens": budget}
    for share in RECOMPUTED if not setup.recompute else ():
        keys = {"train.gradient_checkpointing": True if share == 1 else share, **smallest}
        yield keys, work, replace(setup, recompute=share)


TURN = {  # the largest term -> what makes it smaller
    "framework": "other programs hold the memory: free some",
    "weights": "the weights alone are large: a 4-bit base (method: {kind: qlora}), a smaller base model, or more "
    "devices with the parameters divided (ZeRO 3, FSDP)",
    "gradients": "gradients are as large as what is trained: train less (method: {kind: lora})",
    "optimizer": "the optimizer keeps two numbers for each one trained: train less (method: {kind: lora}), or an "
    "8-bit optimizer",
    "activations": "activations grow with the tokens of a micro-batch: lower train.micro_batch_tokens or "
    "data.max_length, or set train.gradient_checkpointing: true",
    "loss": "the head's logits and gradients grow with the vocabulary and the targets: lower train.micro_batch_tokens",
}


def advice(
    shape: Shape, cost: Cost, own: Row, rows: Sequence[Row], train: TrainSettings, work_at: WorkAt, machine: Machine
) -> Iterator[str]:
    """Lines on the recipe's own method: whether it fits; if not, the term to blame, the key to turn, what else fits."""
    need, have = own.memory.peak / MB, machine.memory / MB
    if own.fits:
        yield f"{own.kind} in {own.precision} needs {need:,.0f} of {have:,.0f} MB: it fits"
        return
    blamed = own.memory if own.change else own.lightest
    largest = blamed.largest
    size = blamed.terms[largest] / MB
    yield f"{own.kind} in {own.precision} needs {need:,.0f} MB, {have:,.0f} MB are there: it does not fit as it is"
    tried = "" if own.change else "with the smallest micro-batches and activations recomputed, "
    yield f"{tried}the largest term is {largest} with {size:,.0f} MB; {TURN[largest]}"
    if own.change:
        yield f"it fits ({own.lightest.peak / MB:,.0f} MB) with {told(own.change)}"
    others = [row for row in rows if row.can_run and row.kind != own.kind and row.stage == 0]
    if others:
        best = min(others, key=lambda row: (bool(row.change), row.total_seconds))
        with_what = f" with {told(best.change)}" if best.change else ""
        yield f"method: {{kind: {best.kind}}} in {best.precision} fits{with_what}"
    for count in (2, 4, 8, 16, 32, 64) if not own.change and own.devices == 1 else ():
        divided = setup_of(train, own.precision, machine, devices=count, stage=3)
        if look(shape, cost, own.kind, divided, train, work_at, machine).can_run:
            yield f"over {count} such devices it fits with everything divided (ZeRO 3, FSDP)"
            return


def told(change: dict[str, Any]) -> str:
    return " and ".join(f"{key}: {str(value).lower()}" for key, value in change.items())


def choose(plan: Plan, precision: str) -> tuple[str, list[str]]:
    """The method for `auto`, and the reasons line by line. Raises RequestError when nothing fits."""
    reasons = []
    rows = {row.kind: row for row in plan.rows if row.stage == 0 and row.precision == precision}
    most = MARGIN * plan.machine.memory
    for kind in (kind for kind in ORDER if kind in rows):
        row, need = rows[kind], rows[kind].memory.peak / MB
        samples = plan.work.samples
        if kind == "full" and samples < LARGE:
            reasons.append(
                f"not full: with {samples:,} samples (under {LARGE:,}) an adapter learns as much, forgets less"
            )
        elif row.memory.peak > most and not (row.change and row.lightest.peak <= most):
            reasons.append(f"not {kind}: it needs {need:,.0f} MB of {plan.machine.memory / MB:,.0f}")
        else:
            peak = row.lightest.peak / MB
            with_what = f" with {told(row.change)}" if row.change else ""
            reasons.append(f"{kind}: needs {peak:,.0f} MB of {plan.machine.memory / MB:,.0f}{with_what}")
            return kind, reasons
    raise RequestError(
        "method: auto finds no method that fits: " + "; ".join(reasons),
        where=plan.machine.name,
        hint="Take a smaller base model, lower data.max_length, or name a method if you know better.",
    )
