"""Base against tuned, and what was kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..files import read_json
from ..rundir import RunDir
from .delivering import describe_trained, require_trained
from .working import Screen, hub_source, probes_of

if TYPE_CHECKING:
    from ..engine import Engine


def check_retention(recipe: Recipe) -> None:
    """A retention file that cannot be read should say so now, not after hours of training."""
    from ..evaluate import retention

    retention.load(recipe.evaluate.retention, probes_of(recipe))


def evaluate_run(recipe: Recipe, directory: RunDir, screen: Screen, *, again: bool = False) -> Any:
    """Answers of base and tuned model, scores, retention, report. The test part was never trained on."""
    from ..data.prepare import test_samples
    from ..evaluate import report as pages
    from ..evaluate.suite import evaluate
    from ..model.methods import saved_in

    status, asked = directory.read_status(), recipe.evaluate.model_dump(mode="json")
    complete = directory.evaluation_report.exists() and status.get("evaluated_steps") == status.get("trained_steps")
    if complete and not again and status.get("evaluated_with", asked) == asked:
        screen.say("evaluation is complete already")
        return None
    require_trained(directory)
    held = saved_in(directory.adapter).held if directory.adapter.exists() else None
    if held:
        screen.say(f"base and tuned model answer with the base held {held}")
    result = evaluate(
        lambda: _base_engine(recipe, directory),
        lambda: _tuned_engine(recipe, directory, screen),
        test_samples(directory),
        recipe.evaluate,
        probes=probes_of(recipe),
        progress=screen.evaluation_progress,
    )
    from ..files import read_jsonl

    pages.write_report(
        result,
        directory,
        title=recipe.name,
        recipe_summary=_summary(recipe),
        training_log=read_jsonl(directory.log) if directory.log.exists() else [],
        data_counts=_data_counts(read_json(directory.data_report)),
    )
    directory.update_status(reached="evaluated", evaluated_steps=status.get("trained_steps"), evaluated_with=asked)
    describe_trained(recipe, directory)
    return result


@contextmanager
def _base_engine(recipe: Recipe, directory: RunDir) -> Iterator[Engine]:
    """The base model, asked in the template that was trained."""
    from ..chat.render import open_chat
    from ..engine import Engine
    from ..model.load import grow_vocabulary, open_model

    trained = directory.adapter if directory.adapter.exists() else directory.model
    chat = open_chat(trained)
    precision = _inference_precision(directory)
    model = open_model(
        recipe.model.base,
        adapter=recipe.model.adapter,
        precision=precision,
        like=directory.adapter if directory.adapter.exists() else None,
        **hub_source(recipe),
    )
    grow_vocabulary(model, len(chat.tokenizer))
    yield Engine(model, chat)


@contextmanager
def _tuned_engine(recipe: Recipe, directory: RunDir, screen: Screen) -> Iterator[Engine]:
    from ..chat.render import open_chat
    from ..engine import Engine
    from ..model.load import open_model

    trained = directory.adapter if directory.adapter.exists() else directory.model
    model = open_model(
        trained, precision=_inference_precision(directory), trust_remote_code=recipe.model.trust_remote_code
    )
    engine = Engine(model, open_chat(trained))
    if engine.slow:
        screen.say(engine.slow)
    yield engine


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
        "learning rate": recipe.lr,
        "batch size": train.batch_tokens and f"{train.batch_tokens} tokens" or train.batch_size,
        "seed": train.seed,
    }


def _data_counts(report: dict[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("samples", "kept", "quarantined", "removed", "repaired")}
