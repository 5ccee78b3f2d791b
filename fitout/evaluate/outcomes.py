"""What finished runs answered, read back from their run directories as the statistics that `compare` works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import CheckError
from ..files import read_json, read_jsonl
from ..rundir import RunDir
from .compare import Trials
from .retention import perplexity_value
from .scores import Measure, mean_measure, measures, preferences

Runs = Mapping[str, Sequence[RunDir]]  # the finished runs of each method, one a seed


def task_trials(runs: Runs) -> list[Trials]:
    """Every score of the recipe's `evaluate.metrics` over the test questions, in that order.

    Raises CheckError when two runs were asked different questions.
    """
    asked = {name: [_answers(run) for run in each] for name, each in runs.items()}
    _same([[(row["origin"], row["reference"]) for row in rows] for rows in _flat(asked)], runs)
    report = read_json(_first(runs).evaluation_report)
    found = {name: [_measures(rows, report) for rows in each] for name, each in asked.items()}
    return [_trials({name: [one[at] for one in each] for name, each in found.items()})
            for at in range(len(_flat(found)[0]))]  # fmt: skip


def retention_trials(runs: Runs) -> list[Trials]:
    """Probes (or perplexity) of what was not trained; none where retention was not measured."""
    if not all(run.retention.exists() for run in _flat(runs)):
        return []
    asked = {name: [read_jsonl(run.retention) for run in each] for name, each in runs.items()}
    _same([[(row.get("prompt"), row.get("answer"), row.get("piece")) for row in rows] for rows in _flat(asked)], runs)
    if not _flat(asked)[0]:
        return []
    return [_trials({name: [_retention(rows) for rows in each] for name, each in asked.items()})]


def _answers(run: RunDir) -> list[dict[str, Any]]:
    return read_jsonl(run.predictions)


def _measures(rows: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> list[Measure]:
    """The measures of one run, computed from its answers as the evaluation did."""
    settings = report["settings"]
    return [
        *preferences(
            [row.get("base_scores", {}).get("preference") for row in rows],
            [row.get("tuned_scores", {}).get("preference") for row in rows],
        ),
        *measures(
            settings["metrics"],
            [row["reference"] for row in rows],
            [row["base"] for row in rows],
            [row["tuned"] for row in rows],
            prompts=[row["prompt"][-1]["content"] for row in rows],
            words=settings["words"],
            one_label_set=any(score["name"] == "macro_f1" for score in report["scores"]),
        ),
    ]


def _retention(rows: Sequence[Mapping[str, Any]]) -> Measure:
    if "base_right" in rows[0]:
        before, after = ([float(row[key]) for row in rows] for key in ("base_right", "tuned_right"))
        return mean_measure("probes", before, after, "completion begins with the answer")
    base, tuned = (
        np.asarray([[-row[key]["log_prob"], row[key]["tokens"]] for row in rows], dtype=np.float64)
        for key in ("base", "tuned")
    )
    at = np.arange(len(rows))
    return Measure("perplexity", at, base, tuned, perplexity_value, "a token", higher_is_better=False)


def _trials(found: Mapping[str, Sequence[Measure]]) -> Trials:
    """The same measure of every run."""
    first = _flat(found)[0]
    return Trials(
        name=first.name,
        by_method={name: np.stack([one.tuned for one in each]) for name, each in found.items()},
        value=first.value,
        base=first.base,
        unit=first.unit,
        higher_is_better=first.higher_is_better,
        signature=first.signature,
    )


def _same(asked: Sequence[Any], runs: Runs) -> None:
    """Pairing means nothing where the questions differ."""
    for run, one in zip(_flat(runs), asked, strict=True):
        if one != asked[0]:
            raise CheckError(
                f"this run was not asked the questions of {_first(runs).path.name}",
                where=str(run.path),
                harm="Its answers cannot be compared with the others question by question.",
                hint="Delete this run's folder and compare again; it is then made anew on the same data.",
            )


def _first(runs: Runs) -> RunDir:
    return _flat(runs)[0]


def _flat(groups: Mapping[str, Sequence[Any]]) -> list[Any]:
    return [one for each in groups.values() for one in each]
