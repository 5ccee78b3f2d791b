"""One short function per verb; the only holder of the whole recipe.

run = prepare -> train -> evaluate -> merge, going on where it stopped
"""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from . import __version__
from .config import Recipe, build
from .errors import FitoutError, RequestError, RunExistsError, Stopped
from .files import read_json, remove_leftovers, staged_folder, write_text
from .model import EMBEDDED
from .rundir import RunDir

if TYPE_CHECKING:
    from .chat.render import Chat
    from .data.store import Prepared
    from .engine import Engine
    from .evaluate.suite import EvaluationResult
    from .export.bundle import Exported
    from .plan.planner import Plan
    from .train.listeners import Listener
    from .train.loop import Progress

FREE_TO_CHANGE = {  # keys that do not change what has been trained so far; a run may go on with others
    "train": ("epochs", "max_steps", "save_every", "evaluate_every", "keep", "keep_last", "patience", "listeners",
              "micro_batch_tokens", "gradient_checkpointing"),
    "evaluate": None,
    "export": None,
}  # fmt: skip


@dataclass
class Screen:
    """How a verb tells people what it is doing; the command line draws it, a script may leave it silent."""

    say: Callable[[str], None] = lambda line: None
    listeners: Callable[[], Sequence[Listener]] = lambda: ()
    data_progress: Callable[[str, int], None] = lambda stage, done: None
    evaluation_progress: Callable[[str, int, int], None] = lambda what, done, total: None


def run_directory(recipe: Recipe, out: str | Path | None) -> RunDir:
    return RunDir(Path(out) if out else Path("runs") / recipe.name)


# verbs


def run(recipe: Recipe, *, out: str | Path | None = None, screen: Screen | None = None) -> RunDir:
    """prepare, train, evaluate, merge; a run that was stopped or killed goes on where it was."""
    screen = screen or Screen()
    directory = run_directory(recipe, out)
    _check_retention(recipe)
    recipe = _with_method(recipe, directory, screen)
    with _working(directory, recipe, screen):
        _train(recipe, directory, screen, resume=True)
        if _main_process():
            _evaluate(recipe, directory, screen)
            if recipe.export.merge:
                _merge(recipe, directory, screen)
            directory.update_status(status="done")
    return directory


def train(
    recipe: Recipe, *, out: str | Path | None = None, resume: bool = False, screen: Screen | None = None
) -> RunDir:
    """One training run. A run directory that is there is refused without `resume`."""
    directory = run_directory(recipe, out)
    if directory.exists() and not resume and _main_process():  # the other ranks may come when it is made
        raise RunExistsError(
            "this run exists already",
            where=str(directory.path),
            harm="Training into it would mix two runs.",
            hint="Go on with --resume, or choose another name or --out.",
        )
    screen = screen or Screen()
    recipe = _with_method(recipe, directory, screen)
    with _working(directory, recipe, screen):
        _train(recipe, directory, screen, resume=resume)
    return directory


def prepare(recipe: Recipe, *, out: str | Path | None = None, screen: Screen | None = None) -> RunDir:
    """The data stages alone: report, quarantine, prepared parts."""
    directory = run_directory(recipe, out)
    screen = screen or Screen()
    with _working(directory, recipe, screen):
        _prepare(recipe, directory, _open_chat(recipe), screen)
    return directory


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
    from .model.methods import METHODS
    from .model.precision import best_device, decide
    from .plan.history import past_error
    from .plan.machine import machine
    from .plan.planner import make_plan

    screen = screen or Screen()
    on = machine(device)
    shape = _shape(recipe)
    asked = recipe.train.precision
    if asked == "auto" and on.kind == "cuda":
        asked = "bf16" if on.bf16 else "fp16"
    kind = decide(asked, best_device(), width=shape.hidden).kind if on.kind == "cpu" else asked
    chosen = recipe.method if recipe.method.kind != "auto" else METHODS[-1]()
    settings = {one.model_fields["kind"].default: one() for one in METHODS} | {chosen.kind: chosen}
    with _plan_data(recipe, run_directory(recipe, out), length, samples, screen) as (batches, share):
        found = make_plan(
            shape,
            {name: one.cost(shape) for name, one in settings.items()},
            chosen.kind,
            recipe.train,
            kind,
            _work_at(recipe, batches, share),
            on,
            devices=devices,
            past=past_error(on.name) if on.measured else None,
        )
    return found


@dataclass(frozen=True)
class Xray:
    """Prepared training rows and what is needed to show them."""

    chat: Chat
    part: Any
    report: dict[str, Any]


def xray(recipe: Recipe, *, out: str | Path | None = None, screen: Screen | None = None) -> Xray:
    """The training rows as they will be trained; prepares them first where that has not been done."""
    directory = run_directory(recipe, out)
    screen = screen or Screen()
    with _working(directory, recipe, screen):
        chat = _open_chat(recipe)
        prepared, report = _prepare(recipe, directory, chat, screen)
    return Xray(chat, prepared.part("train"), report)


def evaluate(directory: RunDir, *, changes: Recipe | None = None, screen: Screen | None = None) -> EvaluationResult:
    """Base against tuned on the run's test part, and what was kept."""
    recipe = changes or recipe_of(directory)
    screen = screen or Screen()
    with _working(directory, recipe, screen):
        return _evaluate(recipe, directory, screen, again=True)


def merge(directory: RunDir, *, screen: Screen | None = None) -> Path:
    """The adapter folded into the base, in merged/; refused when the logits change."""
    recipe = recipe_of(directory)
    screen = screen or Screen()
    reason = _unmergeable(recipe)
    if reason:
        raise RequestError(
            f"what {recipe.method.kind} trained cannot be merged: {reason}",
            where=str(directory.path),
            harm="A plain model folder would be another model.",
            hint=f"Use base and adapter: fitout chat {directory.path}, fitout serve {directory.path}.",
        )
    with _working(directory, recipe, screen):
        return _merge(recipe, directory, screen, again=True)


