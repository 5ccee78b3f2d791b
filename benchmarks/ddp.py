"""Our sum of gradients after the last micro-batch, and torch's DistributedDataParallel: same numbers? which is faster?

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.ddp

A Llama of 19 M parameters in fp32 (or --lora: 0.6 M of it trained), micro-batches of 256 tokens, two a rank and step.
Steps of both kinds in turn; medians.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import ExitStack

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from fitout.data.pack import lay_out
from fitout.model.fuse import fused
from fitout.model.methods import FullSettings, LoraSettings, create
from fitout.objectives import SftSettings
from fitout.objectives import create as create_objective
from fitout.train.backend import Backend
from fitout.train.engines.divided import Computed
from tests.conftest import tiny_llama

ROUNDS, MICRO_BATCHES = 7, 2
UNTIL_THE_END = ExitStack()


def model_of(lora: bool):
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.model.attention import NAME

    tiny_llama()  # registers the attention
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=6, tie_word_embeddings=False, attn_implementation=NAME,
        )
    )  # fmt: skip
    method = create(LoraSettings(rank=16) if lora else FullSettings())
    method.apply(model)
    UNTIL_THE_END.enter_context(fused(model))
    return model


def main() -> None:
    backend, lora = Backend(torch.device("cpu")), "--lora" in sys.argv
    objective = create_objective(SftSettings())
    generator = np.random.default_rng(backend.rank)
    ids = [generator.integers(1, 8192, 256).astype(np.int32) for _ in range(MICRO_BATCHES)]
    layouts = [lay_out([one], [np.ones(256, np.uint8)], [0], share=False) for one in ids]
    (total,) = backend.sum(objective.units(layouts))
    ours, theirs = model_of(lora), model_of(lora)
    wrapped = DistributedDataParallel(Computed(theirs, objective, backend.compute))

    def sum_after() -> None:
        for layout in layouts:
            backend.backward(objective.loss(ours, layout, total))
        backend.sum_gradients(p for p in ours.parameters() if p.requires_grad)

    def wrapper() -> None:
        with wrapped.no_sync():
            for layout in layouts[:-1]:
                wrapped(layout, total).backward()
        (wrapped(layouts[-1], total) * 1.0).backward()

    seconds: dict[str, list[float]] = {"ours": [], "DDP": []}
    for _ in range(ROUNDS):
        for name, model, step in (("ours", ours, sum_after), ("DDP", theirs, wrapper)):
            model.zero_grad()
            backend.barrier()
            start = time.perf_counter()
            step()
            backend.barrier()
            seconds[name].append(time.perf_counter() - start)
    far = max(
        float((a.grad - b.grad * backend.ranks).abs().max())  # DDP takes the mean over ranks
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
        if a.requires_grad
    )
    if backend.main:
        trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
        print(f"{trained:,} trained; largest difference of gradients {far:.1e}")
        for name, all_of in seconds.items():
            rest = all_of[1:]  # the first warms up
            print(f"{name:5} {statistics.median(rest):.3f} s a step ({min(rest):.3f} to {max(rest):.3f})")
    backend.close()


if __name__ == "__main__":
    main()
