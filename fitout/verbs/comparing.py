"""The same budget for each method, and what was shown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Recipe, build
from ..errors import FitoutError, RequestError
from ..files import read_json
from ..rundir import RunDir
from .evaluating import check_retention
from .preparing import split_seed
from .working import Screen, run_directory, versions


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
    from ..evaluate.compare_page import write_comparison
    from ..trials import Trials, parse_budget, parse_rates

    screen = screen or Screen()
    kinds = _kinds(methods)
    rates = parse_rates(lrs, kinds)
    allowed = parse_budget(budget) if budget else None
    _require_one_process()
    check_retention(recipe)
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
    from ..model.methods import METHODS

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
    than its budget; the rate is each method's own; nothing is merged. Repairs that were accepted for the recipe's own
    run hold for all."""
    own = run_directory(recipe, None).repairs
    repairs = recipe.data.repairs or (str(own.resolve()) if own.exists() else None)
    train: dict[str, Any] = {"lr": None, "patience": None, "listeners": []}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"split_seed": split_seed(recipe), "repairs": repairs}),
            "train": recipe.train.model_copy(update=train),
            "export": recipe.export.model_copy(update={"merge": False}),
        }
    )


def _entry(recipe: Recipe, kind: str, rates: list[float] | None, screen: Screen) -> Any:
    """A method with its settings: the recipe's own where it is the recipe's kind; else the kind's defaults, with what
    the recipe sets under keys that mean the same (rank, targets) carried over."""
    from ..trials import Entry

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
    return Entry(kind, settings.model_dump(mode="json"), settings.default_lr * recipe.objective.pace, rates)


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
    from ..data.store import Prepared
    from .planning import batches_of, total_steps

    if budget and budget.kind == "minutes":
        return None
    if budget and budget.kind == "steps":
        return int(budget.amount)
    part = Prepared(prepared.data, "").part("train")
    batches = batches_of(recipe, part)
    if not budget:
        return total_steps(recipe, batches)
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
    from ..evaluate.compare import compare
    from ..evaluate.compare_page import verdicts
    from ..evaluate.outcomes import retention_trials, task_trials

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
        "split_seed": split_seed(recipe),
        "methods": raced,
        "task": [one.as_dict() for one in task],
        "retention": [one.as_dict() for one in kept],
        "verdicts": verdicts(task[0], kept, len(seeds)),
        "samples": samples,
        "versions": versions(),
    }
