"""One short function per verb; the only holder of the whole recipe.

run = prepare -> train -> evaluate -> merge, going on where it stopped
"""

from __future__ import annotations

import platform
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
    with _working(directory, recipe, screen):
        return _merge(recipe, directory, screen, again=True)


def open_engine(what: str | Path, *, adapter: str | None = None, precision: str = "auto") -> Engine:
    """A model, a run or `embedded:shell`, ready to talk."""
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
        recipe.data, chat, recipe.objective.wants, directory, seed=recipe.train.seed, progress=screen.data_progress
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


def _train(recipe: Recipe, directory: RunDir, screen: Screen, *, resume: bool) -> None:
    """From prepared data to trained weights in adapter/ or model/."""
    import torch

    from .data.batches import Batches
    from .model import methods
    from .model.load import DTYPES, grow_vocabulary, hidden_width, load_base, load_config, resolve
    from .model.methods.base import count, trainable
    from .model.precision import best_device, decide
    from .objectives import create
    from .train.backend import Backend
    from .train.listeners import make_listeners
    from .train.loop import Job, fit

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
    stored_low = method.frozen_base and not chat.grown  # trained embeddings stay in fp32, as full weights do
    backend.compute_in(kind, autocast=not stored_low)

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

    model = load_base(
        parts.base,
        dtype=DTYPES[kind] if stored_low else torch.float32,
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
    _require_context(model, recipe, report)

    lr = recipe.train.lr or recipe.method.default_lr
    trained = count(trainable(model))
    whole = sum(parameter.numel() for parameter in model.parameters())
    screen.say(f"{recipe.method.kind}: {trained:,} of {whole:,} parameters are trained ({100 * trained / whole:.2f} %)")
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
        directory.update_status(precision=kind, device=str(device), total_steps=total, ranks=backend.ranks)
    listeners = [*make_listeners(recipe.train.listeners, directory), *screen.listeners()]
    started = time.time()
    progress = fit(job, backend, listeners, resume=resume)
    if backend.main:
        _save_trained(recipe, directory, method, model, chat)
        directory.update_status(
            reached="trained",
            trained_steps=total,
            training=_figures(progress, time.time() - started, trained, whole),
        )
        for line in _told(progress, directory):
            screen.say(line)
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
    batches.share = computed < 0.95 * apart
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

    if (
        directory.evaluation_report.exists()
        and not again
        and directory.read_status().get("evaluated_steps") == (directory.read_status().get("trained_steps"))
    ):
        screen.say("evaluation is complete already")
        return None
    conversations = test_conversations(directory)
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
    model = open_model(recipe.model.base, adapter=recipe.model.adapter, precision=precision, **_source(recipe))
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

    if not directory.adapter.exists():
        screen.say("nothing to merge: the method trained the model itself, it is in model/")
        return directory.model
    if (
        (directory.merged / "config.json").exists()
        and not again
        and directory.read_status().get("merged_steps") == (directory.read_status().get("trained_steps"))
    ):
        screen.say("the merged model is there already")
        return directory.merged
    difference = merge_run(directory, recipe)
    screen.say(f"merged: largest difference of logits on probes {difference:.2g} ({directory.merged})")
    directory.update_status(
        reached="merged", merge_difference=difference, merged_steps=directory.read_status().get("trained_steps")
    )
    return directory.merged
