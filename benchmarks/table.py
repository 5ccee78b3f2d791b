"""Writes the tables in README.md and in docs/methods.md from results/*.json: `python -m benchmarks.table`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from .chart import curves, speeds
from .crash import told

HERE = Path(__file__).parent
README, DOCS = HERE / "README.md", HERE.parent / "docs"
METHODS, SPEED, RELIABILITY = DOCS / "methods.md", DOCS / "speed.md", DOCS / "reliability.md"
REAL = "real-input.json"  # written by real_input.py; the others by against_trl.py and planner.py
CRASH, FAULTS, POWER, FLIPS = "crash.json", "disk-faults.json", "disk-power.json", "disk-flips.json"
LONG, LAUNCHERS = "long.json", "launchers.json"
NAMES = {
    "fitout": "Fitout", "trl default": "TRL, default", "trl best": "TRL, best effort",
    "trl best onednn": "TRL, best effort, fp32 by oneDNN", "trainer best": "transformers Trainer, best effort",
    "llama-factory default": "LLaMA-Factory, default", "llama-factory best": "LLaMA-Factory, best effort",
    "torchtune default": "torchtune, default", "torchtune best": "torchtune, best effort",
}  # fmt: skip
PREPARED = {
    "fitout plain": "Fitout, what the others do too", "fitout": "Fitout, with cleaning, duplicates, split, report",
    "trl": "TRL", "llama-factory": "LLaMA-Factory", "tokenizer": "the tokenizer alone",
}  # fmt: skip
DATA = {
    "alpaca": "Alpaca rows", "gsm8k": "GSM8K rows", "blocks": "full blocks of 1,024",
    "shared": "eight answers a prompt", "pairs": "both answers of preference pairs",
    "dpo": "preference pairs, DPO", "lengths": "rows of Alpaca lengths", "words": "full blocks",
}  # fmt: skip


def main() -> None:
    results = {path.name: json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))}
    real = results.pop(REAL, None)
    lost = {name: results.pop(name) for name in (CRASH, FAULTS, POWER, FLIPS, LONG, LAUNCHERS) if name in results}
    compared = [results.pop(name) for name in [*results] if name.startswith("compare-")]  # as `fitout compare` wrote it
    full = [result for result in results.values() if not result["quick"]]
    trained = [result for result in full if "kind" not in result]
    _put("table", [_drawn("speed", speeds(_bars(trained))), *(_section(result) for result in trained)])
    _put("scaling", [part for result in full if result.get("kind") == "scaling" for part in _scaling(result)])
    _put("preparing", [_preparing(result) for result in full if result.get("kind") == "preparing"])
    _put("real input", [_real_input(real)] if real else [])
    _put("survival", [_survival(lost)] if lost else [], RELIABILITY)
    _put("planner", [_planner(result) for result in full if result.get("kind") == "planner"])
    _put("memory", [_memory(result) for result in full if result.get("kind") == "memory"], SPEED)
    _put("attention", [_attention(result) for result in full if result.get("kind") == "attention"], SPEED)
    _put("between", [_between(result) for result in full if result.get("kind") == "between"], SPEED)
    _put("products", [_products(result) for result in full if result.get("kind") == "products"], SPEED)
    _put("shared input", [_stacked(r) for r in full if r.get("kind") == "shared input"], SPEED)
    _put("serving", [_serving(result) for result in full if result.get("kind") == "serving"], SPEED)
    _put("compare", [_compared(result) for result in compared], METHODS)


def _put(name: str, parts: list[str], page: Path = README) -> None:
    """Puts `parts` between the markers of that name."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = page.read_text().split(begin)
    after = rest.split(end)[1]
    text = "\n\n".join(parts or ["No full run yet."])
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


def _compared(result: dict[str, Any]) -> str:
    from fitout.evaluate.compare_page import lines
    from fitout.evaluate.page import label

    first, kept = result["task"][0], result["retention"][:1]
    what = "kept" if all(one["higher_is_better"] for one in kept) else "perplexity of another text"
    head = ["", "place", f"{label(first['name'])} [95 %]", f"{what} [95 %]", "peak memory", "training", "on disk",
            "trained", "rate"]  # fmt: skip
    rows = [[cell.replace("\n", " [") + "]" * ("\n" in cell) for cell in row] for row in lines(result)]
    return "\n".join([
        f"**{result['title']}**: {result['base'].rpartition('/')[2]}, {result['budget']} for each, "
        f"{len(result['seeds'])} seeds, {first['n']} questions; torch {result['versions']['torch']}.\n",
        f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows), "",
        *(f"- {sentence}" for sentence in result["verdicts"]),
    ])  # fmt: skip


