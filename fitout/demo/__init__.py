"""The embedded default: a small, really pretrained base model, a small messy data set, and the code that made both.

Here live the miniature world (`world`), the text that tells it (`corpus`), the tokenizer (`tokenizer`), the instruction
data (`instructions`, `data/`), the retention probes (`recall`), the recipes, and `make`, which writes them all again.
How a model is trained, evaluated or served lives elsewhere: the demo only supplies what it is done with.
"""

from __future__ import annotations

from pathlib import Path

from ..files import read_jsonl

HERE = Path(__file__).parent
SHELL = HERE / "shell"  # the base model, `embedded:shell`
DATA = HERE / "data"
RECIPE = HERE / "demo.yaml"  # what `fitout demo` runs


def probes() -> list[dict[str, str]]:
    """The retention probes of `embedded:shell`: rows of {prompt, answer, group}."""
    return read_jsonl(DATA / "probes.jsonl")
