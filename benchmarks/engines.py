"""Every engine with every method on two gloo ranks against one process: the table of docs/parallel.md.

    python -m benchmarks.engines [ENGINE:METHOD ...]

Each cell is the largest difference in gradients, losses, weights, moments and what is saved, of a step with an empty
micro-batch, a run of twelve steps and, where marked *, a run that goes from one rank to two and back. A cell that is
further off than 1e-5 ends the command. Takes some ten minutes on two cores.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from fitout.train.backend import Backend
from tests.equal.engines_worker import FIRST, TOTAL, part_of_a_run
from tests.equal.test_engines import compare, two_ranks

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp", "fsdp+offload", "zero2+offload", "zero3+offload")
METHODS = ("full", "last layer", "lora", "patterns", "pissa", "dora", "adapter", "qlora", "sparse kept")
UNDIVIDED = ("qlora", "sparse kept")  # these refuse what divides parameters


def pairs() -> list[str]:
    return [
        f"{engine}:{method}"
        for engine in ENGINES
        for method in METHODS
        if not (method in UNDIVIDED and engine.startswith(("fsdp", "zero3")))
        and ("offload" not in engine or method in ("full", "lora"))
    ]


def main() -> None:
    wanted = sys.argv[1:] or pairs()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="fitout-engines-") as name:
        folder = Path(name)
        cpu = torch.device("cpu")
        for pair in wanted:
            method, elastic = pair.split(":")[1], pair.endswith((":full", ":lora"))
            if elastic:
                part_of_a_run(folder / pair / "elastic", Backend(cpu), method, FIRST)
            two_ranks(folder, [pair])
            if elastic:
                part_of_a_run(folder / pair / "elastic", Backend(cpu), method, TOTAL)
            largest = max(compare(folder, folder / "one", pair).values())
            found[pair] = f"{largest:.0e}" + ("*" if elastic else "")
            print(f"{pair}: {found[pair]}", file=sys.stderr, flush=True)
    engines = list(dict.fromkeys(pair.split(":")[0] for pair in wanted))
    methods = list(dict.fromkeys(pair.split(":")[1] for pair in wanted))
    print(f"| | {' | '.join(engines)} |\n|---{'|---' * len(engines)}|")
    for method in methods:
        cells = [found.get(f"{engine}:{method}", "") for engine in engines]
        print(f"| {method} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
