"""Packed attention on architectures with attention of their own kind, against their own code on each document alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    DeepseekV4Config,
    FalconConfig,
    FalconMambaConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    NemotronConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3Config,
)

from fitout.data.pack import lay_out
from fitout.errors import ModelError, RequestError
from fitout.model import attention
from fitout.model.fused import adapted_linear
from fitout.model.load import load_base, save_model
from fitout.model.methods import AdapterSettings, LoraSettings, QloraSettings, SparseSettings, create
from fitout.objectives.base import inputs
from tests.conftest import random_samples

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**SMALL),
    "mistral, window": MistralConfig(**SMALL, sliding_window=6),
    "qwen3": Qwen3Config(**SMALL),
    "gemma2, capped scores": Gemma2Config(
        **SMALL, attn_logit_softcapping=2.0, final_logit_softcapping=None, sliding_window=7, query_pre_attn_scalar=2
    ),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "gpt-oss, sinks": GptOssConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=4, sliding_window=9, layer_types=["full_attention"] * 2
    ),
}


def model_of(config, kind):
    attention.register()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kind)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks") or name.endswith("q_proj.weight"):
            parameter.data.normal_(std=1.0, generator=torch.Generator().manual_seed(1))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_and_trees_equal_each_alone(family):
    """Logits and the gradient of the embeddings, for three documents and for a tree of three."""
    config = FAMILIES[family]
    for prefix in (0, 20):
        ids, _ = random_samples(3, prefix=prefix)
        trained = [torch.ones(len(one), dtype=torch.uint8).numpy() for one in ids]
        own, packed = model_of(config, "eager"), model_of(config, attention.NAME)

        weights = [
            torch.randn(len(one) - 1, 97, generator=torch.Generator().manual_seed(n)) for n, one in enumerate(ids)
        ]
        alone = [own(input_ids=torch.tensor(one[None]).long(), use_cache=False).logits[0, :-1] for one in ids]
        sum((x * w).sum() for x, w in zip(alone, weights, strict=True)).backward()

        layout = lay_out(ids, trained, range(3))
        assert (layout.tokens < sum(map(len, ids))) == bool(prefix)
        logits = packed(**inputs(layout, torch.device("cpu"))[0]).logits[0]
        together = [logits[layout.target_at[layout.target_sample == n]] for n in range(3)]
        sum((x * w).sum() for x, w in zip(together, weights, strict=True)).backward()

        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * float(b.detach().abs().max()))
        want = own.get_input_embeddings().weight.grad
        gap = packed.get_input_embeddings().weight.grad - want
        assert float(gap.abs().max()) < 5e-5 * float(want.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_says_that_packing_serves_it(family):
    assert attention.why_not_packed(model_of(FAMILIES[family], attention.NAME)) is None


@pytest.mark.parametrize(("family", "dropped"), [("gemma2, capped scores", "softcap"), ("gpt-oss, sinks", "s_aux")])
def test_an_attention_that_drops_what_is_special_is_found_out(family, dropped, monkeypatch):
    from transformers import AttentionInterface

    def careless(*args, **more):
        return attention.packed_attention(*args, **{**more, dropped: None})

    model = model_of(FAMILIES[family], attention.NAME)
    AttentionInterface.register(attention.NAME, careless)
    try:
        assert "does not compute what this model's own does" in attention.why_not_packed(model)
    finally:
        attention.register()
    assert attention.why_not_packed(model) is None


OWN = {
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
    "mpt": MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=256),
    "codegen": CodeGenConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=256),
}


@pytest.mark.parametrize("family", OWN)
def test_attention_in_the_models_own_code_stays_and_looks_at_nothing_later(family, tmp_path):
    """transformers makes such a model no mask when another attention is asked for, and hands it to nobody."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OWN[family]).save_pretrained(tmp_path)
    load_base(str(tmp_path), packed=False)
    assert next(load_base(str(tmp_path), empty=True).parameters()).is_meta
    model = load_base(str(tmp_path)).eval()
    assert model.config._attn_implementation == "eager" and "own code" in attention.why_not_packed(model)
    attention.settle(model)
    ids = torch.arange(20)[None]
    later = ids.clone()
    later[0, 12:] += 30
    a, b = (model(input_ids=x, position_ids=torch.arange(20)[None], use_cache=False).logits[0] for x in (ids, later))
    torch.testing.assert_close(a[:12], b[:12], rtol=0, atol=1e-5)
    assert not torch.allclose(a[12:], b[12:], atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [LoraSettings(rank=2), AdapterSettings(reduction=4), SparseSettings(select="random")],
    ids=lambda one: one.kind,
)
def test_a_model_may_add_to_what_a_layer_gives_in_place(settings):
    """Falcon does; the gradients are those of a copy that is added to."""
    found = []
    for hook in (None, lambda _module, _given, out: out.clone()):
        torch.manual_seed(0)
        model, method = AutoModelForCausalLM.from_config(OWN["falcon"], attn_implementation="eager"), create(settings)
        method.apply(model)
        for name, module in model.named_modules():
            if hook and name.endswith(("dense", "dense_4h_to_h")):
                module.register_forward_hook(hook)
        ids = torch.arange(20)[None]
        model(input_ids=ids, use_cache=False).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0] and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_layer_over_4_bit_weights_may_be_added_to_in_place():
    weight, a, b = torch.randn(6, 5), torch.randn(2, 5, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    out = adapted_linear(torch.randn(1, 3, 5), lambda dtype: weight.to(dtype), None, a, b, 0.5)
    out += 1
    out.sum().backward()
    assert a.grad.any() and b.grad.any()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (
            Llama4TextConfig(**SMALL, intermediate_size_mlp=64, num_local_experts=2, attention_chunk_size=50),
            "in chunks",
        ),
        (
            Qwen2MoeConfig(
                **SMALL, use_sliding_window=True, sliding_window=50, max_window_layers=2, num_experts=4,
                moe_intermediate_size=16, shared_expert_intermediate_size=16,
            ),
            "1 of this model's layers tell packed attention no window",
        ),
        (
            PhimoeConfig(**SMALL, sliding_window=50, num_local_experts=2),
            "2 of this model's layers tell packed attention no window",
        ),
    ],
    ids=["llama4", "qwen2 moe", "phimoe"],
)  # fmt: skip
def test_what_only_a_mask_says_is_found_though_40_tokens_do_not_show_it(config, why):
    model = model_of(config, attention.NAME)
    assert why in attention.why_not_packed(model)
    attention.settle(model)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("method", [LoraSettings(rank=2), SparseSettings()], ids=["lora", "sparse"])