def _section(result: dict[str, Any]) -> str:
    machine, work = result["machine"], result["work"]
    rounds = result["rounds"]
    head = (
        f"### {work['shape']['parameters'] / 1e6:.1f} M parameters, {result['method']}, "
        f"{DATA[result['data']]}, {result['precision']}\n\n"
        f"{len(rounds)} rounds of {result['steps']} steps ({result['warmup']} of them warm-up), "
        f"{machine.get('gpu') or machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, trl {machine['trl']}, peft {machine['peft']}; {machine['when']}.\n"
        f"The peers' best: `{result['trl_best']}`.{_others(result.get('elsewhere', {}))}{_of_peak(rounds)}\n\n"
        "| | supervised tok/s | all tok/s | Fitout is | peak memory | Fitout takes "
        "| start to first step | Fitout takes | largest loss gap |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(_row(result, side) for side in NAMES if side in rounds[0])])


def _others(elsewhere: dict[str, dict[str, str]]) -> str:
    """The packages of the other environments."""
    return "".join(
        f" The environment of {peer}: {', '.join(f'{name} {number}' for name, number in versions.items())}."
        for peer, versions in elsewhere.items()
    )


def _of_peak(rounds: list[dict[str, Any]]) -> str:
    """The products of Fitout's training against the machine's own, and what that leaves to be had against each peer: a
    step that is nothing but these products cannot be faster."""
    runs = [run["fitout"] for run in rounds if "matmul_peak" in run["fitout"]]
    if not runs:
        return ""
    share = median(run["flops_per_second"] / run["matmul_peak"] for run in runs)
    peak = median(run["matmul_peak"] for run in runs) / 1e9
    key, told = "supervised_tokens_per_second", []
    for side in ("trl best", "trainer best"):
        if side in rounds[0]:
            most = median(run["fitout"][key] / run[side][key] for run in rounds) / share
            told.append(f"{most:.1f} times {NAMES[side].split(',')[0]}'s")
    return (
        f" Fitout's whole steps ran at {100 * share:.0f} % of the {peak:,.0f} GFLOP/s of products of these sizes; "
        f"nothing but these products would be {' and '.join(told)} speed."
    )


def _drawn(name: str, picture: str) -> str:
    """A picture in a file beside the JSON, and the line that shows it."""
    (HERE / "results" / f"{name}.svg").write_text(picture)
    return f"![{name}](results/{name}.svg)"


def _bars(results: list[dict[str, Any]]) -> list[tuple[str, str, list[float]]]:
    """(work, peer, ratios of the rounds) of every side that trained the same."""
    key = "supervised_tokens_per_second"
    bars = []
    for result in results:
        size = result["work"]["shape"]["parameters"] / 1e6
        machine = result["machine"]
        processor = (machine.get("gpu") or machine["processor"]).split("(")[0].strip()
        work = f"{size:.0f} M, {result['method']}, {DATA[result['data']]}, {result['precision']} ({processor})"
        for side in NAMES:
            if side in result["parity"] and result["parity"][side]["same_training"]:
                bars.append((work, NAMES[side], [r["fitout"][key] / r[side][key] for r in result["rounds"]]))
    return bars


def _scaling(result: dict[str, Any]) -> list[str]:
    """A picture and a table: by block length and by rank, Fitout and transformers' Trainer."""
    machine, peer = result["machine"], "trainer best"
    panels: list[tuple[str, str, dict[str, list[tuple[float, float]]]]] = []
    rows = []
    for what, points in result["curves"].items():
        unit = {"length": "tokens a block", "rank": "rank"}[what]
        for key, title in (("tokens_per_second", "tokens a second"), ("peak_memory_mb", "peak memory, MB")):
            panels.append((title, unit, {
                name: [(point[what], median(run[side][key] for run in point["rounds"])) for point in points]
                for name, side in (("Fitout", "fitout"), ("Trainer", peer))
            }))  # fmt: skip
        for point in points:
            if not point["parity"]["same_training"]:
                rows.append(f"| {unit} {point[what]:,} | different training | | | |")
                continue
            speed, memory = (
                [[run[side][key] for run in point["rounds"]] for side in ("fitout", peer)]
                for key in ("tokens_per_second", "peak_memory_mb")
            )
            ratios = [a / b for a, b in zip(*speed, strict=True)]
            rows.append(
                f"| {unit} {point[what]:,} | {median(speed[0]):,.0f} | {median(speed[1]):,.0f} "
                f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"| {median(memory[0]):,.0f} | {median(memory[1]):,.0f} |"
            )
    head = (
        f"{result['shape']}, lora, {result['precision']}, {machine['processor']}, {machine['cores']} cores, "
        f"torch {machine['torch']}; {machine['when']}. {len(points[0]['rounds'])} rounds of {result['steps']} steps."
    )
    columns = "| | Fitout, tok/s | Trainer, tok/s | Fitout is, times | Fitout, MB | Trainer, MB |"
    return [head, _drawn("scaling", curves(panels)), _lines(columns, rows)]


def _preparing(result: dict[str, Any]) -> str:
    machine, rows = result["machine"], []
    for count, runs in result["points"].items():
        bare = median(run["seconds"] for run in runs["tokenizer"]) if "tokenizer" in runs else None
        for side, name in PREPARED.items():
            if side not in runs:
                continue
            whole, work, cpu, memory = (
                median(run[key] for run in runs[side]) for key in ("process_s", "seconds", "cpu_s", "peak_memory_mb")
            )
            share = f"{100 * bare / work:.0f} %" if bare and side.startswith("fitout") else ""
            seconds = [f"{value:,.1f} s" for value in (whole, work, cpu)]
            cells = [f"{int(count):,}", name, *seconds, f"{memory:,.0f} MB", share]
            rows.append(f"| {' | '.join(cells)} |")
    columns = "| rows | | process, start to end | preparation | processor time | peak memory | tokenizer's share |"
    head = (
        f"{machine['processor']}, {machine['cores']} cores, trl {machine['trl']}, transformers "
        f"{machine['transformers']}; {machine['when']}."
    )
    return head + "\n\n" + _lines(columns, rows)


def _memory(result: dict[str, Any]) -> str:
    machine, heads, key = result["machine"], result["head"], "tokens_per_second"
    kept = [run[key] for run in result["recompute"]["0.0"]]
    rows = []
    for share, runs in result["recompute"].items():
        ratios = [run[key] / own for run, own in zip(runs, kept, strict=True)]
        rows.append(
            f"| {100 * float(share):.0f} % | {median(run['peak_memory_mb'] for run in runs):,.0f} MB "
            f"| {median(run[key] for run in runs):,.0f} "
            f"| {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    head = "\n".join(
        f"- {name}: {heads[way]['memory_mb']:,} MB, {heads[way]['seconds']:.1f} s, loss {heads[way]['loss']:.2f}"
        for way, name in (("whole", "all logits at once"), ("chunks", "in chunks"))
    )
    return (
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; {machine['when']}.\n\n"
        "A Gemma 2 head (soft-capped, 256,000 tokens, 64 wide) on 1,500 supervised rows, forward and backward:\n\n"
        f"{head}\n\nLoRA on 30 M parameters, micro-batches of 4,096 tokens, by the share of layers recomputed:\n\n"
        + _lines("| layers recomputed | peak memory | tok/s | of the speed without |", rows)
    )


def _planner(result: dict[str, Any]) -> str:
    """Errors of all configurations, and by method and precision."""
    machine, rows = result["machine"], result["rows"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["name"], row["train"]["precision"])):
        groups.setdefault(f"{row['name']} {row['train']['precision']}", []).append(row)
    lines = [
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"transformers {machine['transformers']}; {machine['when']}, seed {result['seed']}.\n",
        "| | configurations | memory off by, median | 9 of 10 within | within 10 % "
        "| time off by, median | 9 of 10 within | within 20 % |\n|---|---|---|---|---|---|---|---|",
        _errors("all", rows),
        *(_errors(name, some) for name, some in groups.items()),
    ]
    return "\n".join(lines)


