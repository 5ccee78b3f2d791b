"""Each method's arithmetic: against the real method where it is applied, else against numbers worked by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fitout.model import methods
from fitout.model.methods import (
    METHODS,
    AdapterSettings,
    DoraSettings,
    FullSettings,
    LoraSettings,
    SparseSettings,
    cost,
)
from fitout.model.methods.base import count, trainable
from fitout.model.shape import shape_of
from tests.conftest import tiny_llama

TINY = shape_of(
    {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
)  # fmt: skip
LLAMA_7B = shape_of(
    {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
     "num_attention_heads": 32, "vocab_size": 32000}
)  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [FullSettings(), FullSettings(last_layers=1), FullSettings(freeze=["*norm*", "model.layers.0"]),
     FullSettings(freeze=["model.embed_tokens", "lm_head"]), FullSettings(last_layers=2, freeze=["*.mlp"]),
     LoraSettings(rank=3), LoraSettings(rank=5, targets=["q_proj", "v_proj"]),
     LoraSettings(rank=2, targets=["mlp.down_proj"]), LoraSettings(rank=4, rank_pattern={"q_proj": 2, r"mlp\..*": 6}),
     LoraSettings(rank=4, train_also=["norm", "lm_head"]), LoraSettings(rank=4, targets=["q_proj", "lm_head"]),
     DoraSettings(rank=3), DoraSettings(rank=3, targets=["o_proj"]),
     AdapterSettings(style="pfeiffer", reduction=4), AdapterSettings(style="houlsby", reduction=3),
     AdapterSettings(style="parallel", reduction=8), SparseSettings(density=0.02),
     SparseSettings(density=0.001, targets=["q_proj", "down_proj"])],
    ids=lambda settings: f"{settings.kind} {settings.model_dump(exclude_defaults=True)}",
)  # fmt: skip
@pytest.mark.parametrize("tied", [False, True])
def test_trained_numbers_are_the_methods_own(settings, tied):
    shape, model = replace(TINY, tied=tied), tiny_llama(tied=tied)
    base = sum(p.numel() for p in model.parameters())
    methods.create(settings).apply(model)
    found = settings.cost(shape)
    assert shape.parameters == base
    assert found.trained == count(trainable(model))
    assert found.added == sum(p.numel() for p in model.parameters()) - base
    assert found.frozen_base == (settings.kind != "full")
    head = model.get_output_embeddings()
    assert found.trains_head == getattr(head, "base", head).weight.requires_grad


def test_every_method_has_a_cost():
    for settings in METHODS:
        assert settings().cost(TINY).trained > 0, settings


def test_freezing():
    layer = 32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # q and o, k and v, the feed-forward, two norms
    head = 97 * 32
    assert cost.full(TINY).trained == 2 * layer + 2 * head + 32
    top = cost.full(TINY, last_layers=1)
    assert top.trained == layer + 32 + head and top.layers == 1 and top.trains_head
    no_embedding = cost.full(TINY, freeze=["model.embed_tokens"])
    assert no_embedding.trained == 2 * layer + head + 32
    only_attention = cost.full(TINY, freeze=["*mlp*", "model.embed_tokens.weight", "lm_head*"])
    assert only_attention.weight_gradients == 2 * (32 * 32 * 2 + 2 * 32 * 16)
    assert not only_attention.trains_head


def test_lora_patterns_and_modules_trained_also():
    plain = cost.lora(TINY, rank=4)
    assert plain.trained == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96)
    assert plain.thin_flops == 6 * plain.added and plain.kept == 7 * 4
    wider = cost.lora(TINY, rank=4, rank_pattern={"q_proj": 8})
    assert wider.trained - plain.trained == 2 * 4 * 64
    also = cost.lora(TINY, rank=4, train_also=["embed_tokens", "lm_head"])
    assert also.trained - plain.trained == 2 * 97 * 32 and also.added == plain.added and also.trains_head


def test_dora_trains_one_magnitude_for_each_output():
    lora, dora = cost.lora(TINY, rank=4), cost.dora(TINY, rank=4)
    assert dora.trained - lora.trained == 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32)
    assert dora.call_flops == 2 * 4 * TINY.linear_weights


def test_four_bits_are_the_papers():
    """QLoRA, section 3: quantisation constants cost 0.5 bits a parameter, 0.127 with double quantisation."""
    assert 8 * cost.four_bit_bytes(False) == 4.5
    assert 8 * cost.four_bit_bytes(True) == pytest.approx(4 + 0.127, abs=1e-3)
    found = cost.qlora(LLAMA_7B, rank=64)
    assert found.quantised == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert found.trained == cost.lora(LLAMA_7B, rank=64).trained == 159_907_840  # as PEFT prints for r=64 all-linear


def test_adapters_by_hand():
    one = 2 * 32 * 8 + 8 + 32  # down and up, with biases
    assert cost.adapter(TINY, style="pfeiffer", reduction=4).trained == 2 * one
    assert cost.adapter(TINY, style="houlsby", reduction=4).trained == 4 * one
    assert cost.adapter(TINY, style="parallel", reduction=4).kept == 8


def test_sparse_by_hand():
    found = cost.sparse(TINY, density=0.01)
    assert found.trained == 2 * (10 + 5 + 5 + 10 + 20 + 20 + 20)
    assert found.weight_gradients == TINY.linear_weights
    assert cost.sparse(TINY, density=0.01, targets=["q_proj"]).trained == 2 * 10
    assert found.scored == 0
    large = cost.sparse(LLAMA_7B, density=0.01, by_gradient=True)
    assert large.scored == 2**28 < LLAMA_7B.linear_weights  # of fp32 a GB, in turns


def test_added_tokens_train_the_embeddings():
    found = cost.with_embeddings(cost.lora(TINY, rank=4), TINY)
    assert found.trained == cost.lora(TINY, rank=4).trained + 2 * 97 * 32 and not found.frozen_base


def test_loras_state_is_one_to_three_percent_of_full_fine_tunings():
    """Gradients and moments; what the field says of LoRA. Its whole memory is not that small: the base stays."""
    from fitout.plan.estimate import Setup, memory
    from fitout.plan.work import MicroBatch, in_steps

    work, setup = in_steps(MicroBatch(2048, 1024, (256,) * 8, 8 * 256 * 257 // 2), 2), Setup("bf16", "cuda")
    full, lora = cost.full(LLAMA_7B), cost.lora(LLAMA_7B, rank=64)
    few, all_of_it = (memory(LLAMA_7B, one, setup, work) for one in (lora, full))
    small, large = (one.terms["gradients"] + one.terms["optimizer"] for one in (few, all_of_it))
    assert 0.01 < small / large < 0.03
    assert 0.15 < few.peak / all_of_it.peak < 0.5