@pytest.mark.parametrize(
    "config",
    [
        Llama4TextConfig(**SMALL, intermediate_size_mlp=64, num_local_experts=2),
        PhimoeConfig(**SMALL, num_local_experts=2),
    ],
    ids=["llama4", "phimoe"],
)
def test_a_router_that_is_written_as_a_linear_layer_stays_what_it_is(config, method):
    model, plug = model_of(config, "eager"), create(method)
    ids = torch.arange(3, 12)[None]
    before = model(input_ids=ids, use_cache=False).logits
    plug.apply(model)
    logits = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits, before)
    logits.sum().backward()
    assert any("the experts'" in note for note in plug.notes(model))


def test_keys_that_are_no_tokens_are_found_and_the_models_own_attention_stays():
    """DeepSeek V4 adds compressed keys to those of the tokens."""
    config = DeepseekV4Config(
        **{**SMALL, "num_key_value_heads": 1, "num_hidden_layers": 4, "head_dim": 16}, qk_rope_head_dim=4,
        q_lora_rank=16, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        o_groups=2, o_lora_rank=8, index_n_heads=2, index_head_dim=8, index_topk=4, hc_mult=2, sliding_window=8,
    )  # fmt: skip
    model = model_of(config, attention.NAME)
    assert "keys besides the tokens' own" in attention.settle(model)
    assert model.config._attn_implementation == "eager"
    model(input_ids=torch.arange(20)[None], use_cache=False).logits.sum().backward()