def _errors(name: str, rows: list[dict[str, Any]]) -> str:
    cells = [name, str(len(rows))]
    for key, target in (("peak_mb", 0.10), ("step_seconds", 0.20)):
        sizes = sorted(abs(row["predicted"][key] / row["measured"][key] - 1) for row in rows if row["measured"][key])
        if not sizes:
            cells += ["-"] * 3
            continue
        within = sum(size <= target for size in sizes)
        nine = sizes[ceil(0.9 * len(sizes)) - 1]
        cells += [f"{100 * median(sizes):.0f} %", f"{100 * nine:.0f} %", f"{within} of {len(sizes)}"]
    return f"| {' | '.join(cells)} |"


def _row(result: dict[str, Any], side: str) -> str:
    runs = [r[side] for r in result["rounds"]]
    ours = [r["fitout"] for r in result["rounds"]]
    name = NAMES[side]
    parity = result["parity"].get(side)
    if parity and not parity["same_training"]:
        return f"| {name} | different training | | | | | | | {parity['largest_gap']:.1e} |"

    def mid(key: str) -> float:
        return median(run[key] for run in runs)

    def ratio(key: str, unit: str = "") -> str:
        values = [a[key] / b[key] for a, b in zip(ours, runs, strict=True)]
        return f"{median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})" if parity else ""

    return (
        f"| {name} | {mid('supervised_tokens_per_second'):,.0f} | {mid('tokens_per_second'):,.0f} "
        f"| {ratio('supervised_tokens_per_second', ' times')} "
        f"| {mid('peak_memory_mb'):,.0f} MB | {ratio('peak_memory_mb')} "
        f"| {mid('start_to_first_step_s'):.1f} s | {ratio('start_to_first_step_s')} "
        f"| {format(parity['largest_gap'], '.1e') if parity else ''} |"
    )


