"""From prepared data to trained weights in adapter/ or model/."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import FitoutError, RequestError
from ..files import size, staged_folder
from ..rundir import RunDir
from .delivering import describe_trained
from .planning import (
    Pace,
    batches_of,
    forecast_run,
    products_of,
    tell_sharing,
    told_against_plan,
    told_speed,
    total_steps,
)
from .preparing import prepare_data
from .sharing import backend_for, require_shared, tell_idle_devices
from .working import Screen, base_name, chat_of, comparable, hardware, hub_source, main_process

if TYPE_CHECKING:
    from ..chat.render import Chat
    from ..data.store import Prepared
    from ..train.backend import Backend
    from ..train.loop import Progress


def train_model(recipe: Recipe, directory: RunDir, screen: Screen, *, resume: bool, profile: bool = False) -> None:
    """From prepared data to trained weights in adapter/ or model/, on all ranks that were started. `profile`: some
    steps say where their time goes."""
    from ..model.precision import best_device, faster_products
    from ..train.backend import Backend

    with Backend(best_device()) as group, faster_products(group.device):
        _train_model(recipe, directory, screen, group, resume=resume, profile=profile)


def _train_model(
    recipe: Recipe, directory: RunDir, screen: Screen, group: Backend, *, resume: bool, profile: bool
) -> None:
    import torch

    from ..model import blocks, methods
    from ..model.fuse import fused
    from ..model.load import DTYPES, grow_vocabulary, hidden_width, load_base, load_config, resolve
    from ..model.methods.base import count, raise_to_fp32, trainable
    from ..model.precision import decide, use_threads
    from ..objectives import create
    from ..train.listeners import make_listeners
    from ..train.loop import Job, fit, memory_mb
    from ..train.optim import optimizer_notes
    from ..train.profile import Profile

    chat = chat_of(recipe)
    parts = resolve(recipe.model.base)
    if parts.adapter:
        raise RequestError(
            "model.base is an adapter that has not been merged",
            where=recipe.model.base,
            harm="A new adapter on top would name the plain base as its own, and be loaded over the wrong weights.",
            hint="Merge it first (fitout merge), or go on from it with model.adapter over its base.",
        )
    device = group.device
    kind = directory.read_status().get("precision")  # a run keeps the precision it began with
    width = hidden_width(load_config(parts.base, **hub_source(recipe)))
    few = use_threads(width, device)
    if few:
        screen.say(few)
    if kind is None:
        precision = decide(recipe.train.precision, device, width=width)
        screen.say(f"computing in {precision.kind} on {device.type}: {precision.why}")
        kind = precision.kind
    kind = group.agree(kind, tuple(DTYPES))
    if device.type == "cpu":
        _tell_native(directory, screen, resume)
    method = methods.create(recipe.method)

    with group.main_first("data"):
        if not group.main:
            require_shared(directory)
        prepared, report = prepare_data(recipe, directory, chat, screen)

    batches = batches_of(recipe, prepared.part("train"))
    total = total_steps(recipe, batches)
    if directory.read_status().get("trained_steps") == total and resume:
        screen.say("training is complete already")
        return

    tell_idle_devices(group.ranks, screen)
    backend = backend_for(recipe, method, group, batches, kind, chat.grown, screen)
    forecast = None
    if backend.main:
        forecast = forecast_run(recipe, batches, kind, chat.grown, backend.ranks, screen, stage=backend.stage)
    before_mb = memory_mb(device)
    model = load_base(
        parts.base,
        dtype=DTYPES[kind] if method.frozen_base else torch.float32,
        device="cpu" if backend.spreads else device,  # else no device ever holds all of it
        empty=backend.spreads and not backend.main,
        extra=method.load_kwargs(DTYPES[kind]),
        **hub_source(recipe),
    )
    validation = prepared.part("validation")
    why = _settle_attention(
        model, backend, max(int(part.lengths.max(initial=0)) for part in (batches.part, validation))
    )
    if why and batches.packing:
        screen.say(f"{why}: samples are computed one by one, without packing")
        batches.packing = batches.share = False
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

    trained = count(trainable(model))
    whole = method.size(model)
    screen.say(f"{recipe.method.kind}: {trained:,} of {whole:,} parameters are trained ({100 * trained / whole:.2f} %)")
    if method.held:
        screen.say(f"the base is held {method.held}; evaluation, chat and serving hold it so too")
    if backend.main:
        embedding: Any = model.get_input_embeddings()
        held = whole * embedding.weight.element_size()  # a 4-bit base is merged in 16 bits
        _require_space(recipe, directory, trained, held, method.frozen_base, total)
    for note in (*method.notes(model), *optimizer_notes(recipe.train, device)):
        screen.say(note)
    if getattr(model, "fitout_balances", False):
        screen.say("the loss that balances the router's experts (output_router_logits) is not added to the objective's")
    tell_sharing(recipe, batches, total, screen)
    products = products_of(recipe, kind, chat.grown, device)
    job = Job(
        model=model,
        method=method,
        objective=create(recipe.objective),
        batches=batches,
        validation=validation,
        settings=recipe.train,
        lr=recipe.lr,
        total_steps=total,
        run=directory,
        identity=_identity(recipe, prepared, parts.base, kind),
        info={"name": recipe.name, "recipe": recipe.model_dump(mode="json"), "device": str(device), "precision": kind},
        profile=Profile(directory, products, device) if profile and backend.main else None,
    )
    if backend.main:
        directory.update_status(
            precision=kind, device=str(device), hardware=hardware(), total_steps=total, ranks=backend.ranks,
            parallel=backend.kind,
        )  # fmt: skip
    listeners = [*make_listeners(recipe.train.listeners, directory, screen.say), *screen.listeners()]
    if forecast and not forecast["predicted"]["step_seconds"]:
        listeners.append(Pace(screen.say))
    started, resumed = time.time(), resume and any(directory.checkpoints.glob("step-*"))
    with (
        blocks.reused(device),
        fused(model),
        _compiled(recipe, directory, model, backend, forecast, screen, resumed),
        backend.watched(directory.stacks, recipe.train.hang_after),
    ):
        progress = fit(job, backend, listeners, resume=resume)
    if backend.main:
        _save_trained(recipe, directory, method, model, chat)
        speed, speed_line = told_speed(progress, products, backend.ranks)
        directory.update_status(
            reached="trained",
            trained_steps=total,
            training=_figures(progress, time.time() - started, trained, whole) | speed,
        )
        describe_trained(recipe, directory)
        for line in (*_told(progress, recipe.train.keep), speed_line):
            screen.say(line)
        if forecast:
            screen.say(told_against_plan(directory, forecast, before_mb, device, whole=not resumed and not profile))
    backend.close()


def _settle_attention(model: Any, backend: Backend, longest: int) -> str | None:
    """Why samples of up to `longest` tokens are not packed for this model, or None: packed attention computes what the
    model's own does, and keeps documents apart. Where it does not, each sample gets a forward of its own, by the
    fastest attention that is right. A model without values is not asked."""
    from ..model import rope
    from ..model.attention import NAME, settle, take

    why = settle(model) if backend.main or not backend.spreads else None
    switch = rope.switch(model.config)
    if why is None and switch is not None and longest > switch:
        why = (
            f"this model turns positions otherwise in samples of more than {switch:,} tokens (the longest: {longest:,})"
        )
    packs = backend.agree("plain" if why else "packed", ("packed", "plain")) == "packed"
    take(model, backend.agree(model.config._attn_implementation, (NAME, "sdpa", "eager")))
    return None if packs else why or "packed attention does not serve this model"


TOLD = 1  # seconds of compiling that are worth a line


def _tell_native(directory: RunDir, screen: Screen, resume: bool) -> None:
    """Says what compiling the code of our own for a CPU took, or why there is none; and that a run goes on with other
    code than it began with."""
    from ..model import blocks, native
    from ..model.precision import onednn_multiplies

    start = time.perf_counter()
    why, heap = native.why_not(), blocks.why_not()
    if (seconds := time.perf_counter() - start) > TOLD:
        screen.say(f"compiled attention, norms, activations and loss for this processor, once: {seconds:.0f} s")
    if why:
        screen.say(f"attention, norms, activations and loss by PyTorch's kernels, which take longer: {why}")
    if heap and heap != why:
        screen.say(f"memory of tensors from the C library's heap, which has holes: {heap}")
    now = {"native": why is None, "products": "oneDNN" if onednn_multiplies() else "PyTorch's choice"}
    began_with = directory.read_status().get("computed_by") if resume and directory.has_training() else None
    if began_with not in (None, now):
        screen.say("this run began with other kernels; it is not bit for bit what an uninterrupted one would be")
    if main_process() and began_with is None:
        directory.update_status(computed_by=now)


COMPILE_PAYS = 600  # seconds of a training; compiling took 7 to 24 on a CPU


@contextmanager
def _compiled(
    recipe: Recipe, directory: RunDir, model: Any, backend: Backend, forecast: Any, screen: Screen, resumed: bool
) -> Iterator[None]:
    """What lies between the model's products compiled until the block ends, where the recipe or the expected length
    says so and the trial agrees. A run keeps the form it began with, so that it goes on to the same numbers."""
    from ..model import between
    from ..model.fuse import why_not

    wanted, began_with = recipe.train.compile, directory.read_status().get("compiled") if resumed else None
    if wanted == "auto":
        seconds = (forecast or {}).get("predicted", {}).get("total_seconds") or 0
        wanted = backend.device.type == "cuda" and seconds > COMPILE_PAYS and not backend.spreads
    if began_with is not None:
        wanted = began_with
    wanted = backend.agree("yes" if wanted else "no", ("yes", "no")) == "yes"
    own, start, why = between.best(backend.device), time.perf_counter(), None
    form = own
    if wanted and backend.spreads:
        why = f"{backend.kind} divides the weights, and leaves no model to try it on"
    elif wanted:
        form = between.compiled()
        with backend.compute():
            why = why_not(model, form)
    if backend.any(bool(why)):
        why = why or "not on another rank"
        if began_with:
            raise FitoutError(
                f"this run began with train.compile, which does not work here: {why}",
                harm="Going on without it would give other numbers than an uninterrupted run.",
                hint="Go on where it works, or start anew with train.compile: false and another name or --out.",
            )
        form = own
        screen.say(f"not compiled: {why}")
    elif wanted:
        screen.say(f"compiled what lies between products: {time.perf_counter() - start:.0f} s (train.compile)")
    if backend.main:
        directory.update_status(compiled=form is not own)
    with between.using(form):
        yield


def _go_on_from(recipe: Recipe, model: Any, method: Any) -> None:
    """Loads an earlier adapter as the starting point; its shape must be the recipe's."""
    from ..model.load import adapter_folder
    from ..model.methods import saved_in

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


