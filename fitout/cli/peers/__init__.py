"""`fitout init --from`: a recipe from a LLaMA-Factory or an Axolotl configuration.

Every key of the other file is carried over, is without meaning here, or is named with the reason it could not be
carried. Where the other tool's default differs from ours, it is written out.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from ...errors import RequestError
from ...files import write_text
from .axolotl import from_axolotl
from .common import Carried, read_yaml
from .llama_factory import from_llama_factory

__all__ = ["Carried", "carry_over", "write_carried"]


def carry_over(path: Path) -> Carried:
    """Reads the configuration and turns it into a recipe's values. Raises RequestError when it is neither tool's."""
    raw = read_yaml(path)
    if "base_model" in raw:
        return from_axolotl(raw, path)
    if "model_name_or_path" in raw or "finetuning_type" in raw:
        return from_llama_factory(raw, path)
    raise RequestError(
        "neither a LLaMA-Factory nor an Axolotl configuration",
        where=str(path),
        hint="The first has model_name_or_path, the second base_model.",
    )


def write_carried(path: Path, to: Path) -> Carried:
    """The recipe of a configuration, with what was left out as comments; it loads, or nothing is written."""
    from ...config import build

    carried = carry_over(path)
    head = [f"From {path.name} ({carried.tool}), by fitout init --from."]
    head += carried.notes
    head += [f"not carried over: {key}: {value} - {why}" for key, value, why in carried.left]
    if carried.needless:
        head.append(f"without meaning here: {', '.join(carried.needless)}")
    build(carried.recipe, where=str(path))
    text = "".join(f"# {' '.join(line.split())}\n" for line in head)
    write_text(to, text + "\n" + yaml.safe_dump(carried.recipe, sort_keys=False, allow_unicode=True))
    return carried
