"""The report as one HTML page that stands alone: no script, nothing loaded, everything from outside escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import drawing
from .retention import RetentionResult
from .scores import Comparison, Score
from .suite import EvaluationResult

EXAMPLES = 6  # shown of each kind
CHANGES = 12  # forgotten or gained probes shown
CLIP = 700  # characters of a text shown

LABELS = {
    "preference": "Prefers the chosen answer",
    "exact_match": "Exact match",
    "accuracy": "Accuracy",
    "macro_f1": "Macro-F1",
    "f1": "Token F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "probes": "All probes",
    "perplexity": "Perplexity",
}

STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5a6570; --line: #dde2e7; --ground: #fff; --raised: #f5f7f9;
  --base: #8a6d3b; --tuned: #1264a3; --good: #1a7340; --bad: #b3261e; --right: #e3f1e7; --wrong: #f9e7e5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b0; --line: #333b43; --ground: #14181c; --raised: #1d2329; --base: #d1a75c;
    --tuned: #62b0ec; --good: #63c98c; --bad: #f2867d; --right: #1b3325; --wrong: #3b2220; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.55 system-ui, -apple-system, "Segoe UI",
  "Noto Sans", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.25; margin: 0 0 6px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 52px 0 6px; padding-top: 14px; border-top: 1px solid var(--line); }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 6px 0 12px; max-width: 76ch; }
.soft, small, caption { color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 14px; margin: 26px 0 12px; }
.figure { background: var(--raised); border-radius: 10px; padding: 16px 18px; }
.figure .what { color: var(--soft); font-size: 13px; }
.figure .numbers { font-size: 30px; font-weight: 650; letter-spacing: -.02em; font-variant-numeric: tabular-nums; }
.figure .numbers .from { color: var(--soft); font-weight: 450; }
.wide { overflow-x: auto; margin-bottom: 18px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
th { font-size: 12.5px; font-weight: 600; color: var(--soft); white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.number small { display: block; font-size: 12px; }
td.name { font-weight: 600; min-width: 110px; overflow-wrap: break-word; }
table.pairs { width: auto; }
td.key { color: var(--soft); white-space: nowrap; vertical-align: top; }
td.value { overflow-wrap: anywhere; }
.better { color: var(--good); }
.worse { color: var(--bad); }
.verdict { white-space: nowrap; font-size: 13px; }
svg { display: block; }
svg text { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .whisker { stroke-width: 2.5; stroke-linecap: round; opacity: .55; }
svg .whisker.base { stroke: var(--base); }
svg .whisker.tuned { stroke: var(--tuned); }
svg .dot.base { fill: var(--ground); stroke: var(--base); stroke-width: 2; }
svg .dot.tuned { fill: var(--tuned); }
svg .seed.base { fill: var(--base); opacity: .45; }
svg .seed.tuned { fill: var(--tuned); opacity: .45; }
svg .zero { stroke: var(--soft); stroke-width: 1; }
svg text.mark { fill: var(--ink); font-size: 13px; font-weight: 600; }
svg .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
svg .curve.base { stroke: var(--base); }
svg .curve.tuned { stroke: var(--tuned); }
svg.chart { width: 100%; height: auto; max-width: 860px; }
.key-dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; border: 2px solid var(--base);
  margin-right: 5px; }
.key-dot.tuned { background: var(--tuned); border-color: var(--tuned); margin-left: 16px; }
article { border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; margin: 10px 0; break-inside: avoid; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 10px 16px; margin: 8px 0; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; }
.label { font-size: 12px; color: var(--soft); display: block; }
.answer { border-radius: 6px; padding: 6px 9px; background: var(--raised); }
.answer.right { background: var(--right); }
.answer.wrong { background: var(--wrong); }
details { margin: 10px 0; }
summary { cursor: pointer; font-weight: 600; }
ul.notes { padding-left: 20px; max-width: 80ch; }
ul.notes li { margin: 4px 0; }
pre { background: var(--raised); border-radius: 8px; padding: 12px 14px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, "Cascadia Mono", Menlo, Consolas, "Noto Sans Mono", monospace; }
@media print {
  body { font-size: 11px; }
  main { max-width: none; padding: 0; }
  h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
  tr, .figure { break-inside: avoid; }
  .figure, .answer, pre { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def render(
    result: EvaluationResult,
    *,
    title: str,
    recipe: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    data_counts: Mapping[str, Any],
    command: str,
) -> str:
    """The whole page."""
    body = "".join(
        [
            _head(result, title),
            _gain(result),
            _by_group(result),
            _retention(result.retention),
            _loss(log),
            _examples(result),
            _counts(result),
            pairs("Data", data_counts, "What became of the rows before training."),
            pairs("Recipe", recipe, ""),
            _method(result, command),
        ]
    )
    return frame(title, body)


def frame(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML."""
    # The policy makes a browser refuse scripts and outside addresses, should an escape ever be forgotten.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Words and numbers

