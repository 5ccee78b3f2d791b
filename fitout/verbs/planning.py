"""What a run will take in memory and time, told before it; and how far that was off, after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import RequestError
from ..plan import duration
from ..rundir import RunDir
from .preparing import prepare_data
from .working import Screen, chat_of, recipe_of, run_directory

if TYPE_CHECKING:
    from ..data.batches import Batches
    from ..plan.planner import Plan
    from ..plan.products import Products
    from ..train.loop import Progress


def plan(
    recipe: Recipe,
    *,
    device: str | None = None,
    devices: int = 1,
    length: int | None = None,
    samples: int | None = None,
    out: str | Path | None = None,
    screen: Screen | None = None,
) -> Plan:
    """Memory and time of every method, before anything is loaded: on this machine, or on the named card.

    Lengths come from the run's prepared data when they are there, else from tokenising the sources (the first rows of
    large ones), or with `length` from a given average. Raises RequestError for a device that is not known.
    """
    from ..model.precision import best_device, faster_products

    with faster_products(best_device()):
        return _plan(recipe, device, devices, length, samples, run_directory(recipe, out), screen or Screen())


def _plan(
    recipe: Recipe, device: str | None, devices: int, length: int | None, samples: int | None, directory: RunDir,
    screen: Screen,
) -> Plan:  # fmt: skip
    from dataclasses import replace

    from ..model.methods import METHODS, LoraSettings
    from ..model.precision import best_device, decide, use_threads
    from ..plan.history import past_error
    from ..plan.machine import machine
    from ..plan.planner import choose, make_plan

    import_training()
    shape = _shape(recipe)
    use_threads(shape.hidden, best_device())
    on = machine(device)
    asked = recipe.train.precision
    if asked == "auto" and on.kind == "cuda":
        asked = "bf16" if on.bf16 else "fp16"
    kind = decide(asked, best_device(), width=shape.hidden).kind if on.kind == "cpu" else asked
    named = recipe.method if recipe.method.kind != "auto" else LoraSettings()
    settings: dict[str, Any] = {one.model_fields["kind"].default: one() for one in METHODS} | {named.kind: named}
    costs = {name: one.cost(shape) for name, one in settings.items()}
    past = past_error(on.name) if on.measured else None
    with _plan_data(recipe, directory, length, samples, screen) as (batches, share):
        work_at = _work_at(recipe, batches, share)
        rehearsal = _rehearsal(recipe, shape, settings, work_at, on) if on.measured else None
        more: Any = {"devices": devices, "past": past, "rehearsal": rehearsal}
        found = make_plan(shape, costs, named.kind, recipe.train, kind, work_at, on, **more)
        if recipe.method.kind != "auto":
            return found
        try:
            taken, reasons = choose(found, kind)
        except RequestError as nothing:  # `fitout plan` still shows how far off each method is
            return replace(found, advice=(nothing.message, *found.advice))
        found = make_plan(shape, costs, taken, recipe.train, kind, work_at, on, **more)
    return replace(found, advice=(f"method: auto takes {taken}", *reasons, *found.advice))


def with_method(recipe: Recipe, directory: RunDir, screen: Screen) -> Recipe:
    """`method: auto` replaced by what the planner chooses, or chose when this run began."""
    import os

    if recipe.method.kind != "auto":
        return recipe
    if directory.recipe.exists() and (begun := recipe_of(directory)).method.kind != "auto":
        return recipe.model_copy(update={"method": begun.method})
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RequestError(
            "method: auto is for one process",
            where="method",
            harm="Ranks could choose differently.",
            hint="See what fits with `fitout plan --devices N`, and name the method.",
        )
    from ..model.methods import METHODS
    from ..plan.planner import choose

    found = plan(recipe, out=directory.path, screen=screen)
    kind, reasons = choose(found, found.chosen.precision)
    screen.say(f"method: auto takes {kind}")
    for reason in reasons:
        screen.say(f"  {reason}")
    [settings] = [one for one in METHODS if one.model_fields["kind"].default == kind]
    return recipe.model_copy(update={"method": settings()})


def import_training() -> None:
    """What a run imports, so that what the process holds now is what it will hold then."""
    from .working import import_libraries

    import_libraries()
    from transformers import AutoModelForCausalLM  # noqa: F401

    from ..model.fuse import fused  # noqa: F401
    from ..train.loop import fit  # noqa: F401


def _shape(recipe: Recipe) -> Any:
    from ..model.load import resolve
    from ..model.shape import read_shape

    return read_shape(resolve(recipe.model.base).base, revision=recipe.model.revision)


def shape_and_cost(recipe: Recipe, grown: bool) -> tuple[Any, Any]:
    """The model's shape and what its method costs, with the embeddings where tokens were added to them. Raises
    ModelError for a model that the planner does not know."""
    from ..model.methods.cost import with_embeddings

    shape = _shape(recipe)
    cost = recipe.method.cost(shape)  # type: ignore[union-attr]
    return shape, with_embeddings(cost, shape) if grown else cost


def _rehearsal(
    recipe: Recipe, shape: Any, settings: dict[str, Any], work_at: Any, machine: Any, *, grown: bool = False
) -> Any:
    """Steps tried on this machine; None for a model whose own code would have to run."""
    from ..model.load import load_config, resolve
    from ..objectives import create
    from ..plan.rehearsal import Rehearsal

    if recipe.model.trust_remote_code:
        return None
    config = load_config(resolve(recipe.model.base).base, revision=recipe.model.revision)
    return Rehearsal(
        shape, config, settings, recipe.train, create(recipe.objective), work_at, machine, grown=grown
    )  # fmt: skip


def _work_at(recipe: Recipe, batches: Any, share: float = 1.0) -> Callable[[int, int], Any]:
    """The work of a run for a micro-batch size and a number of ranks; each is laid out once."""
    from functools import lru_cache

    from ..plan.work import work_of

    @lru_cache
    def at(budget: int, ranks: int) -> Any:
        train = recipe.train
        return work_of(batches, budget=budget, epochs=train.epochs, max_steps=train.max_steps, ranks=ranks, share=share)

    return at


JUDGED_STEPS = 20  # that say whether sharing prefixes pays
PLANNED_ROWS = 2000  # of a source that are tokenised for a plan when nothing is prepared


@contextmanager
def _plan_data(
    recipe: Recipe, directory: RunDir, length: int | None, samples: int | None, screen: Screen
) -> Iterator[tuple[Any, float]]:
    """Batches like the run's, and the share of its samples that they hold."""
    import tempfile

    from ..data.store import open_prepared
    from ..plan.work import AverageLength

    if length is not None:
        pairs = recipe.objective.wants == "preference pair"
        part = AverageLength(min(length, recipe.data.max_length), recipe.data.max_length, pairs=pairs)
        screen.say(f"lengths are not known: {length} tokens a sample on average are assumed")
        yield batches_of(recipe, part), (part.groups[-1] + 1) / samples if samples else 1.0
        return
    ready = open_prepared(directory.data)
    if ready is not None:
        yield batches_of(recipe, ready.part("train")), 1.0
        return
    quick, share = _first_rows(recipe)
    with tempfile.TemporaryDirectory(prefix="fitout-plan-") as folder:
        prepared, _ = prepare_data(quick, RunDir(Path(folder)), chat_of(recipe), Screen())
        if share < 1:
            screen.say(f"lengths are of the first {PLANNED_ROWS:,} rows of each source ({100 * share:.0f} % of all)")
        yield batches_of(recipe, prepared.part("train")), share