def _require_space(recipe: Recipe, directory: RunDir, trained: int, held: int, adapts: bool, total: int) -> None:
    """Refuses a run whose checkpoints and final weights the disk has no room for, beside what is there already.

    `trained` numbers are in every checkpoint; the whole model takes `held` bytes.
    """
    from shutil import disk_usage

    checkpoint = trained * (12 if recipe.train.optimizer == "adamw" else 6)  # fp32, and two moments
    saves = min(recipe.train.keep_last + 2, total // recipe.train.save_every + 1)  # the best one, and one being written
    sizes = {
        f"{saves} checkpoint{'s' * (saves > 1)}": saves * checkpoint,
        "the adapter" if adapts else "the model": trained * 4 if adapts else held,
        "the merged model": held if adapts and recipe.export.merge else 0,
    }
    there = sum(file.stat().st_size for file in directory.path.rglob("*.safetensors"))
    needed, free = max(0, sum(sizes.values()) - there), disk_usage(directory.path).free
    if needed > free:
        what = ", ".join(f"{name} {size(bytes)}" for name, bytes in sizes.items() if bytes)
        raise FitoutError(
            f"the disk has {size(free)} free, and this run will write {size(needed)} ({what})",
            where=str(directory.path),
            harm="It would train until a save fails.",
            hint="Free space, name another disk with --out, set train.keep_last: 1 or export.merge: false.",
        )


def _identity(recipe: Recipe, prepared: Prepared, base: str, precision: str) -> dict[str, Any]:
    """What a checkpoint must agree with to be gone on from."""
    settings = comparable(recipe)
    return {
        "recipe": {
            key: value for key, value in settings.items() if key.split(".")[0] in ("method", "objective", "train")
        },
        "data": prepared.fingerprint,
        "base": base_fingerprint(base),
        "precision": precision,
    }


def base_fingerprint(base: str) -> str:
    """Names a base model: its config, and each weights file by its size, its beginning and 64 KiB of each of 64 places
    (a merged adapter leaves the beginning as it was). A hub id names itself."""
    import hashlib

    folder = Path(base)
    if not folder.exists():
        return base
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as handle:
            digest.update(handle.read(1 << 20))
            for place in range(64):
                handle.seek(size * place // 64)
                digest.update(handle.read(1 << 16))
    return digest.hexdigest()[:20]


def _save_trained(recipe: Recipe, directory: RunDir, method: Any, model: Any, chat: Chat) -> None:
    """The adapter (PEFT format) or model (Hugging Face format), with tokenizer and template, in place at once."""
    from ..export.write import save_chat, set_stop_ids

    set_stop_ids(model, chat)
    target = directory.adapter if method.frozen_base else directory.model
    with staged_folder(target) as folder:
        method.save(model, folder, base=base_name(recipe), revision=recipe.model.revision)
        save_chat(chat, folder)


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


def _told(progress: Progress, keep: str) -> list[str]:
    lines = [
        f"trained {progress.step:,} steps: {progress.tokens:,} tokens, {progress.supervised:,} targets, "
        f"{progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s"
    ]
    if progress.base_loss is not None and progress.best_loss is not None:
        best = f"best {progress.best_loss:.4f} (step {progress.best_step})"
        last = progress.validation[-1][1]
        if keep == "last" and last is not None:
            best = f"{last:.4f} at the end, which is kept; {best}"
        lines.append(f"validation loss: base {progress.base_loss:.4f} -> {best}")
        if progress.best_loss >= progress.base_loss:
            lines.append("no validation was better than the one before the first step: lower train.lr, or train longer")
    if progress.skipped:
        lines.append(f"{progress.skipped} steps were skipped: their gradients were not finite (see log.jsonl)")
    return lines
