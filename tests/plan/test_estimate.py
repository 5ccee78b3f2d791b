"""The plan's arithmetic against independent truths: saved tensors of running models, ZeRO's paper, known claims."""

from __future__ import annotations

import contextlib
import tempfile

import numpy as np
import pytest
import torch

from benchmarks.planner_kept import Made
from fitout.layout import Layout, Segment
from fitout.model import methods
from fitout.model.load import load_base
from fitout.model.methods import (
    AdapterSettings,
    DoraSettings,
    FullSettings,
    LoraSettings,
    QloraSettings,
    SparseSettings,
    cost,
)
from fitout.model.shape import shape_of
from fitout.objectives.base import token_losses
from fitout.plan.estimate import MB, Setup, base_bytes, kept_bytes, layer_bytes, memory, seconds, sharded
from fitout.plan.machine import CARDS, GIB
from fitout.plan.work import MicroBatch, Work, in_steps

SIZES = {"hidden_size": 40, "intermediate_size": 72, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "vocab_size": 53}  # fmt: skip
LLAMA_13B = shape_of(
    {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
     "num_attention_heads": 40, "vocab_size": 32000}
)  # fmt: skip


def saved_bytes(settings, precision: str, layers: int, tokens: int) -> int:
    """What is there between forward and backward, in all storages; parameters left out."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.model.attention import NAME, register
    from fitout.model.fuse import fused

    register()
    method = methods.create(settings)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=layers, attn_implementation=NAME))
    frozen = method.frozen_base
    dtype = torch.bfloat16 if frozen and precision == "bf16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:  # 4-bit weights are made while loading
        model.save_pretrained(folder)
        model = load_base(folder, dtype=dtype, extra=method.load_kwargs(dtype))
    method.apply(model)
    method.begin(model, iter)
    model.train()
    first = Segment(0, 20)
    layout = Layout(
        np.arange(tokens) % 53, np.r_[np.arange(20), np.arange(tokens - 20)], (first, Segment(20, tokens)),
        np.arange(3), np.arange(3), np.ones(3, np.float32), np.zeros(3, np.int64),
    )  # fmt: skip
    casting = not frozen and precision == "bf16"
    autocast = torch.autocast("cpu", torch.bfloat16) if casting else contextlib.nullcontext()
    with fused(model), autocast, Made(model) as made:
        losses = token_losses(model, layout)
        alive = made.alive()
    del losses
    return alive


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "settings",
    [
        FullSettings(), LoraSettings(rank=3),
        LoraSettings(rank=3, targets=["q_proj", "v_proj", "down_proj"]), LoraSettings(rank=2, init="pissa"),
        DoraSettings(rank=3), DoraSettings(rank=3, targets=["o_proj", "gate_proj"]), QloraSettings(rank=3),
        QloraSettings(rank=3, dora=True, targets=["q_proj", "down_proj"]),
        AdapterSettings(style="pfeiffer", reduction=4),
        AdapterSettings(style="houlsby", reduction=4, activation="silu"),
        AdapterSettings(style="parallel", reduction=8, scale=2), SparseSettings(density=0.02, select="random"),
        SparseSettings(density=0.05, select="random", targets=["q_proj", "down_proj"]),
    ],
    ids=lambda settings: f"{settings.kind} {settings.model_dump(exclude_defaults=True, exclude={'kind'})}",
)  # fmt: skip
def test_what_a_layer_keeps_is_what_autograd_saves(settings, precision):
    """Exactly, for each token, for a shape the constants were not read from. After a change of what the forward keeps:
    python -m benchmarks.planner_kept."""
    shape = shape_of({"model_type": "llama", **SIZES, "num_hidden_layers": 1})
    each = [
        (saved_bytes(settings, precision, 4, tokens) - saved_bytes(settings, precision, 2, tokens)) / 2
        for tokens in (64, 128)
    ]  # of a layer; the first keeps less where nothing before it is trained
    predicted = layer_bytes(shape, settings.cost(shape), Setup(precision))
    assert predicted == pytest.approx((each[1] - each[0]) / 64, rel=1e-6)
    once = each[0] - 64 * predicted  # copies of weights, norms, factors: small
    weights = shape.layer_weights * (2 if settings.kind == "full" and precision == "bf16" else 0)
    assert 0 <= once - weights < 4 * (settings.cost(shape).trained + 4 * 396)


def test_what_is_there_while_entries_are_chosen_by_their_gradients():
    """At the end of the second backward: each weight's gradient, and the sum of its scores from the first."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from fitout.model.attention import NAME, register

    register()
    config = LlamaConfig(**SIZES, num_hidden_layers=3, attn_implementation=NAME)
    settings, there = SparseSettings(density=0.01), []
    method, model = methods.create(settings), LlamaForCausalLM(config)
    method.apply(model)
    layout = Layout(
        np.arange(9), np.arange(9), (Segment(0, 9),), np.arange(3), np.arange(3), np.ones(3, np.float32),
        np.zeros(3, np.int64),
    )  # fmt: skip

    def gradients():
        for _ in range(2):
            token_losses(model, layout)[0].backward()
            there.append(made.alive())
            yield

    with Made(model) as made:
        method.begin(model, gradients)
    shape, work = shape_of(config.to_dict()), in_steps(MicroBatch(9, 3, (9,), 45), 2)
    scored = settings.cost(shape).scored
    assert there[1] - there[0] == 4 * scored and there[1] == pytest.approx(8 * scored, rel=0.02)
    chooses, drawn = (memory(shape, SparseSettings(select=how).cost(shape), Setup("fp32"), work).moments
                      for how in ("gradient", "random"))  # fmt: skip
    assert {f"a {what} that chooses" for what in ("forward", "backward")} == {*chooses} - {*drawn}
    trained = 4 * settings.cost(shape).trained  # has no gradient yet
    assert chooses["a backward that chooses"] == drawn["end of a backward"] + 8 * scored - trained
    assert chooses["a forward that chooses"] <= drawn["end of a forward"] + 8 * scored - trained
    once = memory(shape, settings.cost(shape), Setup("fp32"), in_steps(MicroBatch(9, 3, (9,), 45), 1)).moments
    assert chooses["a forward that chooses"] - once["a forward that chooses"] == 4 * scored