def compare(
    recipe: Recipe,
    methods: Sequence[str] = (),
    *,
    seeds: int = 3,
    budget: str | None = None,
    lrs: Sequence[str] = (),
    out: str | Path | None = None,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """The same budget for each method, with a learning rate chosen for each; a ranking of what was shown.

    `methods` are kinds (all of them when none is named), `budget` is as in `fitout compare --budget` (the recipe's own
    length when None), `lrs` as in `--lrs`. Returns what compare.json holds; the page is beside it. Called again, it
    goes on where it stopped.
    """
    from .evaluate.compare_page import write_comparison
    from .trials import Trials, parse_budget, parse_rates

    screen = screen or Screen()
    kinds = _kinds(methods)
    rates = parse_rates(lrs, kinds)
    allowed = parse_budget(budget) if budget else None
    _require_one_process()
    _check_retention(recipe)
    common = _common_recipe(recipe)
    entries = [_entry(recipe, kind, rates.get(kind, rates.get("")), screen) for kind in kinds]
    trials = Trials(
        Path(out) if out else Path("runs") / f"{recipe.name}-compare",
        lambda trial: _trial_recipe(common, trial, next(e.settings for e in entries if e.kind == trial.method)),
        screen.say,
        screen.evaluation_progress,
    )
    with trials.owned({"recipe": common.model_dump(mode="json"), "budget": budget, "learning rates": rates}):
        trials.prepare(common.to_yaml())
        _require_held_out(trials.prepared, sweeps=any(len(entry.rates or ()) != 1 for entry in entries))
        steps = _steps(recipe, trials.prepared, allowed, screen)
        minutes = allowed.amount if allowed and allowed.kind == "minutes" else 0.0
        seeded = list(range(recipe.train.seed, recipe.train.seed + seeds))
        raced = {entry.kind: trials.race(entry, seeded, steps, minutes) for entry in entries}
        result = {
            **_comparison(recipe, trials, raced, seeded),
            "budget": str(allowed or f"{steps:,} steps"),
            "command": _again(trials, kinds, seeds, budget, lrs),
        }
        return write_comparison(result, trials.page, trials.result)


def combine(
    adapters: Sequence[str | Path],
    to: Path,
    *,
    how: str = "linear",
    weights: Sequence[float] = (),
    density: float = 0.5,
    screen: Screen | None = None,
) -> Path:
    """Several adapters of one base as one adapter in `to`/adapter, and merged into the base in `to`/merged: both, or
    nothing when the merge changes the logits."""
    from .export import HOWS
    from .export.bundle import require_free
    from .export.combine import combine as join
    from .export.merge import merge_adapter

    if how not in HOWS:
        raise RequestError(f"{how!r} is no way to combine adapters", where="--how", hint=f"Give {', '.join(HOWS)}.")
    screen = screen or Screen()
    require_free(to)
    with staged_folder(to) as folder:
        facts = join(adapters, folder / "adapter", how=how, weights=weights, density=density)
        config = read_json(folder / "adapter" / "adapter_config.json")
        base = config["base_model_name_or_path"]
        _write_card(folder / "adapter", to.name, base, {"Combined": facts})
        difference = merge_adapter(
            base,
            folder / "adapter",
            folder / "merged",
            name=to.name,
            facts={"Combined": facts},
            revision=config.get("revision"),
        )
    screen.say(f"combined by {facts['combined by']}, weights {facts['weights']}: {to / 'adapter'}")
    screen.say(f"merged: largest difference of logits on probes {difference:.2g} ({to / 'merged'})")
    return to


def export(
    what: str | Path,
    *,
    engine: str = "transformers",
    to: Path,
    unmerged: bool = False,
    stored_as: str | None = None,
    trust_remote_code: bool = False,
    screen: Screen | None = None,
) -> Exported:
    """A run, adapter or model folder in the form an engine loads, compared with what was trained after writing.

    Refused before anything is written when the engine cannot load it (RequestError), and without a trace when what was
    written differs (CheckError).
    """
    from .export import ENGINES, STORED_AS, engines
    from .export.bundle import Wanted, export_merged, export_unmerged, export_with_code, merged_beside, require_free

    if engine not in ENGINES or stored_as not in (None, *STORED_AS):
        raise RequestError(
            f"{stored_as if engine in ENGINES else engine!r} is not known",
            hint=f"--for {', '.join(ENGINES)}; --stored-as {', '.join(STORED_AS)}.",
        )
    if stored_as and engine not in ("ollama", "llamacpp"):
        raise RequestError(
            "--stored-as is for GGUF (--for ollama, --for llamacpp)",
            hint="A model folder keeps the numbers that the base is stored in.",
        )
    screen = screen or Screen()
    require_free(to)
    parts = engines.look(what, trust_remote_code=trust_remote_code)
    directory = RunDir(Path(what))
    recipe = recipe_of(directory) if directory.exists() else None
    texts = _own_texts(directory)
    engines.refuse(engines.obstacles(engine, parts, unmerged=unmerged, texts=texts), engine, parts)
    for note in engines.notes(parts, unmerged=unmerged):
        screen.say(note)
    name = recipe.name if recipe else to.name
    into = recipe.export.merge_into if recipe else "dequantised"
    wanted = Wanted(engine, to, name, stored_as, _facts(directory, recipe), texts, into)
    if unmerged:
        return export_unmerged(parts, wanted)
    if engines.carries_code(engine, parts):
        return export_with_code(parts, wanted)
    if recipe is not None and parts.adapter is not None:
        with _working(directory, recipe, screen):
            return export_merged(parts, _merge(recipe, directory, screen), wanted)
    if parts.adapter is not None:
        with merged_beside(parts, to) as plain:
            return export_merged(parts, plain, wanted)
    return export_merged(parts, _local(parts.base), wanted)


def can_load(what: str | Path, *, trust_remote_code: bool = False) -> dict[str, list[str]]:
    """For every engine, and for vLLM with the adapter apart, why it cannot load this: no reasons where it can."""
    from .export import ENGINES, engines

    parts = engines.look(what, trust_remote_code=trust_remote_code)
    texts = _own_texts(RunDir(Path(what)))
    found = {}
    for engine in ENGINES:
        for unmerged in (False, True) if engine == "vllm" and parts.adapter else (False,):
            reasons = engines.obstacles(engine, parts, unmerged=unmerged, texts=texts)
            found[engine + " --unmerged" * unmerged] = [f"{one.why} ({one.remedy})" for one in reasons]
    return found


def open_engine(what: str | Path, *, adapter: str | None = None, precision: str = "auto") -> Engine:
    """A model, a run or `embedded:shell`, ready to talk."""
    _import_libraries()
    from .engine import Engine

    return Engine.open(what, adapter=adapter, precision=precision)


def recipe_of(directory: RunDir) -> Recipe:
    """The resolved recipe of a run."""
    if not directory.recipe.exists():
        raise RequestError(
            "this is not a run directory (it has no recipe.yaml)",
            where=str(directory.path),
            hint="Give the folder that `fitout run` or `fitout train` made, runs/NAME.",
        )
    return build(yaml.safe_load(directory.recipe.read_text(encoding="utf-8")), where=str(directory.recipe))


# a run directory at work


@contextmanager
def _working(directory: RunDir, recipe: Recipe, screen: Screen) -> Iterator[None]:
    """Owns the directory, records what is asked and how it ended."""
    _import_libraries()
    if not _main_process():  # ranks other than the first read what the first one writes
        yield
        return
    with directory.owned():
        _agree(directory, recipe)
        left = remove_leftovers(directory.path) + (
            remove_leftovers(directory.checkpoints) if directory.checkpoints.exists() else []
        )
        if left:
            screen.say(f"removed what a killed process left half-written: {', '.join(left)}")
        write_text(directory.recipe, recipe.to_yaml())
        directory.update_status(status="running", versions=_versions(), seed=recipe.train.seed)
        try:
            yield
        except BaseException as error:
            ended = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            directory.update_status(status=ended, error=str(error) if isinstance(error, FitoutError) else repr(error))
            raise
        status = directory.read_status()
        if status["status"] == "running":
            directory.update_status(status=status.get("reached", "prepared"), error=None)


def _import_libraries() -> None:
    """torch and transformers, with the garbage collector paused: a quarter of their import goes into looking through
    objects that all stay (measured 2.7 -> 2.1 s). What they made is then left out of later collections."""
    if "transformers.modeling_utils" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
        from transformers import AutoTokenizer, PreTrainedModel  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def _agree(directory: RunDir, recipe: Recipe) -> None:
    """A run that has begun training may only go on with a recipe that means the same training."""
    if not directory.recipe.exists() or not list(directory.checkpoints.glob("step-*")):
        return
    before, now = _comparable(recipe_of(directory)), _comparable(recipe)
    differs = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differs:
        shown = "; ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in differs[:5])
        raise RunExistsError(
            f"this run was made with another recipe ({shown})",
            where=str(directory.path),
            harm="Going on would mix two trainings.",
            hint="Undo the change, or choose another name or --out.",
        )


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as flat keys, without those that may change while a run goes on."""
    flat = {}
    for section, values in recipe.model_dump(mode="json").items():
        free = FREE_TO_CHANGE.get(section, ())
        if free is None or not isinstance(values, dict):
            continue
        flat.update({f"{section}.{key}": value for key, value in values.items() if key not in free})
    return flat


def _main_process() -> bool:
    import os

    return int(os.environ.get("RANK", 0)) == 0


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {"fitout": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


# the plan


def _with_method(recipe: Recipe, directory: RunDir, screen: Screen) -> Recipe:
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
    from .model.methods import METHODS
    from .plan.planner import choose

    found = plan(recipe, out=directory.path, screen=screen)
    kind, reasons = choose(found, found.chosen.precision)
    screen.say(f"method: auto takes {kind}")
    for reason in reasons:
        screen.say(f"  {reason}")
    [settings] = [one for one in METHODS if one.model_fields["kind"].default == kind]
    return recipe.model_copy(update={"method": settings()})


def _shape(recipe: Recipe) -> Any:
    from .model.load import resolve
    from .model.shape import read_shape

    return read_shape(resolve(recipe.model.base).base, revision=recipe.model.revision)


def _work_at(recipe: Recipe, batches: Any, share: float = 1.0) -> Callable[[int, int], Any]:
    """The work of a run for a micro-batch size and a number of ranks; each is laid out once."""
    from functools import lru_cache

    from .plan.work import work_of

    @lru_cache
    def at(budget: int, ranks: int) -> Any:
        train = recipe.train
        return work_of(batches, budget=budget, epochs=train.epochs, max_steps=train.max_steps, ranks=ranks, share=share)

    return at


PLANNED_ROWS = 2000  # of a source that are tokenised for a plan when nothing is prepared


@contextmanager
def _plan_data(
    recipe: Recipe, directory: RunDir, length: int | None, samples: int | None, screen: Screen
) -> Iterator[tuple[Any, float]]:
    """Batches like the run's, and the share of its samples that they hold."""
    import tempfile

    from .data.store import open_prepared
    from .plan.work import AverageLength

    if length is not None:
        part = AverageLength(min(length, recipe.data.max_length), recipe.data.max_length)
        screen.say(f"lengths are not known: {length} tokens a sample on average are assumed")
        yield _batches(recipe, part), len(part) / samples if samples else 1.0
        return
    ready = open_prepared(directory.data)
    if ready is not None:
        yield _batches(recipe, ready.part("train")), 1.0
        return
    quick, share = _first_rows(recipe)
    with tempfile.TemporaryDirectory(prefix="fitout-plan-") as folder:
        prepared, _ = _prepare(quick, RunDir(Path(folder)), _open_chat(recipe), Screen())
        if share < 1:
            screen.say(f"lengths are of the first {PLANNED_ROWS:,} rows of each source ({100 * share:.0f} % of all)")
        yield _batches(recipe, prepared.part("train")), share


def _first_rows(recipe: Recipe) -> tuple[Recipe, float]:
    """The recipe with each source limited to PLANNED_ROWS, and the share of all rows that these are."""
    from .data import HUB_ID
    from .data.sources import read

    sources, taken, there = [], 0, 0
    for source in recipe.data.sources:
        limited = source.model_copy(update={"limit": min(source.limit or PLANNED_ROWS, PLANNED_ROWS)})
        rows = PLANNED_ROWS if HUB_ID.fullmatch(source.path) else sum(1 for _ in read(source, Path()))
        sources.append(limited)
        there += rows
        taken += min(rows, PLANNED_ROWS)
    data = recipe.data.model_copy(update={"sources": sources})
    return recipe.model_copy(update={"data": data}), taken / there if there else 1.0


def _batches(recipe: Recipe, part: Any) -> Any:
    """The run's batches; prefixes are shared where that saves, as in training."""
    from .data.batches import Batches

    train, packing = recipe.train, recipe.data.packing
    batches = Batches(
        part, batch_size=train.batch_size, batch_tokens=train.batch_tokens, seed=train.seed, packing=packing,
        share=packing,
    )  # fmt: skip
    if packing:
        batches.share = _sharing_pays(*batches.saving(min(train.max_steps or 20, 20), budget=4096))
    return batches


def _sharing_pays(apart: int, computed: int) -> bool:
    return computed < 0.95 * apart


def _forecast(recipe: Recipe, part: Any, precision: str, grown: bool, ranks: int, screen: Screen) -> Any:
    """What this training will need, told before it begins. A model that the planner does not know has no forecast."""
    from .errors import ModelError
    from .model.methods.cost import with_embeddings
    from .plan.estimate import MB
    from .plan.machine import here
    from .plan.planner import advice, look, setup_of

    try:
        shape = _shape(recipe)
    except ModelError as error:
        screen.say(f"no plan: {error.message}")
        return None
    machine = here()
    cost = recipe.method.cost(shape)
    cost = with_embeddings(cost, shape) if grown else cost
    work_at = _work_at(recipe, _batches(recipe, part))
    setup = setup_of(recipe.train, precision, machine.kind, devices=ranks)
    row = look(shape, cost, recipe.method.kind, setup, recipe.train, work_at, machine)
    fixed = row.memory.terms["framework"] + row.memory.terms["weights"]
    if fixed > machine.memory:
        raise RequestError(
            f"the weights alone need {fixed / MB:,.0f} MB, and {machine.memory / MB:,.0f} MB are there",
            where=recipe.model.base,
            harm="The process would be killed while loading.",
            hint="Take a smaller base model or a 4-bit base; `fitout plan` shows what fits.",
        )
    if not row.fits:
        for line in advice(shape, cost, row, [], recipe.train, work_at, machine):
            screen.say(f"warning: {line}")
    return {
        "machine": machine.name,
        "method": recipe.method.kind,
        "precision": precision,
        "parameters": shape.parameters,
        "predicted": {
            "peak_mb": round((row.memory.peak if machine.kind == "cpu" else row.memory.allocated) / MB),
            "step_seconds": float(f"{row.step_seconds:.4g}"),
            "moment": row.memory.moment,
            "terms_mb": {name: round(size / MB) for name, size in row.memory.terms.items()},
        },
    }


def _compare(directory: RunDir, forecast: Any, before_mb: int, device: Any, whole: bool) -> str:
    """Predicted and measured side by side into run.json and, for a whole run, into the history. One line for people."""
    from .files import read_jsonl
    from .plan.history import remember
    from .train.loop import memory_mb

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
        if measured[key]
    ]
    return "plan: " + "; ".join(parts)


