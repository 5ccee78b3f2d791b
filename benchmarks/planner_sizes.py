"""What oneDNN keeps for each new size of a micro-batch, by how much the process grows: writes `size_mb` (`size_mb_amx`
on a processor with AMX) into fitout/plan/constants.json.

    python -m benchmarks.planner_sizes

A model of 30 M, LoRA, sizes that are multiples of 64 tokens, each new, most tokens of each trained; in bf16, and in
fp32 where oneDNN multiplies it.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import torch

from fitout.plan.machine import resident

from .planner_kept import CONSTANTS
from .work import SHAPES

LARGEST, SMALLEST, STEP = 1536, 512, 64


def main() -> None:
    from fitout.model.precision import has_amx

    constants = json.loads(CONSTANTS.read_text())
    for precision in ("fp32", "bf16"):
        command = [sys.executable, "-m", "benchmarks.planner_sizes", precision]  # a process that has kept nothing yet
        told = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        print(precision, told)
        if precision == "bf16" or told:
            constants["memory"][precision]["size_mb_amx" if has_amx() else "size_mb"] = told
    CONSTANTS.write_text(json.dumps(constants, indent=1) + "\n")


def grown(precision: str) -> float:
    """MB for each size."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.data.pack import lay_out
    from fitout.model import between, blocks, methods
    from fitout.model.attention import NAME, register
    from fitout.model.fuse import fused
    from fitout.model.memory import give_back
    from fitout.model.precision import faster_products, onednn_multiplies
    from fitout.objectives.base import token_losses

    register()
    device, low = torch.device("cpu"), precision == "bf16"
    model = LlamaForCausalLM(LlamaConfig(**SHAPES["30m"], tie_word_embeddings=True, attn_implementation=NAME))
    model = model.to(torch.bfloat16) if low else model
    methods.create(methods.LoraSettings(rank=16)).apply(model)
    model.train()

    noise = np.random.default_rng(0)

    def compute(tokens: int) -> None:
        lengths = [min(256, tokens - at) for at in range(0, tokens, 256)]
        ids = [np.arange(1, n + 1, dtype=np.int32) for n in lengths]
        train_on = [(noise.random(n) < 0.83).astype(np.uint8) for n in lengths]
        loss, _ = token_losses(model, lay_out(ids, train_on, range(len(ids))))
        loss.backward()
        model.zero_grad(set_to_none=True)

    sizes = list(range(SMALLEST, LARGEST, STEP))
    random.Random(0).shuffle(sizes)
    with blocks.reused(device), faster_products(device), fused(model), between.using(between.best(device)):
        if not (low or onednn_multiplies()):
            return 0.0
        for _ in range(3):
            compute(LARGEST)
        give_back(device)  # else what is kept stands in memory that was free before
        before = resident()
        for tokens in sizes:
            compute(tokens)
        give_back(device)
        return round((resident() - before) / len(sizes) / 2**20, 2)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(grown(sys.argv[1]))
    else:
        main()