def test_frozen_attention_keeps_no_input_of_its_own():
    shape = shape_of({"model_type": "llama", **SIZES, "num_hidden_layers": 1})
    settings = FullSettings(freeze=["*.self_attn"])
    four, two = (saved_bytes(settings, "fp32", layers, 64) for layers in (4, 2))
    assert 64 * layer_bytes(shape, settings.cost(shape), Setup("fp32")) == (four - two) / 2


def test_kept_bytes_of_recomputing():
    shape = shape_of({"model_type": "llama", **SIZES, "num_hidden_layers": 10})
    lora = cost.lora(shape, rank=3)
    every, half, some = (kept_bytes(shape, lora, Setup("fp32", recompute=share), 100) for share in (0.0, 0.5, 1.0))
    layer = 100 * layer_bytes(shape, lora, Setup("fp32"))
    assert every - some == pytest.approx(9 * layer - 10 * 100 * 4 * 40)
    assert every - half == pytest.approx(5 * layer - 5 * 100 * 4 * 40)


def test_zero_by_the_papers_example():
    """Rajbhandari et al., arXiv 1910.02054, figure 1: 7.5 B parameters on 64 devices, mixed-precision Adam (K = 12)."""
    n = 7.5e9
    per_device = [sum(sharded(2 * n, 2 * n, 12 * n, stage, 64)) / 1e9 for stage in range(4)]
    assert per_device == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_zero_in_our_bytes_by_hand():
    """fp32 parameters, gradients and two moments, 4 N each, over four devices."""
    work, full = in_steps(MicroBatch(16, 8, (16,), 136), 2), cost.full(LLAMA_13B)
    n = LLAMA_13B.parameters
    for stage, (p, g, o) in enumerate([(4, 4, 8), (4, 4, 2), (4, 1, 2), (1, 1, 2)]):
        terms = memory(LLAMA_13B, full, Setup("fp32", "cuda", devices=4, stage=stage), work).terms
        gathered = 8 * LLAMA_13B.layer_parameters if stage == 3 else 0
        assert terms["weights"] == pytest.approx(p * n + gathered)
        assert (terms["gradients"], terms["optimizer"]) == pytest.approx((g * n, o * n))


