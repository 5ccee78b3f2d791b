"""Writes the table in README.md from results/*.json: `python -m benchmarks.table`."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def main() -> None:
    results = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    parts = [_section(result) for result in results if not result["quick"]]
    readme = HERE / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(before + BEGIN + "\n\n" + "\n\n".join(parts or ["No full run yet."]) + "\n\n" + END + after)


def _section(result: dict[str, Any]) -> str:
    machine, work = result["machine"], result["work"]
    rounds = result["rounds"]
    head = (
        f"### {work['shape']['parameters'] / 1e6:.1f} M parameters, {result['precision']}\n\n"
        f"{len(rounds)} rounds of {result['steps']} steps ({result['warmup']} of them warm-up), "
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, trl {machine['trl']}, peft {machine['peft']}; {machine['when']}.\n"
        f"TRL best: `{result['trl_best']}`.\n\n"
        "| | supervised tok/s | all tok/s | Fitout is | peak memory | Fitout takes "
        "| start to first step | Fitout takes | largest loss gap |\n|---|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *(_row(result, side) for side in ("fitout", "trl default", "trl best"))])


def _row(result: dict[str, Any], side: str) -> str:
    runs = [r[side] for r in result["rounds"]]
    ours = [r["fitout"] for r in result["rounds"]]
    name = {"fitout": "Fitout", "trl default": "TRL, default", "trl best": "TRL, best effort"}[side]
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


if __name__ == "__main__":
    main()