# the steps of a run


def _open_chat(recipe: Recipe) -> Chat:
    from .chat.render import open_chat
    from .model.load import resolve

    folder = resolve(recipe.model.base).chat_folder
    return open_chat(folder, recipe.chat, **_source(recipe))


def _source(recipe: Recipe) -> dict[str, Any]:
    """Which version of a hub id is meant, and whether its code may run."""
    return {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}


def _prepare(recipe: Recipe, directory: RunDir, chat: Chat, screen: Screen) -> tuple[Prepared, dict[str, Any]]:
    from .data.prepare import prepare, summary

    if recipe.objective.wants == "conversation":
        chat.check()
    for note in chat.notes:
        screen.say(note)
    prepared, report = prepare(
        recipe.data, chat, recipe.objective.wants, directory, seed=_split_seed(recipe), progress=screen.data_progress
    )
    screen.say(summary(report))
    for what in ("quarantined", "removed", "repaired"):
        for why, count in report[what].items():
            screen.say(f"  {what} {count:,}: {why}")
    part = report["parts"]["train"]
    share = 100 * part["supervised"] / max(1, part["tokens"])
    screen.say(f"training tokens: {part['tokens']:,}, of them trained {part['supervised']:,} ({share:.0f} %)")
    if unknown := part.get("unknown"):  # data prepared by an earlier version have no count of it
        screen.say(
            f"{unknown:,} training tokens are unknown to the tokenizer: what they stood for is lost to the model"
        )
    for name in ("validation", "test"):
        if getattr(recipe.data.split, name) and not report["kept"][name]:
            screen.say(f"no sample is in the {name} part (too few to split); a source of its own has `split: {name}`")
    if part["no_end"]:
        screen.say(f"{part['no_end']:,} training samples end without a trained end of turn (cut to max_length)")
    if _main_process():
        directory.update_status(data_fingerprint=prepared.fingerprint)
    return prepared, report