def test_qlora_of_13b_fits_24_gb():
    """Measured elsewhere: 22.6 GB, unoptimised, at short lengths. Ours: two samples of 512 tokens a micro-batch."""
    batch = MicroBatch(1024, 512, (512, 512), 512 * 513)
    qlora = cost.qlora(LLAMA_13B, rank=64)
    peak = memory(LLAMA_13B, qlora, Setup("bf16", "cuda"), in_steps(batch, 8)).peak / GIB
    assert 16 < peak < CARDS["rtx3090-24g"].memory_gb
    weights = base_bytes(LLAMA_13B, qlora, Setup("bf16", "cuda")) / 1e9
    assert 7.5 < weights < 9.5  # 12.7 G linear weights in 4.13 bits, embeddings and head in bf16, adapters in fp32
    light = memory(LLAMA_13B, qlora, Setup("bf16", "cuda", recompute=1.0), in_steps(batch, 8)).peak / GIB
    assert light < 14
    lora = memory(LLAMA_13B, cost.lora(LLAMA_13B, rank=64), Setup("bf16", "cuda"), in_steps(batch, 8)).peak / GIB
    assert lora > 24


def test_eight_bit_moments_take_a_quarter():
    work, full = in_steps(MicroBatch(64, 32, (64,), 2080), 2), cost.full(LLAMA_13B)
    plain, small = (
        memory(LLAMA_13B, full, Setup("bf16", "cuda", optimizer=name), work).terms["optimizer"]
        for name in ("adamw", "paged_adamw_8bit")
    )
    assert small / plain == pytest.approx(0.25, abs=0.01)


def test_loading_can_be_the_fullest_moment():
    """bf16 out of an fp32 file: for a while both are there."""
    n = LLAMA_13B.parameters
    stored = shape_of(
        {"model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
         "num_attention_heads": 40, "vocab_size": 32000}, file_bytes=4 * n, file_width=4,
    )  # fmt: skip
    found = memory(stored, cost.lora(stored, rank=8), Setup("bf16"), in_steps(MicroBatch(64, 32, (64,), 2080)))
    assert found.moment == "loading"
    assert found.terms["weights"] == pytest.approx(6 * n, rel=0.01)


class Fixed:
    """A machine of one GFLOP/s and one GB/s."""

    def products(self, inputs, outputs, rows, precision):
        return 1e9

    def bandwidth(self):
        return 1e9


def test_time_grows_as_the_arithmetic_does():
    """6 N FLOPs a token for full fine-tuning, 4 N for LoRA (and its own), 2 N more with recomputing."""
    from fitout.plan.estimate import features

    batch = (MicroBatch(1000, 0, (1000,), 1000),)
    n = LLAMA_13B.linear_weights
    full = features(LLAMA_13B, cost.full(LLAMA_13B), Setup("fp32"), batch, Fixed())
    lora = features(LLAMA_13B, cost.lora(LLAMA_13B, rank=8), Setup("fp32"), batch, Fixed())
    again = features(LLAMA_13B, cost.lora(LLAMA_13B, rank=8), Setup("fp32", recompute=1.0), batch, Fixed())
    assert full["products"] == pytest.approx(6 * n * 1000 / 1e9)
    assert lora["products"] == pytest.approx(4 * n * 1000 / 1e9)
    assert again["products"] == pytest.approx(6 * n * 1000 / 1e9)
    assert lora["thin"] == pytest.approx(6 * cost.lora(LLAMA_13B, rank=8).added * 1000 / 1e9)
    top = features(LLAMA_13B, cost.full(LLAMA_13B, last_layers=10), Setup("fp32"), batch, Fixed())
    assert top["products"] == pytest.approx((2 + 4 / 4) * n * 1000 / 1e9)


def test_steps_are_averaged():
    small, large = MicroBatch(100, 50, (100,), 5050), MicroBatch(300, 150, (300,), 45150)
    lora = cost.lora(LLAMA_13B, rank=8)
    times = [
        seconds(LLAMA_13B, lora, Setup("bf16", "cuda"), Work((step,), 1, 1, 300, 1), Fixed())
        for step in ((small,), (large,))
    ]
    both = seconds(LLAMA_13B, lora, Setup("bf16", "cuda"), Work(((small,), (large,)), 2, 2, 300, 2), Fixed())
    assert both == pytest.approx(sum(times) / 2)
    assert memory(LLAMA_13B, lora, Setup("bf16"), Work(((small,), (large,)), 2, 2, 300, 2)).peak / MB > 1000