# Control characters cannot be seen and have no place in HTML: shown as their Unicode pictures.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


def text(value: Any) -> str:
    """Anything as escaped text."""
    return escape(str(value).translate(_PICTURES).encode("utf-8", "replace").decode("utf-8"))


def label(name: str) -> str:
    """The field's name of a score."""
    if name.startswith("bleu:"):
        return f"BLEU (tok:{name.removeprefix('bleu:')})"
    return LABELS.get(name, name)


def signed(score: Score) -> tuple[str, str, str]:
    """A difference and its bounds, each with its sign and one digit, more where a bound that is not zero would read as
    zero; what rounds to nothing is +0.0, never -0.0."""
    nearest = min(abs(score.low), abs(score.high)) if score.low > 0 or score.high < 0 else 1.0
    digits = next((digits for digits in (1, 2, 3) if round(nearest, digits)), 4)
    value, low, high = (f"{round(x, digits) + 0.0:+.{digits}f}" for x in (score.value, score.low, score.high))
    return value, low, high


def number(score: Score) -> str:
    return f"{score.value:.1f}<small>{score.low:.1f} to {score.high:.1f}</small>"


def _change(score: Score) -> str:
    value, low, high = signed(score)
    return f"{value}<small>{low} to {high}</small>"


def _verdict(comparison: Comparison) -> str:
    mark, style = {"better": ("▲", "better"), "worse": ("▼", "worse")}.get(comparison.verdict, ("○", "soft"))
    return f'<span class="verdict {style}">{mark} {comparison.verdict}</span>'


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of escaped cells; the columns in `numbers` are set to the right, the first one is the row's name."""
    style = ['class="number"' if at in numbers else ('class="name"' if at == 0 else "") for at in range(len(headers))]
    head = "".join(f"<th {style[at] if at else ''}>{cell}</th>" for at, cell in enumerate(headers))
    body = "".join(
        "<tr>" + "".join(f"<td {style[at]}>{cell}</td>" for at, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _clip(value: str) -> str:
    if len(value) <= CLIP:
        return text(value)
    return f'{text(value[:CLIP])}<span class="soft"> … {len(value) - CLIP:,} more characters</span>'


LEGEND = '<p class="soft"><span class="key-dot"></span>base <span class="key-dot tuned"></span>tuned</p>'


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _head(result: EvaluationResult, title: str) -> str:
    counts = result.counts
    figures = []
    if result.scores:
        named = {score.name: score for score in result.scores}
        main = named.get("preference") or named.get(result.reading or "") or result.scores[0]
        figures.append(_figure(main, f"{label(main.name)}, {counts['asked']:,} questions"))
    kept = result.retention
    if kept and kept.overall:
        figures.append(_figure(kept.overall, f"Retention, {kept.overall.base.n:,} probes that are not the task"))
    if kept and kept.perplexity:
        figures.append(
            _figure(kept.perplexity, f"Perplexity, {kept.tokens:,} tokens that are not the task (lower is better)")
        )
    notes = "".join(f"<li>{text(note)}</li>" for note in [*result.notes, *(kept.notes if kept else [])])
    return (
        f"<h1>{text(title)}</h1>"
        '<p class="soft">The base model and the tuned one, asked the same questions of the test split.</p>'
        f'<div class="figures">{"".join(figures)}</div>' + (f'<ul class="notes soft">{notes}</ul>' if notes else "")
    )


def _figure(comparison: Comparison, what: str) -> str:
    change, low, high = signed(comparison.difference)
    return (
        f'<div class="figure"><div class="what">{text(what)}</div><div class="numbers">'
        f'<span class="from">{comparison.base.value:.1f} →</span> {comparison.tuned.value:.1f}</div>'
        f"<div>{_verdict(comparison)} <small>{change}, 95 % interval {low} to {high}</small>"
        "</div></div>"
    )


def _gain(result: EvaluationResult) -> str:
    if not result.scores:
        return ""
    headers = ["Score", "n", "Base", "Tuned", "Difference", "", "0 to 100"]
    return (
        "<h2>What was gained</h2>"
        "<p>On a scale of 0 to 100, with 95 % intervals. The difference is paired: the models are compared row by row. "
        "Where its interval holds zero, no difference was shown.</p>"
        + LEGEND
        + table(headers, [_score_row(label(score.name), score) for score in result.scores], numbers=(1, 2, 3, 4))
    )


def _score_row(name: str, score: Comparison) -> list[str]:
    return [
        text(name),
        f"{score.base.n:,}",
        number(score.base),
        number(score.tuned),
        _change(score.difference),
        _verdict(score),
        drawing.dots(score),
    ]


def _by_group(result: EvaluationResult) -> str:
    parts = []
    for dimension, groups in result.groups.items():
        names = [score.name for score in result.scores if score.name not in ("rouge1", "rouge2")]  # to fit the page
        rows = []
        for group, scores in groups.items():
            found = {score.name: score for score in scores}
            first = found.get(names[0])
            if first is None:
                continue
            others = [
                f"{found[name].base.value:.1f} → {found[name].tuned.value:.1f}" if name in found else "–"
                for name in names[1:]
            ]
            cells = [text(group), f"{first.base.n:,}", number(first.base), number(first.tuned)]
            rows.append([*cells, _change(first.difference), drawing.dots(first, width=100), *others])
        main = text(label(names[0]))
        headers = [
            dimension.capitalize(),
            "n",
            f"{main}, base",
            "tuned",
            "difference",
            "0 to 100",
            *map(label, names[1:]),
        ]
        parts.append(table(headers, rows, numbers=(1, 2, 3, 4, *range(6, len(headers)))))
        if unlisted := len(groups) - len(rows):
            parts.append(f'<p class="soft">{unlisted} groups have no {main}; see report.json.</p>')
    about = "<p>The other scores as base → tuned; all of them, with intervals, are in report.json.</p>"
    return "<h2>By group</h2>" + about + LEGEND + "".join(parts) if parts else ""


def _retention(kept: RetentionResult | None) -> str:
    if kept is None:
        return ""
    parts = ["<h2>What was kept, what was forgotten</h2>"]
    if kept.overall:
        parts.append(
            f"<p>Texts to continue that are not the task, from {text(kept.source)}. A probe is right when the greedy "
            "continuation begins with the answer.</p>"
        )
        rows = [_score_row(group, score) for group, score in kept.groups.items()]
        if len(rows) > 1:
            rows.append(_score_row(label("probes"), kept.overall))
        headers = ["Probes", "n", "Base", "Tuned", "Difference", "", "0 to 100"]
        parts.append(LEGEND + table(headers, rows, numbers=(1, 2, 3, 4)))
        parts.append(_changes("Forgotten", kept.forgotten))
        parts.append(_changes("Gained", kept.gained))
    if kept.perplexity:
        score = kept.perplexity
        rows = [[label(score.name), f"{score.base.n:,}", f"{kept.tokens:,}", number(score.base), number(score.tuned)]]
        rows[0] += [_change(score.difference), _verdict(score)]
        parts.append(f"<p>How well the text {text(kept.source)} is predicted; lower is better.</p>")
        headers = ["", "pieces", "tokens", "Base", "Tuned", "Difference", ""]
        parts.append(table(headers, rows, numbers=(1, 2, 3, 4, 5)))
    return "".join(parts)


def _changes(title: str, rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return f'<p class="soft">{title}: none.</p>'
    shown = _spread(rows, CHANGES)
    cells = [[text(row[key]) for key in ("group", "prompt", "answer", "base", "tuned")] for row in shown]
    more = "" if len(shown) == len(rows) else f' <span class="soft">({len(shown)} shown; all are in report.json)</span>'
    shown_rows = table(["Group", "Prompt", "Answer", "Base went on", "Tuned went on"], cells)
    return f"<h3>{title}: {len(rows):,}{more}</h3>{shown_rows}"


def _loss(log: Sequence[Mapping[str, Any]]) -> str:
    training, validation, broken = drawing.curves(log)
    if not training and not validation:
        return ""
    _, width = drawing.thin(training)
    facts = []
    if training:
        facts.append(f"{len(training):,} steps" + (f", each point the mean of {width}" if width > 1 else ""))
    if validation:
        step, best = min(validation, key=lambda point: point[1])
        facts.append(f"lowest validation loss {best:.4f} at step {step:g}")
    if broken:
        facts.append(f"values that are not finite numbers, not drawn: {broken}")
    legend = '<p class="soft"><span class="key-dot"></span>training <span class="key-dot tuned"></span>validation</p>'
    drawn = f"<h2>Loss</h2><p>{text('; '.join(facts))}.</p>{legend}{drawing.chart(training, validation, 'loss')}"
    return drawn + _reward(log)


def _reward(log: Sequence[Mapping[str, Any]]) -> str:
    """Curves of an objective on pairs: how often the chosen answer has the greater reward, and by how much."""
    drawn = ""
    for name, heading in (("reward_accuracy", "Reward accuracy"), ("reward_margin", "Reward margin")):
        training, validation = drawing.figure_curves(log, name)
        if training or validation:
            drawn += f"<h3>{heading}</h3>{drawing.chart(training, validation, heading.lower())}"
    return drawn


def _examples(result: EvaluationResult) -> str:
    if not result.rows or result.reading is None:
        return ""
    kinds = sort_examples(result.rows, result.reading)
    sorted_by = text(label(result.reading))
    parts = [
        "<h2>Examples</h2>",
        f"<p>Sorted by {sorted_by}: {len(kinds['fixed']):,} better, {len(kinds['broken']):,} worse, "
        f"{len(kinds['still wrong']):,} not right and not changed, {len(kinds['right in both']):,} right in both. "
        "All rows are in predictions.jsonl.</p>",
    ]
    by_degree = result.reading not in ("accuracy", "exact_match")  # a better overlap is not yet a right answer
    titles = {
        "fixed": "Better" if by_degree else "Fixed",
        "broken": "Worse" if by_degree else "Broken",
        "still wrong": "Not right, not changed" if by_degree else "Still wrong",
    }
    for kind, title in titles.items():
        rows = kinds[kind]
        articles = "".join(_article(row, result.reading) for row in _spread(rows, EXAMPLES))
        parts.append(f"<h3>{title}: {len(rows):,}</h3>{articles}")
    return "".join(parts)


def sort_examples(rows: Sequence[dict], reading: str) -> dict[str, list[dict]]:
    """Rows by what tuning did to one score of theirs, the largest change first."""
    kinds: dict[str, list[dict]] = {"fixed": [], "broken": [], "still wrong": [], "right in both": []}

    def gain(row: dict) -> float:
        return row["tuned_scores"][reading] - row["base_scores"][reading]

    for row in sorted(rows, key=lambda row: -abs(gain(row))):
        if gain(row):
            kinds["fixed" if gain(row) > 0 else "broken"].append(row)
        else:
            kinds["right in both" if row["tuned_scores"][reading] == 100 else "still wrong"].append(row)
    return kinds


def _spread(rows: Sequence[Any], most: int) -> list[Any]:
    """At most so many rows, evenly from the first to the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[at * (len(rows) - 1) // (most - 1)] for at in range(most)]


def _article(row: Mapping[str, Any], reading: str) -> str:
    turns = row["prompt"]
    prompt = "".join(
        f'<div class="said" dir="auto"><span class="label">{text(turn["role"])}</span>{_clip(turn["content"])}</div>'
        for turn in turns
    )
    cells = [_answer("reference", row["reference"], "")]
    for model in ("base", "tuned"):
        score = row[f"{model}_scores"][reading]
        style = "right" if score == 100 else ("wrong" if score == 0 else "")
        cells.append(_answer(f"{model}, {label(reading)} {score:.0f}", row[model], style))
    task = f"{text(row['task'])}, " if row.get("task") else ""
    return (
        f'<article>{prompt}<div class="columns">{"".join(cells)}</div>'
        f"<small>{task}{text(row['origin'])}</small></article>"
    )


def _answer(head: str, answer: str, style: str) -> str:
    said = _clip(answer) if answer.strip() else '<span class="soft">(empty)</span>'
    return f'<div><span class="label">{text(head)}</span><div class="answer said {style}" dir="auto">{said}</div></div>'


def _counts(result: EvaluationResult) -> str:
    counts = result.counts
    rows = [["conversations in the test split", f"{counts['conversations']:,}"]]
    rows += [[f"skipped: {text(reason)}", f"{number:,}"] for reason, number in counts["skipped"].items()]
    if counts["beyond_limit"]:
        rows.append(["left out by evaluate.limit", f"{counts['beyond_limit']:,}"])
    rows.append(["asked", f"{counts['asked']:,}"])
    ends = {
        "stop": "ended by themselves",
        "length": "ran into the token limit",
        "choice": "chosen among labels",
        "error": "not asked",
    }
    heads = ["", "answers", *ends.values(), "empty", "seconds"]
    models = []
    for model in ("base", "tuned"):
        of = counts[model]
        reasons = [f"{of['finish_reasons'].get(reason, 0):,}" for reason in ends]
        models.append([model, f"{counts['asked']:,}", *reasons, f"{of['empty']:,}", f"{of['seconds']:,.1f}"])
    return (
        "<h2>What was counted</h2>"
        + table(["", "rows"], rows, numbers=(1,))
        + table(heads, models, numbers=range(1, len(heads)))
    )


def pairs(title: str, values: Mapping[str, Any], about: str) -> str:
    rows = "".join(
        f'<tr><td class="key">{text(key)}</td><td class="value">{text(value)}</td></tr>' for key, value in _flat(values)
    )
    intro = f"<p>{about}</p>" if about else ""
    return f'<h2>{title}</h2>{intro}<table class="pairs"><tbody>{rows}</tbody></table>' if rows else ""


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{key}.")
        else:
            rows.append((f"{before}{key}", ", ".join(map(str, value)) if isinstance(value, list | tuple) else value))
    return rows


def _method(result: EvaluationResult, command: str) -> str:
    scores = list(result.scores)
    if result.retention:
        scores += [score for score in (result.retention.overall, result.retention.perplexity) if score]
    rows = [[text(label(score.name)), text(score.signature), text(score.interval)] for score in scores]
    settings = result.settings
    return (
        "<h2>How it was measured</h2>"
        "<p>Greedy answers to the turns before the last supervised assistant turn, scored against that turn; of "
        "labels, the likeliest. An empty answer scores zero. Intervals: percentile bootstrap, "
        f"{settings['samples']:,} resamples of rows, seed {settings['seed']}; where all rows score alike, resampling "
        "can only repeat them, and the exact binomial bound for a share not seen in n rows is given instead.</p>"
        + (table(["Score", "Signature", "Interval"], rows) if rows else "")
        + f"<h3>Again</h3><pre>{text(command)}</pre>"
    )