def _split_seed(recipe: Recipe) -> int:
    return recipe.train.seed if recipe.data.split_seed is None else recipe.data.split_seed


def _train(recipe: Recipe, directory: RunDir, screen: Screen, *, resume: bool) -> None:
    """From prepared data to trained weights in adapter/ or model/."""
    import torch

    from .data.batches import Batches
    from .model import methods
    from .model.fuse import fuse
    from .model.load import DTYPES, grow_vocabulary, hidden_width, load_base, load_config, resolve
    from .model.methods.base import count, raise_to_fp32, trainable
    from .model.precision import best_device, decide
    from .objectives import create
    from .train.backend import Backend
    from .train.listeners import make_listeners
    from .train.loop import Job, fit, memory_mb
    from .train.optim import optimizer_notes

    chat = _open_chat(recipe)
    parts = resolve(recipe.model.base)
    if parts.adapter:
        raise RequestError(
            "model.base is an adapter that has not been merged",
            where=recipe.model.base,
            harm="A new adapter on top would name the plain base as its own, and be loaded over the wrong weights.",
            hint="Merge it first (fitout merge), or go on from it with model.adapter over its base.",
        )
    device = best_device()
    backend = Backend(device)
    kind = directory.read_status().get("precision")  # a run keeps the precision it began with
    if kind is None:
        width = hidden_width(load_config(parts.base, **_source(recipe)))
        precision = decide(recipe.train.precision, device, width=width)
        screen.say(f"computing in {precision.kind} on {device.type}: {precision.why}")
        kind = precision.kind
    kind = backend.agree(kind, tuple(DTYPES))
    method = methods.create(recipe.method)

    if backend.main:
        prepared, report = _prepare(recipe, directory, chat, screen)
    backend.barrier()
    if not backend.main:
        prepared, report = _prepare(recipe, directory, chat, screen)

    batches = Batches(
        prepared.part("train"),
        batch_size=recipe.train.batch_size,
        batch_tokens=recipe.train.batch_tokens,
        seed=recipe.train.seed,
    )
    total = recipe.train.max_steps or batches.steps_in(recipe.train.epochs)
    if directory.read_status().get("trained_steps") == total and resume:
        screen.say("training is complete already")
        backend.close()
        return

    forecast = None
    if backend.main:
        forecast = _forecast(recipe, batches.part, kind, chat.grown, backend.ranks, screen)
    before_mb = memory_mb(device)
    model = load_base(
        parts.base,
        dtype=DTYPES[kind] if method.frozen_base else torch.float32,
        packed=recipe.data.packing,
        device=device,
        extra=method.load_kwargs(DTYPES[kind]),
        **_source(recipe),
    )
    batches.packing = batches.share = recipe.data.packing and _packs(model, screen)
    if chat.grown:
        grow_vocabulary(model, len(chat.tokenizer))
    torch.manual_seed(recipe.train.seed)
    if recipe.model.adapter:
        _go_on_from(recipe, model, method)
    else:
        method.apply(model)
    raised = raise_to_fp32(trainable(model))  # what is trained of the base itself stays in fp32
    backend.compute_in(kind, autocast=raised or not method.frozen_base)
    _require_context(model, recipe, report)
    fuse(model)

    lr = recipe.train.lr or recipe.method.default_lr
    trained = count(trainable(model))
    whole = method.size(model)
    screen.say(f"{recipe.method.kind}: {trained:,} of {whole:,} parameters are trained ({100 * trained / whole:.2f} %)")
    if method.held:
        screen.say(f"the base is held {method.held}; evaluation, chat and serving hold it so too")
    for note in (*method.notes(model), *optimizer_notes(recipe.train, device)):
        screen.say(note)
    _tell_sharing(batches, total, screen)
    job = Job(
        model=model,
        method=method,
        objective=create(recipe.objective),
        batches=batches,
        validation=prepared.part("validation"),
        settings=recipe.train,
        lr=lr,
        total_steps=total,
        run=directory,
        identity=_identity(recipe, prepared, parts.base, kind),
        info={"name": recipe.name, "recipe": recipe.model_dump(mode="json"), "device": str(device), "precision": kind},
    )
    if backend.main:
        directory.update_status(
            precision=kind, device=str(device), hardware=_hardware(), total_steps=total, ranks=backend.ranks
        )
    listeners = [*make_listeners(recipe.train.listeners, directory), *screen.listeners()]
    started, resumed = time.time(), resume and any(directory.checkpoints.glob("step-*"))
    progress = fit(job, backend, listeners, resume=resume)
    if backend.main:
        _save_trained(recipe, directory, method, model, chat)
        directory.update_status(
            reached="trained",
            trained_steps=total,
            training=_figures(progress, time.time() - started, trained, whole),
        )
        _describe_trained(recipe, directory)
        for line in _told(progress, directory):
            screen.say(line)
        if forecast:
            screen.say(_compare(directory, forecast, before_mb, device, whole=not resumed))
    backend.close()


