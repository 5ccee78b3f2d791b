"""What was trained, as others load it: merged, combined, exported, with its card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import Recipe
from ..errors import RequestError
from ..files import read_json, staged_folder
from ..rundir import RunDir
from .working import Screen, base_name, recipe_of, working

if TYPE_CHECKING:
    from ..export.bundle import Exported


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
    from ..export import HOWS
    from ..export.bundle import require_free
    from ..export.combine import combine as join
    from ..export.merge import merge_adapter

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
    from ..export import ENGINES, STORED_AS, engines
    from ..export.bundle import Wanted, export_merged, export_unmerged, export_with_code, merged_beside, require_free

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
        with working(directory, recipe, screen):
            return export_merged(parts, merge_into_base(recipe, directory, screen), wanted)
    if parts.adapter is not None:
        with merged_beside(parts, to) as plain:
            return export_merged(parts, plain, wanted)
    return export_merged(parts, _local(parts.base), wanted)


def can_load(what: str | Path, *, trust_remote_code: bool = False) -> dict[str, list[str]]:
    """For every engine, and for vLLM with the adapter apart, why it cannot load this: no reasons where it can."""
    from ..export import ENGINES, engines

    parts = engines.look(what, trust_remote_code=trust_remote_code)
    texts = _own_texts(RunDir(Path(what)))
    found = {}
    for engine in ENGINES:
        for unmerged in (False, True) if engine == "vllm" and parts.adapter else (False,):
            reasons = engines.obstacles(engine, parts, unmerged=unmerged, texts=texts)
            found[engine + " --unmerged" * unmerged] = [f"{one.why} ({one.remedy})" for one in reasons]
    return found


def _own_texts(directory: RunDir, most: int = 500) -> tuple[str, ...]:
    """Texts of the run's test part, on which another engine's tokenizer is tried."""
    if not directory.exists() or not directory.test_rows.exists():
        return ()
    from itertools import islice

    from ..data.content import texts
    from ..data.prepare import test_samples

    every = (text for sample in test_samples(directory) for text in texts(sample))
    return tuple(dict.fromkeys(islice(every, most)))


def _facts(directory: RunDir, recipe: Recipe | None) -> dict[str, Any]:
    from ..export.card import facts_of

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
    from ..export.write import write_card

    write_card(folder, name=name, base=base, facts=facts)


def describe_trained(recipe: Recipe, directory: RunDir) -> None:
    """The card of adapter/ or model/, with all that the run directory knows by now."""
    for folder in (directory.adapter, directory.model):
        if folder.exists():
            _write_card(folder, recipe.name, base_name(recipe), _facts(directory, recipe))


def merge_into_base(recipe: Recipe, directory: RunDir, screen: Screen, *, again: bool = False) -> Path:
    from ..export.merge import merge_run

    reason = unmergeable(recipe)
    if reason:
        screen.say(f"not merged: {reason}; the adapter is in {directory.adapter}, over {base_name(recipe)}")
        directory.update_status(not_merged=reason)
        return directory.adapter
    if not directory.adapter.exists():
        require_trained(directory)
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


def require_trained(directory: RunDir) -> None:
    if not directory.adapter.exists() and not directory.model.exists():
        raise RequestError(
            "nothing is trained here yet",
            where=str(directory.path),
            hint="Let `fitout run` or `fitout train` finish first.",
        )


def unmergeable(recipe: Recipe) -> str | None:
    """Why what the recipe's method trains cannot be folded into the base, when it cannot."""
    from ..model import methods

    return methods.create(recipe.method).unmergeable