def _attention(result: dict[str, Any]) -> str:
    """Milliseconds by our own code, and how many times as long PyTorch takes for the documents one by one."""
    machine, points = result["machine"], result["points"]
    kinds = list(dict.fromkeys((p["heads"], p["key_heads"], p["width"], p["type"]) for p in points))
    cells: dict[str, list[str]] = {}
    for point in points:
        ms, what = point["ms"], f"{point['tokens'] // point['length']} x {point['length']:,}"
        cells.setdefault(what, []).append(f"{ms['ours']:.1f} ms, {ms['pytorch'] / ms['ours']:.1f}")
    rows = [f"| {what} | {' | '.join(its)} |" for what, its in cells.items()]
    head = " | ".join(f"{heads}/{keys} heads of {width}, {kind}" for heads, keys, width, kind in kinds)
    title = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; {machine['when']}."
    return f"{title}\n\n{_lines(f'| documents x tokens | {head} |', rows)}"


def _between(result: dict[str, Any]) -> str:
    """Milliseconds written out of PyTorch's operations, in native code, compiled."""
    machine, points = result["machine"], result["points"]
    parts = [what for what in next(iter(points.values())) if what != "compile_s"]
    rows = [f"| {what} | {' | '.join(_three(point[what]) for point in points.values())} |" for what in parts]
    seconds = ", ".join(f"{kind} {point['compile_s']:.0f} s" for kind, point in points.items())
    title = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; {machine['when']}."
    head = f"| written, native, compiled, in ms | {' | '.join(points)} |"
    return f"{title} Until compiled: {seconds}.\n\n{_lines(head, rows)}"


def _three(ms: dict[str, float]) -> str:
    return ", ".join(f"{ms[form]:.2f}" for form in ("written", "native", "compiled"))


def _products(result: dict[str, Any]) -> str:
    """GFLOP/s of the three products of a layer."""
    machine, rows = result["machine"], []
    for point in result["points"]:
        rates = [" / ".join(f"{rate}" for rate in each.values()) for each in point["gflops"].values()]
        errors = [f"{point['largest_error'][side]:.0e}" for side in ("pytorch, fp32", "fitout, fp32")]
        what = f"{point['tokens']:,} x {point['from']:,} to {point['to']:,}"
        rows.append(f"| {what} | {' | '.join(rates)} | {' / '.join(errors)} |")
    title = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; {machine['when']}."
    title += " A training asks oneDNN here." if result["onednn"] else " A training asks what PyTorch asks here."
    head = "| x W^T / g W / g^T x in GFLOP/s | PyTorch, fp32 | a training, fp32 | bf16 | error PyTorch / training |"
    return f"{title}\n\n{_lines(head, rows)}"


