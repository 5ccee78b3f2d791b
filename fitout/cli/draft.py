"""`fitout init`: a commented recipe for a model and a data file."""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import RequestError
from ..files import write_text

RATES = {"lora": "2e-4", "full": "2e-5"}
METHODS = {"lora": "{kind: lora, rank: 8, alpha: 32, targets: all-linear}", "full": "{kind: full}"}


def write_recipe(data: Path, model: str, method: str, to: Path) -> None:
    """Looks at the data and writes a recipe that fits it. Refuses to overwrite one."""
    from ..config import load
    from ..data import SourceSettings
    from ..data.formats import detect
    from ..data.readers import RawRow
    from ..data.sources import read

    if method not in METHODS:
        raise RequestError(f"--method {method!r} is not one of {', '.join(METHODS)}")
    if to.exists():
        raise RequestError("this file exists already", where=str(to), hint="Choose another with --to.")
    rows = [r.row for _, r in zip(range(100), read(SourceSettings(path=str(data)), Path()), strict=False)
            if isinstance(r, RawRow)]  # fmt: skip
    found = detect(rows, None, where=str(data))
    objective = "pretrain" if found.name == "text" else "sft"
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in data.stem).strip("-._") or "my-run"
    write_text(to, _text(name, data.resolve(), found.name, model, method, objective))
    try:
        load(to)
    except RequestError:
        to.unlink()
        raise


def _text(name: str, data: Path, form: str, model: str, method: str, objective: str) -> str:
    return f"""# Written by `fitout init`. Keys left out have defaults; `fitout data check` looks at the data first.
name: {name}                      # the run goes into runs/{name}

model:
  base: {json.dumps(model, ensure_ascii=False)}                   # a folder, a hub id (owner/name), or embedded:shell

data:
  sources:
    - path: {json.dumps(str(data), ensure_ascii=False)}    # read as {form}; `split: test` makes a file the test set
  split: {{train: 0.8, validation: 0.1, test: 0.1}}
  max_length: 1024                # tokens; what is longer is dropped and counted (too_long: truncate cuts it)

method: {METHODS[method]}         # lora trains a few percent and is merged afterwards; full trains everything
objective: {{kind: {objective}}}

train:
  epochs: 3
  lr: {RATES[method]}
  batch_size: 16                  # examples a step; micro-batches are sized by themselves
  precision: auto                 # bf16 where it pays, else fp32

evaluate:
  metrics: [exact_match, f1, rouge, bleu]
  retention: default              # a text file or probes (.jsonl) of your own show what is forgotten

export:
  merge: true                     # merged/ is a plain Hugging Face folder, checked against the adapter
"""
