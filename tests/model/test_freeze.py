"""Full fine-tuning with a frozen part: what is named stays as it was, to the bit, and mistakes are told."""

from __future__ import annotations

import pytest
import torch

from fitout.errors import RequestError
from fitout.model import methods
from fitout.model.load import grow_vocabulary, load_base
from fitout.model.methods import FullSettings
from fitout.model.methods.base import trainable
from tests.conftest import tiny_llama
from tests.equal.small import job_of, random_part, train


def apply(settings, **model_kwargs):
    model = tiny_llama(**model_kwargs)
    method = methods.create(settings)
    method.apply(model)
    return model, method


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        (
            {"freeze": ["model.layers.0", "model.embed_tokens", "*norm*"]},
            ["layers.1.self_attn", "layers.1.mlp", "lm_head"],
        ),
        ({"freeze": ["*.self_attn.*", "lm_head.weight"]}, ["embed", "mlp", "norm"]),
        ({"last_layers": 1}, ["model.layers.1.", "model.norm.", "lm_head."]),
        ({"last_layers": 2}, ["model.layers.", "model.norm.", "lm_head."]),
        ({"last_layers": 1, "freeze": ["*.mlp"]}, ["model.layers.1.self_attn", "layers.1.input", "layers.1.post",
                                                   "model.norm.", "lm_head."]),
    ],
)  # fmt: skip
def test_only_the_rest_is_trained(tmp_path, settings, trained):
    model, method = apply(FullSettings(**settings))
    before = {name: p.clone() for name, p in model.named_parameters()}
    want = {name for name in before if any(part in name for part in trained)}
    assert set(trainable(model)) == want
    train(job_of(tmp_path, model, random_part(tmp_path, 20, low=20), total=4, method=method))
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == want
    method.save(model, tmp_path / "model", base="x")
    saved = dict(load_base(str(tmp_path / "model")).named_parameters())
    assert all(torch.equal(saved[name], p) for name, p in model.named_parameters())


def test_last_layers_leave_a_tied_head_with_the_embedding():
    model, _ = apply(FullSettings(last_layers=1), tied=True)
    assert set(trainable(model)) == {
        n for n, _ in model.named_parameters() if "layers.1." in n or n == "model.norm.weight"
    }


def test_a_tied_tensor_frozen_by_one_of_its_names_is_refused():
    for one, other in (("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")):
        with pytest.raises(RequestError, match=rf"{one}\.weight, which is one tensor with {other}\.weight") as error:
            apply(FullSettings(freeze=[one]), tied=True)
        assert f"Add {other}.weight" in error.value.hint
    model, _ = apply(FullSettings(freeze=["lm_head", "*embed*"]), tied=True)
    assert not model.lm_head.weight.requires_grad
    apply(FullSettings(freeze=["lm_head"]))


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"freeze": ["model.layer.0"]}, "'model.layer.0' names no parameter", "model.layers.0."),
        ({"freeze": ["*embed_token.*"]}, "names no parameter", "model.embed_tokens.weight"),
        ({"freeze": ["*norm*", "zzz"]}, "'zzz' names no parameter", "lm_head.weight"),
        ({"freeze": ["*"]}, "nothing to train", "Freeze less"),
        ({"last_layers": 3}, "has 2 decoder layers", "Lower it"),
    ],
)
def test_mistakes_are_told(settings, message, hint):
    with pytest.raises(RequestError, match=message) as error:
        apply(FullSettings(**settings))
    assert hint in error.value.hint


@pytest.mark.parametrize("settings", [{"last_layers": 1}, {"freeze": ["model.embed_tokens"]}])
def test_new_tokens_may_not_stay_untrained(settings):
    model = tiny_llama()
    grow_vocabulary(model, 99)
    with pytest.raises(RequestError, match="embed_tokens would stay fixed"):
        methods.create(FullSettings(**settings)).apply(model)