def _packs(model: Any, screen: Screen) -> bool:
    """Whether this model keeps packed documents apart; where it does not, each sample gets a forward of its own."""
    from .model.attention import documents_apart

    if documents_apart(model) == 0:
        return True
    model.set_attn_implementation("sdpa")
    screen.say(
        "this model carries information across packed documents: samples are computed one by one, without packing"
    )
    return False


def _go_on_from(recipe: Recipe, model: Any, method: Any) -> None:
    """Loads an earlier adapter as the starting point; its shape must be the recipe's."""
    from .model.load import adapter_folder
    from .model.methods import saved_in

    folder = adapter_folder(str(recipe.model.adapter))
    if type(saved_in(folder)) is not type(method):
        raise RequestError(
            f"model.adapter was made by another method than {recipe.method.kind}",
            where="model.adapter",
            hint="Merge it first (fitout merge), and use the merged folder as model.base.",
        )
    method.apply(model)
    method.load(model, folder)


def _require_context(model: Any, recipe: Recipe, report: dict[str, Any]) -> None:
    """Samples longer than the model's positions would be computed wrongly without a word."""
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context and recipe.data.max_length > context:
        raise RequestError(
            f"data.max_length is {recipe.data.max_length}, and the model has {context} positions",
            where=recipe.model.base,
            harm="Tokens beyond them would get positions the model has never seen.",
            hint=f"Set data.max_length: {context}",
        )