def _stacked(result: dict[str, Any]) -> str:
    machine = result["machine"]
    rows = []
    for name, seconds in result["points"].items():
        apart, stacked, plain = (seconds[kind] for kind in ("apart", "stacked", "plain"))
        times = " | ".join(f"{1000 * one:.1f} ms" for one in (apart, stacked, plain))
        rows.append(f"| {name} | {times} | {apart / stacked:.2f} |")
    head = f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; {machine['when']}."
    table = _lines("| layers, fp32 | apart | stacked | without LoRA | stacking is, times |", rows)
    return f"{head}\n\n{table}"


def _serving(result: dict[str, Any]) -> str:
    machine, rows = result["machine"], []
    for row in result["rows"]:
        both = [row[way] for way in ("at once", "one after the other")]
        speeds, waits = (
            " | ".join(f"{one[key]:,.{places}f}" for one in both)
            for key, places in (("tokens_per_second", 0), ("seconds_an_answer", 1))
        )
        middle, low, high = row["ratio"]
        rows.append(f"| {row['clients']} | {speeds} | {middle:.2f} ({low:.2f} to {high:.2f}) | {waits} |")
    rounds = len(result["rows"][0]["rounds"]["at once"])
    head = (
        f"{result['shape']}, fp32, answers of {result['new_tokens']} tokens, {rounds} rounds; "
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}; {machine['when']}."
    )
    table = _lines(
        "| clients | tokens/s, at once | one after the other | times | seconds an answer, at once | one by one |",
        rows,
    )
    return f"{head}\n\n{table}"


# survival


def _survival(results: dict[str, Any]) -> str:
    rows = [row for name, result in results.items() for row in SURVIVED[name](result)]
    machines = {name: result["machine"] for name, result in results.items()}
    last = max(machines.values(), key=lambda machine: machine["when"])
    head = f"{last['processor']}, torch {last['torch']}; the last of them {last['when']}."
    return head + "\n\n" + _lines("| what happens | trials | survived | command |", rows)


def _kills(result: dict[str, Any]) -> Iterable[str]:
    names = {
        "fitout": "Fitout",
        "fitout aside": "Fitout, saving by a thread as on a GPU",
        "trainer": "transformers' Trainer",
    }
    for side, name in ((side, names[side]) for side in result["sides"]):
        trials = result["sides"][side]["trials"]
        into_saves = sum(trial["in_save"] for trial in trials)
        kills = f"{len(trials)} kills, {into_saves} of them into a save"
        yield f"| `kill -9`, {name} | {kills} | {told(trials)} | `python -m benchmarks.crash` |"


def _failed(result: dict[str, Any]) -> Iterable[str]:
    trials = result["trials"]
    passed = sum(not trial["problems"] for trial in trials)
    yield (
        f"| a file operation fails (no space, I/O error, short write) | {len(trials)} spread over "
        f"{result['operations']} operations | {passed} | `python -m benchmarks.disk.faults` |"
    )


def _unpowered(result: dict[str, Any]) -> Iterable[str]:
    starts = result["starts"]
    yield (
        f"| the power goes: what was not synced is lost or out of order | {result['states']} states over "
        f"{result['operations']} operations | {result['states'] - len(result['failures'])}; {starts['ended well']} of "
        f"{starts['tried']} that were run on ended bit-equal | `python -m benchmarks.disk.power` |"
    )


def _flipped(result: dict[str, Any]) -> Iterable[str]:
    passed = result["trials"] - len(result["failures"])
    yield f"| a bit flips or a file is cut | {result['trials']} | {passed} | `python -m benchmarks.disk.flips` |"


