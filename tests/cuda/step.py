"""Steps of trainings on a card that is not there: `python -m tests.cuda.step JSON`, with card.cpp preloaded.

Tensors have a device, a type and a shape, and no numbers. So an operation on tensors of two devices is an error as it
is on a card, what a kernel refuses its shape function refuses, and whatever asks for a number is seen: the host would
wait for the card there. JSON is a list of what to train; for each, prints a line of JSON with what was seen.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fitout.data.pack import lay_out
from fitout.model import methods, varlen
from fitout.model.attention import NAME, register
from fitout.model.fuse import fused
from fitout.model.head import kind_of_head
from fitout.model.load import load_base
from fitout.model.methods.base import raise_to_fp32, trainable
from fitout.objectives import ObjectiveSettings, create
from fitout.train import TrainSettings
from fitout.train.backend import Backend
from fitout.train.optim import make_optimizer
from fitout.train.step import train_step

CARD = torch.device("cuda", 0)
LAYERS = 3
PAIRS = np.array([[0, 1], [2, 3], [4, 5]])  # of the samples of a layout
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
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
    register()
    torch.from_numpy = torch.tensor  # which makes a tensor without numbers of an array
    torch.Tensor.pin_memory = lambda tensor: tensor
    for asked in json.loads(sys.argv[1]):
        try:
            print(json.dumps(_step(**asked)), flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


def _step(
    method: dict[str, Any],
    family: str = "llama",
    dtype: str = "bfloat16",
    share: bool = True,
    micro_batches: int = 2,
    fault: str | None = None,
    objective: str = "sft",
) -> dict[str, Any]:
    kind, config = getattr(torch, dtype), CONFIG_MAPPING[family](
        vocab_size=1024, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, tie_word_embeddings=False, sliding_window=50, attn_implementation=NAME,
    )  # fmt: skip
    chosen = methods.create(TypeAdapter(methods.MethodSettings).validate_python(method))
    model: Any = AutoModelForCausalLM.from_config(config).to(kind if chosen.frozen_base else torch.float32)
    if method["kind"] == "qlora":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = load_base(folder, dtype=kind, packed=True, extra=chosen.load_kwargs(kind) | {"device_map": None})
    chosen.apply(model)
    raised = raise_to_fp32(trainable(model))
    layouts = [_layout(seed, share, 7 if objective == "sft" else PAIRS.size) for seed in range(micro_batches)]
    if objective != "sft":
        layouts = [replace(x, preferences=PAIRS, references=np.full(PAIRS.shape, -90.0)) for x in layouts]
    minimised = create(TypeAdapter(ObjectiveSettings).validate_python({"kind": objective}))
    watched = Watched()
    model.train()
    kind_of_head(model)  # tried on numbers, which there are none of later
    with ExitStack() as until:
        for where, name in ((torch.cuda, "is_available"), (torch.cuda, "is_bf16_supported")):  # autocast asks
            until.enter_context(patch.object(where, name, lambda *_, **__: True))
        until.enter_context(patch.object(varlen, "_tried", lambda *_: kind in varlen.DTYPES))
        backend = Backend(CARD)
        backend.compute_in(PRECISIONS[dtype], autocast=raised or not chosen.frozen_base)
        until.enter_context(fused(model))
        until.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        _move(model)
        if fault == "left on the host":
            model.model.norm.weight = nn.Parameter(torch.ones(256, dtype=kind), requires_grad=False)
        if fault == "looks at a number":
            model.model.norm.register_forward_hook(_look)
        parameters = trainable(model)
        optimizer = make_optimizer(parameters, TrainSettings(), {})
        with watched:
            result = train_step(model, minimised, layouts, list(parameters.values()), optimizer, backend, 1.0)
    elsewhere = [n for n, p in model.named_parameters() if not isinstance(p, FakeTensor) or p.device != CARD]
    return {
        "waits": watched.seen["waits"], "sent": watched.seen["sent"], "kernels": watched.kernels.total(),
        "of": dict(watched.kernels.most_common()), "layers": LAYERS, "trained": len(parameters),
        "updated": sum(bool(optimizer.state[p]) for p in parameters.values()), "elsewhere": elsewhere,
        "supervised": result.supervised, "expected": sum(x.supervised for x in layouts),
    }  # fmt: skip


def _look(module: nn.Module, given: Any, out: torch.Tensor) -> None:
    float(out.sum())


def _layout(seed: int, share: bool, samples: int) -> Any:
    rng = np.random.default_rng(seed)
    prompt = rng.integers(1, 1024, 96)
    ids = [np.concatenate([prompt, rng.integers(1, 1024, 40 + 9 * n)]).astype(np.int32) for n in range(4)]
    ids += [rng.integers(1, 1024, 70 + 31 * n).astype(np.int32) for n in range(samples - 4)]
    train_on = [(np.arange(len(one)) >= 60).astype(np.uint8) for one in ids]
    return lay_out(ids, train_on, range(len(ids)), share=share)


def _move(model: nn.Module) -> None:
    """Every parameter and buffer to the card, without its numbers; with 4-bit weights also their scales."""

    def there(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=CARD)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(there(parameter), requires_grad=parameter.requires_grad)
                if (state := getattr(parameter, "quant_state", None)) is not None:
                    for part in filter(None, (state, state.state2)):
                        tensors = {key: there(x) for key, x in vars(part).items() if isinstance(x, torch.Tensor)}
                        vars(part).update(tensors)
                    moved.quant_state = state
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(buffer)


if __name__ == "__main__":
    main()