def _first_rows(recipe: Recipe) -> tuple[Recipe, float]:
    """The recipe with each source limited to PLANNED_ROWS, and the share of all rows that these are."""
    from ..data import HUB_ID
    from ..data.sources import read

    sources, taken, there = [], 0, 0
    for source in recipe.data.sources:
        limited = source.model_copy(update={"limit": min(source.limit or PLANNED_ROWS, PLANNED_ROWS)})
        rows = PLANNED_ROWS if HUB_ID.fullmatch(source.path) else sum(1 for _ in read(source, Path()))
        sources.append(limited)
        there += rows
        taken += min(rows, PLANNED_ROWS)
    data = recipe.data.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"data": data}), taken / there if there else 1.0


def batches_of(recipe: Recipe, part: Any) -> Batches:
    """The batches of a run over a part of its data; prefixes are shared where that saves."""
    from ..data.batches import Batches

    train, packing = recipe.train, recipe.data.packing
    batches = Batches(
        part, batch_size=train.batch_size, batch_tokens=train.batch_tokens, seed=train.seed, packing=packing,
        share=packing,
    )  # fmt: skip
    batches.share = packing and _sharing_pays(*_saving(recipe, batches))
    return batches


def total_steps(recipe: Recipe, batches: Batches) -> int:
    return recipe.train.max_steps or batches.steps_in(recipe.train.epochs)


