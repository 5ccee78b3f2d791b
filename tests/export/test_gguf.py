"""GGUF files say what the model says: read back slowly, every tensor and the logits; what is wrong is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fitout.chat.render import open_chat
from fitout.errors import CheckError, FitoutError, ModelError
from fitout.export import gguf as writing
from fitout.export.gguf import interleave, missing_package, need_package, unsupported, write_gguf
from fitout.export.gguf_check import check_tensors, model_of, read_gguf
from fitout.export.gguf_vocab import describe
from fitout.export.merge import logits, probe_ids
from fitout.model.load import load_base, load_config
from tests.export.families import SHAPES, save_family

gguf = pytest.importorskip("gguf")
VOCAB = 2944


def written(tmp_path, name: str, kind: str = "f32", dtype: torch.dtype = torch.float32):
    folder, path = tmp_path / "model", tmp_path / "m.gguf"
    chat = save_family(name, folder, dtype=dtype)
    notes = write_gguf(folder, path, chat, describe(chat, VOCAB), name="m", kind=kind)
    return folder, path, notes


def relative(folder, path) -> float:
    """How far the logits of a model made from the file alone are from those of the folder."""
    probes = probe_ids(open_chat(folder), VOCAB)
    want = logits(load_base(str(folder), packed=False), probes)
    return float((logits(model_of(read_gguf(path)), probes) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", SHAPES)
def test_the_file_alone_gives_the_model(tmp_path, name):
    folder, path, notes = written(tmp_path, name)
    assert check_tensors(read_gguf(path), folder) < (1e-6 if name == "gemma" else 1e-30)
    assert relative(folder, path) < 1e-5 and notes == []


@pytest.mark.parametrize(("kind", "most"), [("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 6e-2)])
def test_kinds(tmp_path, kind, most):
    folder, path, _ = written(tmp_path, "qwen3", kind)
    read = read_gguf(path)
    assert 0 < check_tensors(read, folder) < 0.01 and relative(folder, path) < most
    matrix = "model.layers.1.mlp.up_proj.weight"
    assert read.stored[matrix] == kind.upper() and read.stored["model.norm.weight"] == "F32"


def test_a_16_bit_model_is_kept_to_the_bit(tmp_path):
    folder, path, _ = written(tmp_path, "llama", "bf16", torch.bfloat16)
    assert check_tensors(read_gguf(path), folder) == 0


def test_rows_that_are_no_multiple_of_a_block_stay_in_f16(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "odd", ("llama", {"intermediate_size": 80}))
    folder, path, notes = written(tmp_path, "odd", "q8_0")
    assert notes == ["2 matrices stay in f16: their rows are no multiple of 32"]
    assert read_gguf(path).stored["model.layers.0.mlp.down_proj.weight"] == "F16"
    assert check_tensors(read_gguf(path), folder) < 0.01


def test_transformers_own_reader_agrees(tmp_path):
    """An independent reader: transformers loads GGUF of the Llama family itself."""
    from transformers import AutoModelForCausalLM

    folder, path, _ = written(tmp_path, "llama")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    probes = probe_ids(open_chat(folder), VOCAB)
    want = logits(load_base(str(folder), packed=False), probes)
    torch.testing.assert_close(logits(theirs, probes), want, rtol=1e-4, atol=1e-4)


def test_rows_of_a_head_are_interleaved():
    rows = np.arange(16).reshape(16, 1)
    assert interleave(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


@pytest.mark.parametrize(
    ("what", "patch"),
    [
        ("rows in transformers' order", lambda m: m.setattr(writing, "interleave", lambda w, heads: w)),
        ("a norm in place of another", lambda m: m.setitem(writing.INNER, "input_layernorm", "ffn_norm")
            or m.setitem(writing.INNER, "post_attention_layernorm", "attn_norm")),
        ("a weight that is not finite", lambda m: m.setattr(writing, "interleave", lambda w, heads: w * np.nan)),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_refused(tmp_path, monkeypatch, what, patch):
    patch(monkeypatch)
    folder, path, _ = written(tmp_path, "llama")
    with pytest.raises(CheckError, match="does not say what the model says"):
        check_tensors(read_gguf(path), folder)


@pytest.mark.parametrize("key", ["add_rope_freq_base", "add_layer_norm_rms_eps", "add_rope_scaling_factor"])
def test_a_wrong_key_shows_in_the_logits(tmp_path, monkeypatch, key):
    real = getattr(gguf.GGUFWriter, key)
    monkeypatch.setattr(gguf.GGUFWriter, key, lambda self, value: real(self, value * 3))
    folder, path, _ = written(tmp_path, "llama-linear")
    assert check_tensors(read_gguf(path), folder) == 0 and relative(folder, path) > 2e-4  # twice what is allowed


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("llama", {"mlp_bias": True}, "biases"),
        ("qwen3", {"attention_bias": True}, "biases"),
        ("mistral", {"sliding_window": 64}, "sliding window of 64"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "scaling is dynamic"),
        ("gemma", {"tie_word_embeddings": False}, "not tied"),
        ("llama", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
    ],
)  # fmt: skip
def test_what_the_layout_cannot_hold_is_refused(tmp_path, name, changes, reason):
    save_family(name, tmp_path)
    config = load_config(str(tmp_path))
    assert unsupported(config) == []
    for key, value in changes.items():
        setattr(config, key, value)
    assert any(reason in one for one in unsupported(config))


def test_another_architecture_is_refused(tmp_path):
    from transformers import GPT2Config

    chat = save_family("llama", tmp_path)
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not for gpt2"):
        write_gguf(tmp_path, tmp_path / "m.gguf", chat, describe(chat, VOCAB), name="m", kind="f32")


def test_a_missing_package_is_said(monkeypatch):
    assert missing_package() is None
    monkeypatch.setattr(writing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FitoutError, match="gguf") as error:
        need_package()
    assert "fitout[gguf]" in error.value.hint and error.value.exit_code == 2
