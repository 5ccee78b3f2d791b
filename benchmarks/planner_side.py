"""One measured training, a process of its own: `python -m benchmarks.planner_side FOLDER OUT`; and the maker of bases.

FOLDER holds recipe.yaml, rows.jsonl and base/. The peak is the kernel's ru_maxrss of this process; what it holds after
the imports, before anything is loaded, is told apart. `python -m benchmarks.planner_side make JOBS` writes the folders.
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stopwatch:
    """A listener that notes how long each step took, and the memory peak so far."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self.loaded = 0.0

    def start(self, info: dict[str, Any]) -> None:
        self.loaded = peak_mb()

    def row(self, row: dict[str, Any]) -> None:
        if "event" not in row:
            self.seconds.append(row["tokens"] / row["tokens_per_second"])
            self.peaks.append(peak_mb())

    def close(self) -> None: ...


def measure(folder: Path, out: Path) -> None:
    import torch
    import transformers  # noqa: F401

    from fitout import config, verbs
    from fitout.plan.machine import Others
    from fitout.train import loop  # noqa: F401
    from fitout.verbs import planning

    planning.LONG = 0  # forecast as a training of hours is
    base = peak_mb()
    watch = Stopwatch()
    start, clock = time.time(), Others()
    recipe = config.load(folder / "recipe.yaml")
    run = verbs.train(recipe, out=folder / "run", screen=verbs.Screen(listeners=lambda: [watch]))
    wall = time.time() - start
    others = clock.cores()
    status = run.read_status()
    out.write_text(
        json.dumps(
            {
                "imports_mb": round(base),
                "loaded_mb": round(watch.loaded),
                "step_mb": round(watch.peaks[-1]),
                "peak_mb": round(peak_mb()),
                "seconds": [round(s, 5) for s in watch.seconds],
                "whole_seconds": round(wall, 2),
                "others": round(others, 3),  # cores that something else kept busy meanwhile
                "threads": torch.get_num_threads(),
                "plan": status["plan"],
                "trained": status["training"]["trained_parameters"],
                "parameters": status["training"]["parameters"],
            }
        )
    )


def make(jobs: Path) -> None:
    """Random bases, their rows and recipes, for each job of a JSON list."""
    import numpy as np
    import torch
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.model.load import SHELL

    for job in json.loads(jobs.read_text()):
        folder = Path(job["folder"])
        folder.mkdir(parents=True)
        torch.manual_seed(job["seed"])
        LlamaForCausalLM(LlamaConfig(**job["shape"], max_position_embeddings=2048)).save_pretrained(folder / "base")
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(SHELL / name, folder / "base")
        rng = np.random.default_rng(job["seed"])
        words = ["the", "river", "of", "seven", "stones", "runs", "under", "old", "bridges", "to", "a", "quiet", "sea"]
        with open(folder / "rows.jsonl", "w") as file:
            for _ in range(job["rows"]):
                count = int(np.clip(rng.lognormal(np.log(job["words"]), 0.5), 4, job["max_words"]))
                said = [words[i] for i in rng.integers(0, len(words), count)]
                cut = max(1, int(count * rng.uniform(0.2, 0.6)))
                row = {"instruction": " ".join(said[:cut]), "output": " ".join(said[cut:]) or "yes"}
                file.write(json.dumps(row) + "\n")
        (folder / "recipe.yaml").write_text(yaml.safe_dump(job["recipe"], sort_keys=False))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
    else:
        measure(Path(sys.argv[1]), Path(sys.argv[2]))
