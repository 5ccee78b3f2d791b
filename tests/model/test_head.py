"""The loss of heads that are more than a linear layer equals a plain cross-entropy of the model's own logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from fitout.data.pack import lay_out
from fitout.model import fused
from fitout.model.head import kind_of_head
from fitout.model.methods import LoraSettings, create
from fitout.objectives.base import token_losses
from tests.conftest import random_samples, tiny_llama

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97,
    "num_key_value_heads": 2, "head_dim": 8, "n_embd": 32, "n_layer": 2, "n_head": 4, "ffn_dim": 48,
    "word_embed_proj_dim": 32, "max_position_embeddings": 256, "pad_token_id": 0, "attn_implementation": "sdpa",
}  # fmt: skip


class Halved(LlamaForCausalLM):
    """Scales hidden states before the head, and no entry of the configuration says so."""

    def forward(self, input_ids=None, **more):
        more.pop("logits_to_keep", None)
        outputs = self.model(input_ids=input_ids, **more)
        outputs.logits = self.lm_head(outputs[0] / 2)
        return outputs


class Curious(LlamaForCausalLM):
    """Asks its decoder for more than hidden states."""

    def forward(self, input_ids=None, logits_to_keep=0, **more):
        hidden = self.model(input_ids=input_ids, output_hidden_states=True, **more).hidden_states[-1]
        kept = hidden[:, logits_to_keep] if torch.is_tensor(logits_to_keep) else hidden
        return type("Output", (), {"logits": self.lm_head(kept)})


def build(family: str, **more):
    known = AutoConfig.for_model(family)
    settings = {key: value for key, value in (SMALL | more).items() if hasattr(known, key)}
    config = AutoConfig.for_model(family, **settings)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).float().train()


def llama(cls):
    torch.manual_seed(0)
    return cls(tiny_llama(packed=False).config)


def adapted(**more):
    model = tiny_llama(packed=False, **more)
    create(LoraSettings(rank=4, targets=["q_proj", "lm_head"])).apply(model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


MODELS = {
    "llama": (lambda: tiny_llama(packed=False), "plain"),
    "gpt2": (lambda: build("gpt2", embd_pdrop=0, attn_pdrop=0, resid_pdrop=0), "plain"),
    "opt": (lambda: build("opt", dropout=0), "plain"),  # its decoder is within its model
    "gemma2": (lambda: build("gemma2", final_logit_softcapping=2.0), "own"),
    "nanochat": (lambda: build("nanochat"), "own"),
    "cohere": (lambda: build("cohere", logit_scale=0.25), "own"),
    "granite": (lambda: build("granite", logits_scaling=4.0), "own"),
    "granite, unscaled": (lambda: build("granite", logits_scaling=1.0), "plain"),
    "hidden states scaled": (lambda: llama(Halved), "own"),
    "adapted head": (adapted, "own"),
    "adapted head, tied": (lambda: adapted(tied=True), "own"),
    "asks for more": (lambda: llama(Curious), "whole"),
}


@pytest.mark.parametrize("chunk_bytes", [1, 32 << 20])  # 64 rows, all rows
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_all_logits(monkeypatch, name, chunk_bytes):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", chunk_bytes)
    make, kind = MODELS[name]
    model = make()
    assert kind_of_head(model) == kind
    (ids,), (train_on,) = random_samples(1, low=200, high=201)
    layout = lay_out([ids], [np.ones_like(train_on)], range(1))
    layout.target_weight[:] = np.linspace(0, 2, len(layout.target_weight))
    logits = model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits[0].float()
    at, tokens = torch.from_numpy(layout.target_at), torch.from_numpy(layout.target_token)
    want_each = F.cross_entropy(logits[at], tokens, reduction="none")
    want = (want_each * torch.from_numpy(layout.target_weight)).sum()
    (3 * want).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got, each = token_losses(model, layout)
    (3 * got).backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(each, want_each, rtol=1e-4, atol=1e-5)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    scale = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-2 * scale), name


def test_no_more_than_a_chunk_of_logits_stands(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 1)
    model, seen = build("gemma2"), []
    model.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits.shape[-2]))
    (ids,), _ = random_samples(1, low=200, high=201)
    token_losses(model, lay_out([ids], [np.ones(len(ids), np.uint8)], range(1)))
    assert seen == [64, 64, 64, 7]


def test_a_trial_leaves_the_model_and_the_random_stream_as_they_were():
    model = adapted()
    parts, state = dict(model._modules), torch.get_rng_state()
    assert kind_of_head(model) == "own"
    assert model._modules == parts and torch.equal(torch.get_rng_state(), state)


def test_another_head_is_tried_anew():
    model = tiny_llama(packed=False)
    assert kind_of_head(model) == "plain"
    create(LoraSettings(rank=4, targets=["lm_head"])).apply(model)
    assert kind_of_head(model) == "own"


def test_under_autocast_and_without_gradients(monkeypatch):
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 1)
    model = build("gemma2")
    (ids,), _ = random_samples(1, low=150, high=151)
    layout = lay_out([ids], [np.ones(len(ids), np.uint8)], range(1))
    exact, _ = token_losses(model, layout)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", None)  # asked for none
        unneeded, _ = token_losses(model, layout)
    assert not unneeded.requires_grad
    torch.testing.assert_close(unneeded, exact.detach())
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = token_losses(model, layout)
    rounded.backward()
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)
    head = model.get_output_embeddings().weight.grad.clone()
    model.zero_grad()
    exact.backward()
    want = model.get_output_embeddings().weight.grad
    assert (head - want).norm() <= 3e-2 * want.norm()