def _tell_sharing(batches: Any, total: int, screen: Screen) -> None:
    """Shared prefixes are used where they save over 5 %, judged on the first steps."""
    if not batches.share:
        return
    looked = min(total, 20)
    apart, computed = batches.saving(looked, budget=4096)
    batches.share = _sharing_pays(apart, computed)
    if batches.share:
        screen.say(f"shared prefixes: {apart:,} -> {computed:,} tokens in the first {looked} steps")


def _identity(recipe: Recipe, prepared: Prepared, base: str, precision: str) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from."""
    settings = _comparable(recipe)
    return {
        "recipe": {
            key: value for key, value in settings.items() if key.split(".")[0] in ("method", "objective", "train")
        },
        "data": prepared.fingerprint,
        "base": base_fingerprint(base),
        "precision": precision,
    }


def base_fingerprint(base: str) -> str:
    """Names a base model: its config, and size and first MiB of each weights file (a hub id by itself)."""
    import hashlib

    folder = Path(base)
    if not folder.exists():
        return base
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + handle.read(1 << 20))
    return digest.hexdigest()[:20]


def _save_trained(recipe: Recipe, directory: RunDir, method: Any, model: Any, chat: Chat) -> None:
    """The adapter (PEFT format) or model (Hugging Face format), with tokenizer and template, in place at once."""
    from .export.write import save_chat, set_stop_ids

    set_stop_ids(model, chat)
    target = directory.adapter if method.frozen_base else directory.model
    with staged_folder(target) as folder:
        method.save(model, folder, base=_base_name(recipe), revision=recipe.model.revision)
        save_chat(chat, folder)


def _base_name(recipe: Recipe) -> str:
    """How an adapter names its base: as others can find it."""
    from .model.load import resolve

    return resolve(recipe.model.base).base


def _figures(progress: Progress, seconds: float, trained: int, whole: int) -> dict[str, Any]:
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "supervised_tokens": progress.supervised,
        "seconds": round(seconds, 1),
        "step_seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else None,
        "loss": progress.last_loss,
        "validation": progress.validation,
        "base_loss": progress.base_loss,
        "best_loss": progress.best_loss,
        "best_step": progress.best_step,
        "skipped_steps": progress.skipped,
        "stopped_early": progress.stopped_early,
        "trained_parameters": trained,
        "parameters": whole,
    }


def _told(progress: Progress, directory: RunDir) -> list[str]:
    lines = [
        f"trained {progress.step:,} steps, {progress.supervised:,} supervised of {progress.tokens:,} tokens, "
        f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s"
    ]
    if progress.base_loss is not None and progress.best_loss is not None:
        lines.append(
            f"validation loss: base {progress.base_loss:.4f} -> best {progress.best_loss:.4f} "
            f"(step {progress.best_step})"
        )
    if progress.skipped:
        lines.append(f"{progress.skipped} steps were skipped: their gradients were not finite (see log.jsonl)")
    return lines


def _probes(recipe: Recipe) -> list[dict[str, str]] | None:
    """The retention probes that a base model brings."""
    if recipe.model.base != EMBEDDED:
        return None
    from .demo import probes

    return probes()


def _check_retention(recipe: Recipe) -> None:
    """A retention file that cannot be read should say so now, not after hours of training."""
    from .evaluate import retention

    retention.load(recipe.evaluate.retention, _probes(recipe))


def _evaluate(recipe: Recipe, directory: RunDir, screen: Screen, *, again: bool = False) -> Any:
    """Answers of base and tuned model, scores, retention, report. The test part was never trained on."""
    from .data.prepare import test_conversations
    from .evaluate import report as pages
    from .evaluate.suite import evaluate
    from .model.methods import saved_in

    if (
        directory.evaluation_report.exists()
        and not again
        and directory.read_status().get("evaluated_steps") == (directory.read_status().get("trained_steps"))
    ):
        screen.say("evaluation is complete already")
        return None
    conversations = test_conversations(directory)
    held = saved_in(directory.adapter).held if directory.adapter.exists() else None
    if held:
        screen.say(f"base and tuned model answer with the base held {held}")
    result = evaluate(
        lambda: _base_engine(recipe, directory),
        lambda: _tuned_engine(recipe, directory),
        conversations,
        recipe.evaluate,
        probes=_probes(recipe),
        progress=screen.evaluation_progress,
    )
    from .files import read_jsonl

    pages.write_report(
        result,
        directory,
        title=recipe.name,
        recipe_summary=_summary(recipe),
        training_log=read_jsonl(directory.log) if directory.log.exists() else [],
        data_counts=_data_counts(read_json(directory.data_report)),
    )
    directory.update_status(reached="evaluated", evaluated_steps=directory.read_status().get("trained_steps"))
    _describe_trained(recipe, directory)
    return result


@contextmanager
def _base_engine(recipe: Recipe, directory: RunDir) -> Iterator[Engine]:
    """The base model, asked in the template that was trained."""
    from .chat.render import open_chat
    from .engine import Engine
    from .model.load import grow_vocabulary, open_model

    trained = directory.adapter if directory.adapter.exists() else directory.model
    chat = open_chat(trained)
    precision = _inference_precision(directory)
    model = open_model(
        recipe.model.base,
        adapter=recipe.model.adapter,
        precision=precision,
        like=directory.adapter if directory.adapter.exists() else None,
        **_source(recipe),
    )
    grow_vocabulary(model, len(chat.tokenizer))
    yield Engine(model, chat)


@contextmanager
def _tuned_engine(recipe: Recipe, directory: RunDir) -> Iterator[Engine]:
    from .chat.render import open_chat
    from .engine import Engine
    from .model.load import open_model

    trained = directory.adapter if directory.adapter.exists() else directory.model
    model = open_model(
        trained, precision=_inference_precision(directory), trust_remote_code=recipe.model.trust_remote_code
    )
    yield Engine(model, open_chat(trained))


def _inference_precision(directory: RunDir) -> str:
    return directory.read_status().get("precision", "auto")


def _own_texts(directory: RunDir, most: int = 500) -> tuple[str, ...]:
    """Texts of the run's test part, on which another engine's tokenizer is tried."""
    if not directory.exists() or not directory.test_rows.exists():
        return ()
    from itertools import islice

    from .data.prepare import test_conversations

    texts = (m.content for conversation in test_conversations(directory) for m in conversation.messages)
    return tuple(dict.fromkeys(islice(texts, most)))


def _facts(directory: RunDir, recipe: Recipe | None) -> dict[str, Any]:
    from .export.card import facts_of

    return facts_of(directory, recipe) if recipe else {}


def _local(base: str) -> Path:
    if not Path(base).is_dir():
        raise RequestError(
            "this model is not in a folder here",
            where=base,
            hint="Export a run, an adapter or a model folder; a model of the hub is there already.",
        )
    return Path(base)


def _write_card(folder: Path, name: str, base: str, facts: dict[str, Any]) -> None:
    from .export.write import write_card

    write_card(folder, name=name, base=base, facts=facts)


def _describe_trained(recipe: Recipe, directory: RunDir) -> None:
    """The card of adapter/ or model/, with all that the run directory knows by now."""
    for folder in (directory.adapter, directory.model):
        if folder.exists():
            _write_card(folder, recipe.name, _base_name(recipe), _facts(directory, recipe))


def _hardware() -> str:
    """The machine a run computes on, in words."""
    import os

    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores"


def _summary(recipe: Recipe) -> dict[str, Any]:
    """What a report says about how the model was made."""
    train = recipe.train
    return {
        "base": recipe.model.base,
        "method": recipe.method.model_dump(mode="json"),
        "objective": recipe.objective.kind,
        "data": [source.path for source in recipe.data.sources],
        "epochs": train.max_steps and f"{train.max_steps} steps" or train.epochs,
        "learning rate": train.lr or recipe.method.default_lr,
        "batch size": train.batch_tokens and f"{train.batch_tokens} tokens" or train.batch_size,
        "seed": train.seed,
    }


def _data_counts(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("samples", "kept", "quarantined", "removed", "repaired")}


def _merge(recipe: Recipe, directory: RunDir, screen: Screen, *, again: bool = False) -> Path:
    from .export.merge import merge_run

    reason = _unmergeable(recipe)
    if reason:
        screen.say(f"not merged: {reason}; the adapter is in {directory.adapter}, over {_base_name(recipe)}")
        directory.update_status(not_merged=reason)
        return directory.adapter
    if not directory.adapter.exists():
        screen.say("nothing to merge: the method trained the model itself, it is in model/")
        return directory.model
    if (
        (directory.merged / "config.json").exists()
        and not again
        and directory.read_status().get("merged_steps") == (directory.read_status().get("trained_steps"))
        and directory.read_status().get("merged_into", recipe.export.merge_into) == recipe.export.merge_into
    ):
        screen.say("the merged model is there already")
        return directory.merged
    difference = merge_run(directory, recipe, screen.say)
    screen.say(f"merged: largest difference of logits on probes {difference:.2g} ({directory.merged})")
    directory.update_status(
        reached="merged",
        merge_difference=difference,
        merged_into=recipe.export.merge_into,
        merged_steps=directory.read_status().get("trained_steps"),
    )
    return directory.merged


def _unmergeable(recipe: Recipe) -> str | None:
    """Why what the recipe's method trains cannot be folded into the base, when it cannot."""
    from .model import methods

    return methods.create(recipe.method).unmergeable