def _saving(recipe: Recipe, batches: Batches) -> tuple[int, int]:
    """(tokens apart, tokens computed) of the first steps, in the micro-batches that a run begins with here."""
    from ..model.precision import best_device
    from ..train import FIRST_BUDGET

    asked = recipe.train.micro_batch_tokens
    budget = FIRST_BUDGET[best_device().type] if asked == "auto" else asked
    return batches.saving(min(total_steps(recipe, batches), JUDGED_STEPS), budget=budget)


def _sharing_pays(apart: int, computed: int) -> bool:
    return computed < 0.95 * apart


LONG = 600  # nominal seconds of a training from which on it is worth some seconds to measure this machine first
NOMINAL = {"cpu": 1e11, "cuda": 5e13}  # FLOP/s


def _nominal_seconds(shape: Any, work: Any, device: str) -> float:
    return 6 * shape.parameters * work.tokens_per_step * work.total_steps / NOMINAL[device]


def forecast_run(
    recipe: Recipe, batches: Batches, precision: str, grown: bool, ranks: int, screen: Screen, *, stage: int = 0
) -> Any:
    """What this training will need, told before it begins. A model that the planner does not know has no forecast; a
    short training is given its time only where this machine's speed is remembered: to measure it would delay the first
    step."""
    from dataclasses import replace

    from ..errors import ModelError
    from ..plan.estimate import MB
    from ..plan.machine import NotMeasured, Probe, Unmeasured, here, resident
    from ..plan.planner import advice, first_budget, look, setup_of

    try:
        shape, cost = shape_and_cost(recipe, grown)
    except ModelError as error:
        screen.say(f"no plan: {error.message}")
        return None
    import_training()
    machine = here()
    work_at = _work_at(recipe, batches)
    settings: dict[str, Any] = {recipe.method.kind: recipe.method}

    def ask(on: Any, rehearsal: Any = None) -> Any:
        setup = setup_of(recipe.train, precision, on, devices=ranks, stage=stage)
        loaded = rehearsal is not None and recipe.method.kind in rehearsal.tried
        less = replace(cost, libraries=0) if loaded else cost  # they are in `resident` already
        return look(shape, less, recipe.method.kind, setup, recipe.train, work_at, on, rehearsal)

    long = _nominal_seconds(shape, work_at(first_budget(recipe.train, machine.kind), ranks), machine.kind) > LONG
    measured = replace(machine, speed=Probe(machine.kind, measures=long))
    try:
        rehearsal = _rehearsal(recipe, shape, settings, work_at, measured, grown=grown)
        ask(measured, rehearsal)
        if machine.resident:
            machine = replace(machine, resident=resident())  # with what the rehearsal leaves in this process
        row = ask(replace(machine, speed=measured.speed), rehearsal)
        timed = True
    except NotMeasured:
        row = ask(replace(machine, speed=Unmeasured()))
        timed = False
    fixed = row.memory.terms["framework"] + row.memory.terms["weights"]
    if fixed > machine.memory:
        raise RequestError(
            f"the weights alone need {fixed / MB:,.0f} MB, and {machine.memory / MB:,.0f} MB are there",
            where=recipe.model.base,
            harm="The process would be killed while loading.",
            hint="Take a smaller base model or a 4-bit base; `fitout plan` shows what fits.",
        )
    peak = row.memory.peak if machine.kind == "cpu" else row.memory.allocated
    time = f", {duration(row.step_seconds)} a step, {duration(row.total_seconds)} in all" if timed else ""
    largest = row.memory.largest
    screen.say(f"plan: {peak / MB:,.0f} MB at the peak ({largest} {row.memory.terms[largest] / MB:,.0f}){time}")
    if not row.fits:
        for line in advice(shape, cost, row, [], recipe.train, work_at, machine):
            screen.say(f"warning: {line}")
    return {
        "machine": machine.name,
        "method": recipe.method.kind,
        "precision": precision,
        "parameters": shape.parameters,
        "resident_mb": round(machine.resident / MB),
        "predicted": {
            "peak_mb": round(peak / MB),
            "step_seconds": float(f"{row.step_seconds:.4g}") if timed else None,
            "total_seconds": float(f"{row.total_seconds:.4g}") if timed else None,
            "rehearsed": row.rehearsed,
            "moment": row.memory.moment,
            "terms_mb": {name: round(size / MB) for name, size in row.memory.terms.items()},
        },
    }


