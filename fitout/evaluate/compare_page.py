"""The page of a comparison: like the report it stands alone, with no script and nothing loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..files import size, write_json, write_text
from . import drawing
from .compare import Standing, verdict
from .page import frame, label, number, pairs, table, text
from .scores import Score

Result = Mapping[str, Any]


def write_comparison(result: Result, page: Path, file: Path) -> dict[str, Any]:
    """compare.html and compare.json, each atomically; returns what compare.json holds."""
    finite: dict[str, Any] = _finite(result)
    write_json(file, finite)
    write_text(page, render(finite))
    return finite


def _finite(value: Any) -> Any:
    """JSON knows no infinity: the loss of a rate that diverged is null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render(result: Result) -> str:
    """The whole page from what `verbs.compare` returns (or compare.json holds)."""
    sections = (_head, _picture, _standings, _failures, _differences, _rates, _scores, _settings, _how)
    return frame(f"{result['title']}: methods compared", "".join(section(result) for section in sections))


# ---------------------------------------------------------------------------------------------------------------------
# What the sections share


def in_order(result: Result) -> list[str]:
    """The methods that finished, by place, and by value where places are equal (which says nothing)."""
    first = result["task"][0]
    up = -1 if first["higher_is_better"] else 1
    return sorted(first["places"], key=lambda name: (first["places"][name], up * first["estimates"][name]["value"]))


def cost(method: Mapping[str, Any], key: str) -> float:
    """Peak memory is the largest of the seeds; everything else their mean."""
    values = [run[key] for run in method["runs"].values()]
    return max(values) if key == "memory_mb" else fmean(values)


def megabytes(value: float) -> str:
    return f"{value / 1024:,.1f} GB" if value >= 10_240 else f"{value:,.0f} MB"


def millions(value: float) -> str:
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.2f} M"


def seconds(value: float) -> str:
    if value < 120:
        return f"{value:,.1f} s"
    return f"{value / 60:,.1f} min" if value < 7200 else f"{value / 3600:,.1f} h"


def standing_words(standing: Mapping[str, Any], name: str) -> str:
    """What was shown about one method against the others."""
    better: list[str] = []
    worse: list[str] = []
    same: list[str] = []
    for pair in standing["pairs"]:
        if name in (pair["first"], pair["second"]):
            other = pair["second"] if pair["first"] == name else pair["first"]
            (better if pair["better"] == name else worse if pair["better"] else same).append(other)
    said = [f"better than {', '.join(better)}"] if better else []
    said += [f"worse than {', '.join(worse)}"] if worse else []
    said += [f"no difference shown to {', '.join(same)}"] if same else []
    return "; ".join(said)


def verdicts(task: Standing, kept: Sequence[Standing], seeds: int) -> list[str]:
    """What was shown on the task and about retention, a line each."""
    said = [f"{label(task.name)}: {verdict(task)}", *(f"Retention: {verdict(one)}" for one in kept)]
    blind = "With one seed the spread between trainings cannot be seen; take these as a first look."
    return said + ([blind] if seeds == 1 else [])


def _score(saved: Mapping[str, Any]) -> Score:
    return Score(**saved)


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _head(result: Result) -> str:
    first, methods = result["task"][0], result["methods"]
    seeds = ", ".join(map(str, result["seeds"]))
    about = (
        f"{text(', '.join(methods))} on {text(result['base'])}: {text(result['budget'])} for each, seeds {seeds}; "
        f"{text(label(first['name']))} on {first['n']:,} test questions."
    )
    cards = []
    for name in in_order(result):
        estimate, one = first["estimates"][name], methods[name]
        cards.append(
            f'<div class="figure"><div class="what">{text(name)}</div>'
            f'<div class="numbers">{estimate["value"]:.1f}</div>'
            f"<div><small>95 % interval {estimate['low']:.1f} to {estimate['high']:.1f}</small></div>"
            f"<div>{megabytes(cost(one, 'memory_mb'))}, {seconds(cost(one, 'train_seconds'))}</div>"
            f"<div><small>{text(standing_words(first, name))}</small></div></div>"
        )
    said = "".join(f"<p><strong>{text(one)}</strong></p>" for one in result["verdicts"])
    return (
        f"<h1>{text(result['title'])}: methods compared</h1>"
        f'<p class="soft">{about}</p>{said}<div class="figures">{"".join(cards)}</div>'
    )


def _picture(result: Result) -> str:
    first, methods = result["task"][0], result["methods"]
    marks = []
    for name in in_order(result):
        memory = [run["memory_mb"] for run in methods[name]["runs"].values()]
        marks.append(
            drawing.Mark(
                name,
                cost(methods[name], "memory_mb"),
                _score(first["estimates"][name]),
                list(zip(memory, first["by_seed"][name], strict=True)),
                first["places"][name] == 1,
            )
        )
    on_gpu = any(run["device"] != "cpu" for one in methods.values() for run in one["runs"].values())
    what = (
        "peak memory allocated on the GPU"
        if on_gpu
        else "peak resident memory of the process, Python and its libraries included"
    )
    base = first["base"]["value"]
    legend = (
        '<p class="soft"><span class="key-dot tuned" style="margin-left:0"></span>not shown to be worse than any other '
        '<span class="key-dot" style="margin-left:16px"></span>shown to be worse than one; small dots are seeds, '
        "whiskers 95 % intervals</p>"
    )
    return (
        f"<h2>Quality against memory</h2><p>Up and to the left is better. The base model has {base:.1f}. "
        f"Memory is the {what}, while training.</p>{legend}"
        + drawing.scatter(marks, x_name="peak memory, MB", y_name=label(first["name"]))
    )