# the parts of a comparison


def _kinds(methods: Sequence[str]) -> list[str]:
    """The methods to compare, each once; raises RequestError for a kind that the door does not know."""
    from difflib import get_close_matches

    known = list(_method_classes())
    for kind in methods:
        if kind not in known:
            near = get_close_matches(kind, known, 1)
            raise RequestError(
                f"there is no method {kind!r}" + (f"; did you mean {near[0]}?" if near else ""),
                where="--methods",
                hint=f"Known: {', '.join(known)}",
            )
    return list(dict.fromkeys(methods or known))


def _method_classes() -> dict[str, Any]:
    from .model.methods import METHODS

    return {settings.model_fields["kind"].default: settings for settings in METHODS}


def _require_one_process() -> None:
    import os

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise RequestError(
            "fitout compare starts a process for each run itself",
            harm="Every rank would start all of them.",
            hint="Call it without torchrun.",
        )


def _common_recipe(recipe: Recipe) -> Recipe:
    """What all runs share. The split keeps its seed while train.seed changes; no run stops early, or it would use less
    than its budget; the rate is each method's own; nothing is merged."""
    train: dict[str, Any] = {"lr": None, "patience": None, "listeners": []}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"split_seed": _split_seed(recipe)}),
            "train": recipe.train.model_copy(update=train),
            "export": recipe.export.model_copy(update={"merge": False}),
        }
    )