PACED = 4  # steps that say what a step takes


class Pace:
    """Tells people once what a step takes, by a few of them after the first, which warms up: for a training that was
    given no time before it began."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._taken: list[float] = []  # seconds a step

    def start(self, info: dict[str, Any]) -> None:
        self._total = info["total_steps"]

    def row(self, row: dict[str, Any]) -> None:
        if "event" in row or len(self._taken) == PACED:
            return
        self._taken.append(row["tokens"] / row["tokens_per_second"] if row["tokens_per_second"] else 0.0)
        left = self._total - row["step"]
        if len(self._taken) == PACED and left > 0:
            each = sum(self._taken[1:]) / (PACED - 1)
            self.say(
                f"a step takes {duration(each)}: {duration(each * left)} for the other {left:,}, without validation"
            )

    def close(self) -> None:
        pass


def products_of(recipe: Recipe, precision: str, grown: bool, device: Any) -> Products | None:
    """What this training multiplies, countable; None for a model whose shape is not known."""
    from ..errors import ModelError
    from ..plan.machine import Probe
    from ..plan.planner import first_budget
    from ..plan.products import Products

    try:
        shape, cost = shape_and_cost(recipe, grown)
    except ModelError:
        return None
    return Products(shape, cost, precision, Probe(device.type), first_budget(recipe.train, device.type))


def told_speed(progress: Progress, products: Products | None, ranks: int) -> tuple[dict[str, Any], str]:
    """What the counters of a training say about its speed: for run.json, and as one line for people."""
    seconds = max(progress.seconds, 1e-9)
    figures: dict[str, Any] = {
        "waited_for_data": float(f"{progress.waited / seconds:.3g}"),
        "padding": float(f"{progress.padding / max(1, progress.tokens + progress.padding):.3g}"),
    }
    if products and progress.tokens:
        did = (progress.tokens / ranks, progress.supervised / ranks, progress.pairs / ranks)
        again = progress.recomputed / progress.tokens
        counts = products.count(*did, again).values()
        flops, least = sum(one.flops for one in counts), sum(one.seconds for one in counts)
        figures |= {
            "flops_per_second": float(f"{flops / seconds:.4g}"),
            "matmul_peak": float(f"{flops / least:.4g}"),
            "recomputed": float(f"{products.recomputed(*did, again):.3g}"),
        }
        each = " a rank" if ranks > 1 else ""
        line = f"{flops / seconds / 1e9:,.0f} GFLOP/s{each}, {100 * least / seconds:.0f} % of the measured matmul peak"
    else:
        line = "share of the matmul peak not known for this model"
    return figures, f"speed: {line}; {100 * figures['waited_for_data']:.1f} % of the time waiting for data"


def told_against_plan(directory: RunDir, forecast: Any, before_mb: int, device: Any, whole: bool) -> str:
    """Predicted and measured side by side into run.json and, for a whole run, into the history. One line for people."""
    from ..files import read_jsonl
    from ..plan.history import remember
    from ..train.loop import memory_mb

    steps = [row for row in read_jsonl(directory.log) if "event" not in row]
    steps = steps[1:] if len(steps) > 2 else steps  # the first warms up
    taken = [row["tokens"] / row["tokens_per_second"] for row in steps if row["tokens_per_second"]]
    peak = memory_mb(device)
    measured = {
        "peak_mb": peak if peak > before_mb else None,  # else something before the training took more
        "step_seconds": float(f"{sum(taken) / len(taken):.4g}") if taken else None,
    }
    predicted = forecast["predicted"]
    directory.update_status(plan={**forecast, "measured": measured})
    if whole:
        remember({**forecast, "measured": measured, "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    parts = [
        f"{what} {predicted[key]:,g} {unit} predicted, {measured[key]:,g} measured "
        f"({100 * (predicted[key] / measured[key] - 1):+.0f} %)"
        for what, key, unit in (("peak memory", "peak_mb", "MB"), ("a step", "step_seconds", "s"))
        if measured[key] and predicted[key]
    ]
    return "plan: " + ("; ".join(parts) or "nothing that was predicted could be measured")


def tell_sharing(recipe: Recipe, batches: Batches, total: int, screen: Screen) -> None:
    """Shared prefixes are used where they save over 5 %, judged on the first steps."""
    if batches.share:
        apart, computed = _saving(recipe, batches)
        screen.say(f"shared prefixes: {apart:,} -> {computed:,} tokens in the first {min(total, JUDGED_STEPS)} steps")
