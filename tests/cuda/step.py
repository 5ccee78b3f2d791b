"""One step of a training on a card that is not there: `python -m tests.cuda.step JSON`, with card.cpp preloaded.

Tensors have a device, a type and a shape, and no numbers. So an operation on tensors of two devices is an error as it
is on a card, what a kernel refuses its shape function refuses, and whatever asks for a number is seen: the host would
wait for the card there. Prints what was seen, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fitout.data.pack import lay_out
from fitout.model import methods, varlen
from fitout.model.attention import NAME, register
from fitout.model.fuse import fused
from fitout.model.head import kind_of_head
from fitout.model.methods.base import raise_to_fp32, trainable
from fitout.objectives import SftSettings, create
from fitout.train import TrainSettings
from fitout.train.backend import Backend
from fitout.train.optim import make_optimizer
from fitout.train.step import train_step

CARD = torch.device("cuda", 0)
LAYERS = 3
NO_KERNEL = {  # operations that only say anew how memory is read, or reserve it
             "view", "_unsafe_view", "expand", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "permute",
             "detach", "alias", "as_strided", "split", "split_with_sizes", "lift_fresh", "empty", "empty_like",
             "new_empty", "unbind", "empty_strided", "view_as_real", "reshape", "item"}  # fmt: skip


class Watched(TorchDispatchMode):
    """Counts what runs on the card, how often the host waits for it (for a number, or for a copy that is not left to
    itself), and how often something is sent without waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        name = function.overloadpacket.__name__
        kwargs = kwargs or {}
        if name == "_local_scalar_dense" and args[0].device.type == "cuda":
            self.seen["waits"] += 1
            return 1.0
        out = function(*args, **kwargs)
        first = out[0] if isinstance(out, tuple | list) and out else out
        on_card = isinstance(first, torch.Tensor) and first.device.type == "cuda"
        given = [one for one in args if isinstance(one, torch.Tensor)]
        if name in ("_to_copy", "copy_") and given and (given[-1].device.type == "cuda") != on_card:
            at_once = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            self.seen["sent" if at_once and on_card else "waits"] += 1
        if on_card and name not in NO_KERNEL:
            self.kernels[name] += 1
        return out


def main() -> None:
    asked = json.loads(sys.argv[1])
    register()
    torch.from_numpy = torch.tensor  # which makes a tensor without numbers of an array
    torch.Tensor.pin_memory = lambda tensor: tensor
    torch.cuda.is_available = torch.cuda.is_bf16_supported = lambda *_, **__: True  # autocast asks
    varlen._tried = lambda *_: asked["dtype"] != "float32"
    dtype = getattr(torch, asked["dtype"])
    method = methods.create(TypeAdapter(methods.MethodSettings).validate_python(asked["method"]))
    config = LlamaConfig(
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, attn_implementation=NAME,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype if method.frozen_base else torch.float32)
    method.apply(model)
    raised = raise_to_fp32(trainable(model))
    backend = Backend(CARD)
    backend.compute_in(
        {"float32": "fp32", "bfloat16": "bf16"}[asked["dtype"]], autocast=raised or not method.frozen_base
    )
    layouts = [_layout(seed, asked["share"]) for seed in range(asked["micro_batches"])]
    objective, watched = create(SftSettings()), Watched()
    model.train()
    kind_of_head(model)  # tried on numbers, which there are none of later
    with fused(model) if asked["fused"] else nullcontext(), FakeTensorMode(allow_non_fake_inputs=True):
        _move(model)
        if asked.get("fault") == "left on the host":
            model.model.norm.weight = nn.Parameter(torch.ones(256, dtype=dtype), requires_grad=False)
        if asked.get("fault") == "looks at a number":
            model.model.norm.register_forward_hook(lambda *_: print(end="" if float(_[2].sum()) else "\n"))
        parameters = trainable(model)
        optimizer = make_optimizer(parameters, TrainSettings(), {})
        with watched:
            result = train_step(model, objective, layouts, list(parameters.values()), optimizer, backend, 1.0)
    moved = [p for p in parameters.values() if optimizer.state[p]]
    elsewhere = [n for n, p in model.named_parameters() if not isinstance(p, FakeTensor) or p.device != CARD]
    print(json.dumps({
        "waits": watched.seen["waits"], "sent": watched.seen["sent"], "kernels": watched.kernels.total(),
        "of": dict(watched.kernels.most_common()), "layers": LAYERS, "trained": len(parameters), "updated": len(moved),
        "elsewhere": elsewhere, "supervised": result.supervised, "expected": sum(x.supervised for x in layouts),
    }))  # fmt: skip


def _layout(seed: int, share: bool) -> Any:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(1, 1024, 96)
    ids = [np.concatenate([prompt, rng.integers(1, 1024, 40 + 9 * n)]).astype(np.int32) for n in range(4)]
    ids += [rng.integers(1, 1024, 70 + 31 * n).astype(np.int32) for n in range(3)]
    train_on = [(np.arange(len(one)) >= 60).astype(np.uint8) for one in ids]
    return lay_out(ids, train_on, range(len(ids)), share=share)


def _move(model: nn.Module) -> None:
    """Every parameter and buffer to the card, without its numbers."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device=CARD)
                module._parameters[name] = nn.Parameter(there, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CARD)


if __name__ == "__main__":
    main()
