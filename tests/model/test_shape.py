"""Shapes read from config.json against transformers' real modules on the meta device: names and counts, exactly."""

from __future__ import annotations

import json

import pytest
import torch

from fitout.errors import ModelError
from fitout.model.shape import FAMILIES, read_shape, shape_of
from tests.conftest import tiny_llama

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "llama": [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}],
    "mistral": [{}, {"head_dim": 10}],
    "qwen2": [{}, {"tie_word_embeddings": True}],
    "qwen3": [{}, {"head_dim": 16, "attention_bias": True}],
    "gemma": [{}, {"head_dim": 8}],
    "phi3": [{}, {"num_key_value_heads": 6}],
}


def meta_model(config):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_named_and_counted(family, tmp_path):
    from transformers import AutoConfig

    for changes in VARIANTS.get(family, [{}]):
        config = AutoConfig.for_model(family, **{**SIZES, **changes})
        config.save_pretrained(tmp_path)  # what a model folder really holds
        real = {name: p.numel() for name, p in meta_model(config).named_parameters()}
        shape = read_shape(str(tmp_path))
        assert dict(shape.tensors()) == real, (family, changes)
        assert shape.parameters == sum(real.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_the_familys_own(family):
    """A config.json of the oldest style holds no key that has its family's default."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, num_hidden_layers=2)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    full = config.to_dict()
    bare = {key: full[key] for key in SIZES if key in full and "token" not in key} | {"model_type": family}
    assert shape_of(bare).parameters == sum(p.numel() for p in meta_model(config).parameters())


@pytest.mark.parametrize(
    ("name", "values", "billions"),
    [  # as published on the model cards
        ("llama", dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40,
                       vocab_size=32000), 13.016),
        ("llama", dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, vocab_size=128256), 8.030),
        ("qwen2", dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                       num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True), 0.494),
    ],
)  # fmt: skip
def test_published_sizes(name, values, billions):
    assert shape_of({"model_type": name, **values}).parameters / 1e9 == pytest.approx(billions, abs=5e-4)


def test_stored_bytes_come_from_the_files(tmp_path):
    model = tiny_llama(tied=True).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert shape.file_width == 2
    assert 2 * shape.parameters <= shape.file_bytes < 2 * shape.parameters + 10_000


def test_the_text_part_of_a_larger_config():
    text = {"model_type": "llama", **SIZES}
    assert shape_of({"model_type": "llava", "text_config": text}) == shape_of(text)


def test_an_unknown_family_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 8}))
    with pytest.raises(ModelError, match="mamba"):
        read_shape(str(tmp_path))
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_shape(str(tmp_path.parent))