def _went_long(result: dict[str, Any]) -> Iterable[str]:
    stood = result["checkpoint_seconds"]
    yield (
        f"| a long run | {result['steps']:,} steps, {result['checkpoints_written']:,} checkpoints, "
        f"{result['seconds'] / 60:.0f} minutes | memory {result['slope_mb_per_1000_steps']:+.3f} MB per 1,000 steps "
        f"({result['mb_first']:.0f} to {result['mb_last']:.0f} MB); open files {result['open_files_first']} to "
        f"{result['open_files_last']}; {result['checkpoints_kept_at_most']} checkpoints at most; a save "
        f"{stood['median'] * 1000:.0f} ms in the middle; stopped in {result['stop_seconds']} s, "
        f"{result['steps_behind']} steps behind | `python -m benchmarks.long` |"
    )


def _launched(result: dict[str, Any]) -> Iterable[str]:
    found = result["launchers"]
    yield (
        f"| started by {', '.join(f'`{name}`' for name in found)} | {len(found)}, on two ranks | "
        f"{sum(one['ranks'] == 2 for one in found.values())}; losses of one process within "
        f"{max(one['loss'] for one in found.values()):.0e} | `python -m benchmarks.launchers` |"
    )


SURVIVED = {CRASH: _kills, FAULTS: _failed, POWER: _unpowered, FLIPS: _flipped, LONG: _went_long,
            LAUNCHERS: _launched}  # fmt: skip


# real input


def _real_input(result: dict[str, Any]) -> str:
    machine, cases = result["machine"], result["cases"]
    checks = [held for case in cases.values() for held in case["checks"].values()]
    head = (
        f"{machine['processor']}, {machine['threads']} thread(s), torch {machine['torch']}, transformers "
        f"{machine['transformers']}, peft {machine['peft']}; {machine['when']}. "
        f"{sum(checks)} of {len(checks)} checks held."
    )
    rows = _lines(
        "| run | rows read | kept | removed | quarantined |",
        (_counted(name, case["rows"]) for name, case in cases.items()),
    )
    gains = _lines(
        "| run | steps | validation loss | token F1 | ROUGE-L | perplexity of another text | time |",
        (_gained(name, case) for name, case in cases.items()),
    )
    files = _lines(
        "| run | folder | compared with | largest difference of logits | relative | same likeliest token |",
        (_judged(name, case["plain"]) for name, case in cases.items()),
    )
    kills = _lines(
        "| run | killed after step | went on from | same weights (SHA-256) | same losses |",
        (_killed(name, kill) for name, case in cases.items() for kill in case["kills"]),
    )
    return "\n\n".join([head, rows, gains, files, kills])


def _lines(head: str, rows: Iterable[str]) -> str:
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])


def _counted(name: str, rows: dict[str, Any]) -> str:
    def reasons(counts: dict[str, int]) -> str:
        return ", ".join(f"{count:,} {why}" for why, count in counts.items()) or "0"

    kept = " + ".join(f"{rows['kept'][part]:,}" for part in ("train", "validation", "test"))
    return f"| {name} | {rows['read']:,} | {kept} | {reasons(rows['removed'])} | {reasons(rows['quarantined'])} |"


def _gained(name: str, case: dict[str, Any]) -> str:
    def pair(score: dict[str, Any] | None) -> str:
        return f"{score['base']:.1f} -> {score['tuned']:.1f}" if score else "-"

    training, scores = case["training"], case["scores"]
    return (
        f"| {name} | {training['steps']} | {training['base_loss']:.2f} -> {training['best_loss']:.2f} "
        f"| {pair(scores.get('f1'))} | {pair(scores.get('rougeL'))} | {pair(case['retention']['perplexity'])} "
        f"| {case['seconds']:.0f} s |"
    )


def _judged(name: str, plain: dict[str, Any]) -> str:
    if plain["against"] == "base":
        return f"| {name} | `{plain['folder']}/` | loads whole, no tensor missing | | | |"
    return (
        f"| {name} | `{plain['folder']}/` | {plain['against']} in peft | {plain['max_abs']:.1e} "
        f"| {plain['max_relative']:.1e} | {100 * plain['same_argmax']:.2f} % |"
    )


def _killed(name: str, kill: dict[str, Any]) -> str:
    came_back = ", ".join(map(str, kill["went_on_from"]))
    weights = f"yes, `{kill['sha256'][:12]}`" if kill["same_weights"] else "NO"
    return f"| {name} | {kill['killed_at']} | {came_back} | {weights} | {'yes' if kill['same_losses'] else 'NO'} |"


if __name__ == "__main__":
    main()