def _entry(recipe: Recipe, kind: str, rates: list[float] | None, screen: Screen) -> Any:
    """A method with its settings: the recipe's own where it is the recipe's kind; else the kind's defaults, with what
    the recipe sets under keys that mean the same (rank, targets) carried over."""
    from .trials import Entry

    cls, own = _method_classes()[kind], recipe.method
    settings: Any = own
    if kind != own.kind:
        mine, theirs = cls.model_fields, type(own).model_fields
        same = {
            key: getattr(own, key)
            for key in sorted(own.model_fields_set - {"kind"})
            if key in mine and mine[key].annotation == theirs[key].annotation
        }
        settings = cls(**same)
        if same:
            shown = ", ".join(f"{key} {value}" for key, value in same.items())
            screen.say(f"{kind}: {shown} as in the recipe's {own.kind}, for the rest its defaults")
    return Entry(kind, settings.model_dump(mode="json"), settings.default_lr, rates)


def _trial_recipe(common: Recipe, trial: Any, settings: dict[str, Any]) -> str:
    """The recipe of one run of a comparison."""
    raw = common.model_dump(mode="json")
    raw["name"] = f"{common.name}-{trial.method}"
    raw["method"] = settings
    raw["train"].update(max_steps=trial.steps, seed=trial.seed, lr=trial.lr)
    return build(raw).to_yaml()


def _require_held_out(prepared: RunDir, *, sweeps: bool) -> None:
    """Rates are chosen on the validation part, and methods compared on the test part: both must have rows."""
    parts = read_json(prepared.data_report)["parts"]
    if sweeps and not parts["validation"]["rows"]:
        raise RequestError(
            "there is no validation row to choose learning rates on",
            where="data.split.validation",
            harm="Choosing on the test part would make its scores worth nothing.",
            hint="Give validation a share of the split, or one rate for each method: --lrs lora=2e-4 --lrs full=2e-5",
        )
    if not prepared.test_rows.exists() or not prepared.test_rows.stat().st_size:
        raise RequestError(
            "there is no test question to compare methods on",
            where="data.split.test",
            hint="Give test a share of the split, or a source of its own with `split: test`.",
        )


def _steps(recipe: Recipe, prepared: RunDir, budget: Any, screen: Screen) -> int | None:
    """The budget in optimizer steps; None for minutes, which each method's own speed turns into steps."""
    from .data.batches import Batches
    from .data.store import Prepared

    if budget and budget.kind == "minutes":
        return None
    if budget and budget.kind == "steps":
        return int(budget.amount)
    part = Prepared(prepared.data, "").part("train")
    train = recipe.train
    batches = Batches(part, batch_size=train.batch_size, batch_tokens=train.batch_tokens, seed=train.seed)
    if not budget:
        return train.max_steps or batches.steps_in(train.epochs)
    mean = int(part.lengths.sum()) / batches.steps_in(1)
    steps = max(1, round(budget.amount / mean))
    screen.say(f"{budget}: {steps:,} steps of {mean:,.0f} tokens on average")
    return steps


def _again(trials: Any, kinds: Sequence[str], seeds: int, budget: str | None, lrs: Sequence[str]) -> str:
    """The command that makes (or goes on with) this comparison."""
    import shlex

    words = ["fitout", "compare", str(trials.folder / "recipes" / "prepared.yaml"), "--methods", ",".join(kinds)]
    words += ["--seeds", str(seeds), *(["--budget", budget] if budget else [])]
    words += [word for one in lrs for word in ("--lrs", one)]
    return shlex.join([*words, "--out", str(trials.folder)])


def _comparison(recipe: Recipe, trials: Any, raced: dict[str, dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """Everything the page and the terminal show."""
    from .evaluate.compare import compare
    from .evaluate.compare_page import verdicts
    from .evaluate.outcomes import retention_trials, task_trials

    finished = {kind: [RunDir(Path(run["run"])) for run in one["runs"].values()] for kind, one in raced.items()}
    finished = {kind: runs for kind, runs in finished.items() if runs}
    if not finished:
        reasons = "; ".join(f"{kind}: {failure['reason']}" for kind, one in raced.items()
                            for failure in one["failed"].values())  # fmt: skip
        raise FitoutError(f"no run of this comparison could be done: {reasons}", where=str(trials.folder))
    samples, seed = max(1000, recipe.evaluate.samples), recipe.evaluate.seed
    task = [compare(one, samples, seed) for one in task_trials(finished)]
    kept = [compare(one, samples, seed) for one in retention_trials(finished)]
    return {
        "title": recipe.name,
        "base": recipe.model.base,
        "folder": str(trials.folder),
        "seeds": seeds,
        "data": read_json(trials.prepared.data_report)["kept"],
        "split_seed": _split_seed(recipe),
        "methods": raced,
        "task": [one.as_dict() for one in task],
        "retention": [one.as_dict() for one in kept],
        "verdicts": verdicts(task[0], kept, len(seeds)),
        "samples": samples,
        "versions": _versions(),
    }