def _standings(result: Result) -> str:
    first = result["task"][0]
    kept = result["retention"][0] if result["retention"] else None
    rows = []
    for name in in_order(result):
        one = result["methods"][name]
        trained, step = cost(one, "trained_parameters"), 1000 * cost(one, "step_seconds")
        share = 100 * trained / cost(one, "parameters")
        rows.append(
            [
                text(name),
                str(first["places"][name]),
                number(_score(first["estimates"][name])),
                _gain(first["gains"][name]),
                *([number(_score(kept["estimates"][name])), _gain(kept["gains"][name])] if kept else []),
                megabytes(cost(one, "memory_mb")),
                f"{seconds(cost(one, 'train_seconds'))}<small>{step:,.0f} ms a step</small>",
                size(cost(one, "disk_bytes")),
                f"{trained:,.0f}<small>{share:.2f} %</small>",
                f"{one['lr']:g}",
            ]
        )
    retention = ["Retention", "Change"] if kept else []
    headers = ["Method", "Place", text(label(first["name"])), "Gain over base", *retention]
    headers += ["Memory", "Training", "On disk", "Trained", "Rate"]
    return (
        "<h2>Side by side</h2><p>Place is 1 plus the number of methods shown to be better; equal places say nothing "
        "about an order. Memory is the largest of the seeds, the rest their mean; training is the time in optimizer "
        "steps alone, on disk what must be kept beside the base (for full fine-tuning, the whole model).</p>"
        + table(headers, rows, numbers=range(1, len(headers)))
        + (f"<p>Retention: {_kept_words(kept)}</p>" if kept else "")
    )


def _kept_words(kept: Mapping[str, Any]) -> str:
    what = (
        "probes that are not the task, right before and after"
        if kept["name"] == "probes"
        else "perplexity of a text that is not the task; lower is better"
    )
    return f"{what}. The base has {kept['base']['value']:.1f} (n = {kept['n']:,})."


def _gain(pair: Mapping[str, Any]) -> str:
    style = {None: "soft", pair["first"]: "better"}.get(pair["better"], "worse")
    return f'<span class="{style}">{pair["value"]:+.1f}</span><small>{pair["low"]:+.1f} to {pair["high"]:+.1f}</small>'


def _failures(result: Result) -> str:
    rows = [
        [text(name), text("every run" if what == "all" else f"seed {what}"), text(failure["reason"])]
        for name, one in result["methods"].items()
        for what, failure in one["failed"].items()
    ]
    if not rows:
        return ""
    return (
        "<h2>What could not be done</h2><p>The others went on. The same command tries these again; their last words "
        "are in logs/.</p>" + table(["Method", "What", "Reason"], rows)
    )


def _differences(result: Result) -> str:
    standings = [*result["task"], *result["retention"]]
    if not result["task"][0]["pairs"]:
        return ""
    parts = [
        "<h2>Differences</h2><p>First minus second, on the same questions. The intervals are widened for the number of "
        "pairs (Holm), so that one excludes zero exactly where a difference is shown.</p>"
    ]
    open_ones = [result["task"][0]["name"], *(one["name"] for one in result["retention"])]
    for standing in standings:
        drawn = _pairs_table(standing)
        name = text(label(standing["name"]))
        down = "" if standing["higher_is_better"] else " (lower is better)"
        if standing["name"] in open_ones:
            what = "Retention: " if standing in result["retention"] else ""
            parts.append(f"<h3>{what}{name}{down}</h3>{drawn}")
        else:
            parts.append(f"<details><summary>{name}{down}</summary>{drawn}</details>")
    return "".join(parts)


def _pairs_table(standing: Mapping[str, Any]) -> str:
    reach = max([abs(edge) for pair in standing["pairs"] for edge in (pair["low"], pair["high"])] + [1e-9])
    rows = []
    for pair in standing["pairs"]:
        better = pair["better"]
        said = f"{text(better)} is better" if better else "no difference shown"
        style = "better" if better else "soft"
        mark = "▲" if better else "○"
        rows.append(
            [
                f"{text(pair['first'])} − {text(pair['second'])}",
                f"{pair['value']:+.1f}<small>{pair['low']:+.1f} to {pair['high']:+.1f}</small>",
                drawing.span(pair["value"], pair["low"], pair["high"], reach, bool(better)),
                f"{max(pair['p'], 1e-4):.4f}" if pair["p"] >= 1e-4 else "&lt; 0.0001",
                f'<span class="verdict {style}">{mark} {said}</span>',
            ]
        )
    headers = ["Pair", "Difference", f"−{reach:.3g} to {reach:.3g}", "p (Holm)", ""]
    return table(headers, rows, numbers=(1, 3))