def test_a_model_that_does_not_hand_segments_on_is_told_from_one_that_mixes_documents():
    model = model_of(NemotronConfig(**SMALL), attention.NAME)
    why = attention.settle(model)
    assert why == "this model's own code does not tell its attention where packed documents end"
    assert model.config._attn_implementation == attention.NAME
    config = MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=8)
    assert "carries information" in attention.settle(model_of(config, "eager"))


MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}


@pytest.mark.parametrize("method", [LoraSettings(rank=2), SparseSettings(select="random")], ids=["lora", "sparse"])
@pytest.mark.parametrize(
    "config",
    [
        MambaConfig(**MAMBA, state_size=8),
        FalconMambaConfig(**MAMBA, state_size=8),
        JambaConfig(
            **SMALL, mamba_d_state=8, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False
        ),
    ],
    ids=["mamba", "falcon mamba", "jamba"],
)
def test_all_that_is_counted_as_trained_has_a_gradient_and_what_is_never_called_is_said(config, method):
    model, plug = model_of(config, "eager"), create(method)
    plug.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    model(input_ids=torch.arange(3, 22)[None], use_cache=False).logits.square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert any("(dt_proj) stay as they are" in note for note in plug.notes(model))
    named = create(method.model_copy(update={"targets": ["in_proj", "dt_proj"]}))
    with pytest.raises(RequestError, match="names dt_proj, a layer that this model never calls"):
        named.apply(model_of(config, "eager"))


def test_the_routers_loss_is_left_out_and_the_files_still_ask_for_it(tmp_path):
    config = MixtralConfig(**SMALL, num_local_experts=4, output_router_logits=True)
    model_of(config, "eager").save_pretrained(tmp_path / "base")
    model = load_base(str(tmp_path / "base"))
    assert getattr(model(input_ids=torch.arange(9)[None], use_cache=False), "aux_loss", None) is None
    save_model(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["output_router_logits"] is True
    assert model.config.output_router_logits is False


@pytest.mark.parametrize("method", [LoraSettings(), SparseSettings()], ids=["lora", "sparse"])
def test_a_model_without_linear_layers_is_refused(method):
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(RequestError, match="leaves no linear layer") as error:
        create(method).apply(AutoModelForCausalLM.from_config(config))
    assert error.value.hint == "Train this model with method: {kind: full}."


def test_layers_that_cannot_be_held_in_4_bits_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    method = create(QloraSettings(rank=2))
    for name, config in (
        ("gpt2", GPT2Config(vocab_size=97, n_embd=64, n_layer=1, n_head=2)),
        ("falcon", OWN["falcon"]),
    ):
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        model = load_base(str(tmp_path / name), extra=method.load_kwargs(torch.float32))
        with pytest.raises(ModelError, match="cannot be held in 4 bits"):
            method.apply(model)


def test_a_model_that_reads_weights_itself_cannot_do_so_in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=1, state_size=8, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not compute with quantised weights"):
        load_base(str(tmp_path), extra=create(QloraSettings()).load_kwargs(torch.float32))


def test_special_attention_that_is_not_computed_is_refused():
    q = torch.randn(1, 2, 5, 8)
    for special in ({"position_bias": q}, {"is_causal": False}):
        with pytest.raises(attention.ModelError, match="special"):
            attention.packed_attention(None, q, q, q, None, **special)


def test_without_packing_the_fastest_attention_that_is_right_is_taken(monkeypatch):
    def taken(family):
        attention.settle(model := model_of(FAMILIES[family], attention.NAME))
        return model.config._attn_implementation

    def refuses(*_, **__):
        raise attention.ModelError("special")

    assert taken("llama") == taken("gemma2, capped scores") == attention.NAME
    with monkeypatch.context() as patched:
        patched.setattr(attention, "packed_attention", refuses)
        assert taken("llama") == "sdpa" and taken("gemma2, capped scores") == "eager"
    attention.register()
