"""A run directory at work: who owns it, which recipe it is of, what is recorded; and what verbs ask of a recipe."""

from __future__ import annotations

import gc
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import __version__
from ..config import Recipe, build
from ..errors import FitoutError, RequestError, RunExistsError, Stopped, changes
from ..files import explain_full_disk, remove_leftovers, write_text
from ..model import EMBEDDED
from ..rundir import RunDir

if TYPE_CHECKING:
    from ..chat.render import Chat
    from ..train.listeners import Listener

FREE_TO_CHANGE = {  # keys that do not change what has been trained so far; a run may go on with others
    "train": ("epochs", "max_steps", "save_every", "evaluate_every", "keep", "keep_last", "patience", "listeners",
              "micro_batch_tokens", "gradient_checkpointing", "parallel", "offload", "compile", "on_nonfinite",
              "hang_after"),
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


def recipe_of(directory: RunDir) -> Recipe:
    """The resolved recipe of a run."""
    if not directory.recipe.exists():
        raise RequestError(
            "this is not a run directory (it has no recipe.yaml)",
            where=str(directory.path),
            hint="Give the folder that `fitout run` or `fitout train` made, runs/NAME.",
        )
    return build(yaml.safe_load(directory.recipe.read_text(encoding="utf-8")), where=str(directory.recipe))


@contextmanager
def working(directory: RunDir, recipe: Recipe, screen: Screen) -> Iterator[None]:
    """Owns the directory, records what is asked and how it ended."""
    with _stoppable(directory), explain_full_disk(directory.path):
        import_libraries()
        if not main_process():  # ranks other than the first read what the first one writes
            yield
            return
        with _owned(directory, recipe, screen):
            yield


@contextmanager
def _stoppable(directory: RunDir) -> Iterator[None]:
    """SIGTERM and SIGINT end the verb with exit code 3, whatever it is doing. (The training loop takes them over while
    it runs, to save a checkpoint first.)"""
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if ours else None
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(
            "stopped on request",
            where=str(directory.path),
            hint="What was complete is kept; go on with the same command (for `fitout train` add --resume).",
        ) from None
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _owned(directory: RunDir, recipe: Recipe, screen: Screen) -> Iterator[None]:
    with directory.owned():
        _agree(directory, recipe)
        left = remove_leftovers(directory.path) + (
            remove_leftovers(directory.checkpoints) if directory.checkpoints.exists() else []
        )
        if left:
            screen.say(f"removed what a killed process left half-written: {', '.join(left)}")
        write_text(directory.recipe, recipe.to_yaml())
        directory.update_status(status="running", versions=versions(), seed=recipe.train.seed)
        try:
            yield
        except BaseException as error:
            ended = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
            with suppress(FitoutError, OSError):  # what ended the work matters more than that this cannot be written
                said = str(error) if isinstance(error, FitoutError) else repr(error)
                directory.update_status(status=ended, error=said)
            raise
        status = directory.read_status()
        if status["status"] == "running":
            directory.update_status(status=status.get("reached", "prepared"), error=None)


def import_libraries() -> None:
    """torch and transformers, with the garbage collector paused: a quarter of their import goes into looking through
    objects that all stay (measured 2.7 -> 2.1 s). What they made is then left out of later collections."""
    if "transformers.modeling_utils" in sys.modules:
        return
    from ..chat.sandbox import renderer

    renderer().start()  # which imports what it needs meanwhile
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler else writes of itself on the screen
    gc.disable()
    try:
        import torch  # noqa: F401
        from transformers import AutoTokenizer, PreTrainedModel  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()


def _agree(directory: RunDir, recipe: Recipe) -> None:
    """A run that has begun training may only go on with a recipe that means the same training."""
    if not directory.recipe.exists() or not directory.has_training():
        return
    differs = changes(comparable(recipe_of(directory)), comparable(recipe))
    if differs:
        raise RunExistsError(
            f"this run was made with another recipe ({differs})",
            where=str(directory.path),
            harm="Going on would mix two trainings.",
            hint="Undo the change, or choose another name or --out.",
        )


def comparable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as flat keys, without those that may change while a run goes on."""
    flat = {}
    for section, values in recipe.model_dump(mode="json").items():
        free = FREE_TO_CHANGE.get(section, ())
        if free is None or not isinstance(values, dict):
            continue
        flat.update({f"{section}.{key}": value for key, value in values.items() if key not in free})
    return flat


def main_process() -> bool:
    import os

    return int(os.environ.get("RANK", 0)) == 0


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "numpy")
    return {"fitout": __version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def chat_of(recipe: Recipe) -> Chat:
    from ..chat.render import open_chat
    from ..model.load import resolve

    folder = resolve(recipe.model.base).chat_folder
    return open_chat(folder, recipe.chat, **hub_source(recipe))


def hub_source(recipe: Recipe) -> dict[str, Any]:
    """Which version of a hub id is meant, and whether its code may run."""
    return {"revision": recipe.model.revision, "trust_remote_code": recipe.model.trust_remote_code}


def base_name(recipe: Recipe) -> str:
    """How an adapter names its base: as others can find it."""
    from ..model.load import resolve

    return resolve(recipe.model.base).base


def probes_of(recipe: Recipe) -> list[dict[str, str]] | None:
    """The retention probes that a base model brings."""
    if recipe.model.base != EMBEDDED:
        return None
    from ..demo import probes

    return probes()


def hardware() -> str:
    """The machine a run computes on, in words."""
    import os

    import torch

    from ..plan.machine import processor

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {os.cpu_count()} cores"