def _rates(result: Result) -> str:
    figures = []
    for name, one in result["methods"].items():
        if one["lr"] is None:
            continue
        tried = [(float(rate), math.inf if loss is None else loss) for rate, loss in one["rates"].items()]
        edge = " (at the edge of what was tried)" if one["at_edge"] else ""
        given = "" if tried else " (given)"
        whole = ", ".join(
            f"{rate}: {'diverged' if loss is None else f'{loss:.4f}'}" for rate, loss in one["whole"].items()
        )
        figures.append(
            f'<div class="figure"><div class="what">{text(name)}</div><div>{one["lr"]:g}{edge}{given}</div>'
            f"{drawing.rate_curve(tried, one['lr']) if tried else ''}"
            f"{f'<div><small>all steps: {whole}</small></div>' if whole else ''}</div>"
        )
    if not figures:
        return ""
    return (
        "<h2>Learning rates</h2><p>Chosen for each method by the loss on the validation part, with the first seed: "
        "all rates for a third of the steps, which favours large ones, then the best of them and those below it for "
        "all steps, until the loss gets worse. The runs that chose had no test question in their folders.</p>"
        f'<div class="figures">{"".join(figures)}</div>'
    )


def _scores(result: Result) -> str:
    standings = [*result["task"], *result["retention"]]
    rows = [["base", "", *(number(_score(one["base"])) for one in standings), ""]]
    for name in in_order(result):
        one = result["methods"][name]
        rows.append([text(name), "mean", *(number(_score(s["estimates"][name])) for s in standings), ""])
        for at, (seed, run) in enumerate(one["runs"].items()):
            loss = run["validation_loss"]
            told = "" if loss is None else f"{loss:.4f}"
            rows.append(["", seed, *(f"{s['by_seed'][name][at]:.1f}" for s in standings), told])
    headers = ["Method", "Seed", *(text(label(one["name"])) for one in standings), "Validation loss"]
    return "<h2>All scores, by seed</h2>" + table(headers, rows, numbers=range(1, len(headers)))


def _settings(result: Result) -> str:
    methods = {name: {**one["settings"], "steps": one["steps"]} for name, one in result["methods"].items()}
    data = {f"{part} samples": count for part, count in result["data"].items()}
    shared = {"base": result["base"], **data, "split_seed": result["split_seed"], **result["versions"]}
    return pairs("Settings of each method", methods, "") + pairs("The same for all", shared, "")


def _how(result: Result) -> str:
    rows = [
        [text(label(one["name"])), f"{one['n']:,}", text(one["signature"])]
        for one in [*result["task"], *result["retention"]]
    ]
    seeds = len(result["seeds"])
    spread = (
        "The spread over seeds is part of every interval."
        if seeds > 1
        else "With one seed the spread over seeds cannot be seen: the intervals speak of the questions alone."
    )
    return (
        "<h2>How it was measured</h2>"
        "<p>Every run was a process of its own on the same prepared data and split; only the seed of training "
        "changes. A method's value is the mean over its seeds. Intervals come from the bootstrap, "
        f"{result['samples']:,} resamples: questions with replacement, the same draw for all methods (so differences "
        "are paired by question), and seeds apart for each method; chance that belongs to a single answer is counted "
        "once. The standard error is multiplied by Student's t, with degrees of freedom after Satterthwaite. "
        f"{spread}</p>"
        "<p>Within each measure all pairs are tested together by Holm's procedure at 5 %; measures are not corrected "
        f"for each other. Places go by the first measure, {text(label(result['task'][0]['name']))}, which the recipe "
        "names first.</p>"
        + table(["Measure", "n", "Signature"], rows, numbers=(1,))
        + f"<h3>Again</h3><pre>{text(result['command'])}</pre>"
    )


def lines(result: Result) -> list[list[str]]:
    """The rows of the terminal's table: method, place, score, retention, memory, training, on disk, trained, rate."""
    first = result["task"][0]
    kept = result["retention"][0] if result["retention"] else None

    def interval(score: Mapping[str, Any]) -> str:
        return f"{score['value']:.1f}\n{score['low']:.1f}–{score['high']:.1f}"

    rows = []
    for name in in_order(result):
        one = result["methods"][name]
        rows.append(
            [
                name,
                str(first["places"][name]),
                interval(first["estimates"][name]),
                interval(kept["estimates"][name]) if kept else "–",
                megabytes(cost(one, "memory_mb")),
                seconds(cost(one, "train_seconds")),
                size(cost(one, "disk_bytes")),
                millions(cost(one, "trained_parameters")),
                f"{one['lr']:g}",
            ]
        )
    base = [f"{first['base']['value']:.1f}", f"{kept['base']['value']:.1f}" if kept else "–"]
    return [*rows, ["base", "", *base, "", "", "", "", ""]]
