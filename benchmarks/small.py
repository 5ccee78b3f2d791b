"""A small run of the real command line, for those who disturb it, and what they write down."""

from __future__ import annotations

import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def recipe(name: str, method: str, train: str) -> str:
    """LoRA on the embedded model, on its own questions; `method` and `train` are more of these sections."""
    return f"""\
name: {name}
model: {{base: "embedded:shell"}}
data:
  sources: [{{path: "{ROOT}/fitout/demo/data/questions.json"}}]
  split: {{train: 0.8, validation: 0.1, test: 0.1}}
  max_length: 128
method: {{kind: lora, {method}}}
train: {{batch_size: 8, precision: fp32, {train}}}
evaluate: {{metrics: [exact_match], retention: "off", max_new_tokens: 4, limit: 8}}
export: {{merge: false}}
"""


def environment(threads: int = 1, **more: str) -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT), **more,
    }  # fmt: skip


def machine(threads: int) -> dict[str, Any]:
    with open("/proc/cpuinfo") as info:
        name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    packages = ("torch", "transformers", "peft")
    when = time.strftime("%Y-%m-%d %H:%M")
    return {"processor": name, "threads": threads, "when": when, **{p: version(p) for p in packages}}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
