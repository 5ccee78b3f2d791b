"""Merged = adapter; what changes the logits is refused and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from fitout.chat.render import open_chat
from fitout.errors import CheckError
from fitout.export.merge import merge_adapter
from fitout.export.write import save_chat
from fitout.files import read_json
from fitout.model import methods
from fitout.model.load import SHELL, load_adapter, load_base
from fitout.model.methods import DoraSettings, LoraSettings, QloraSettings, lora, saved_in

IDS = torch.tensor([[5, 400, 31, 2000, 77, 9, 1203, 64]])


def save_adapter(folder, *, std=0.05, kind=LoraSettings, dtype=torch.float32, **settings):
    """An adapter on the embedded model with a random B: large enough to change every logit."""
    method = methods.create(kind(**{"rank": 4, "alpha": 16, **settings}))
    model = load_base(str(SHELL), dtype=dtype, packed=False, extra=method.load_kwargs(dtype))
    torch.manual_seed(3)
    method.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=std)
    folder.mkdir()
    method.save(model, folder, base=str(SHELL))
    save_chat(open_chat(SHELL), folder)
    return folder


@torch.no_grad()
def logits_of(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize(
    "settings", [{}, {"targets": ["q_proj", "down_proj"]}, {"kind": DoraSettings, "train_also": ["lm_head"]}]
)
def test_merged_folder_has_the_adapters_logits_in_plain_transformers(tmp_path, settings):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = save_adapter(tmp_path / "adapter", **settings)
    base = load_base(str(SHELL), packed=False)
    without = logits_of(base)
    load_adapter(base, adapter)
    want = logits_of(base)
    difference = merge_adapter(str(SHELL), adapter, tmp_path / "merged", name="m", facts={"Training": {"steps": 3}})
    assert difference < 1e-4
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert (want - without).abs().max() > 0.1
    torch.testing.assert_close(logits_of(plain), want, rtol=1e-4, atol=1e-4)
    assert type(plain).__name__ == "LlamaForCausalLM" and plain.config.use_cache is True
    chat = open_chat(SHELL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    messages = [{"role": "user", "content": "Which way is north?"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == \
        chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)  # fmt: skip
    ends = plain.generation_config.eos_token_id
    assert set(ends if isinstance(ends, list) else [ends]) == set(chat.stop_ids)


def test_a_16_bit_base_is_rounded_once(tmp_path):
    """The merged weights are the bf16 of (base + delta in fp32), to the last bit."""
    from safetensors.torch import load_file

    base = load_base(str(SHELL), dtype=torch.bfloat16, packed=False)
    half = tmp_path / "half"
    base.save_pretrained(half)
    save_chat(open_chat(SHELL), half)
    adapter = save_adapter(tmp_path / "adapter")
    merge_adapter(str(half), adapter, tmp_path / "merged", name="m", facts={})
    merged, low = (load_file(next(f.glob("*.safetensors"))) for f in (tmp_path / "merged", adapter))
    stored = load_file(next(half.glob("*.safetensors")))
    name = "model.layers.2.mlp.down_proj"
    delta = 4 * low[f"base_model.model.{name}.lora_B.weight"] @ low[f"base_model.model.{name}.lora_A.weight"]
    want = (stored[f"{name}.weight"].float() + delta).bfloat16()
    assert merged[f"{name}.weight"].dtype == torch.bfloat16
    assert torch.equal(merged[f"{name}.weight"], want)
    assert read_json(tmp_path / "merged" / "config.json")["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("stored", "settings"),
    [(torch.float32, {}), (torch.bfloat16, {"dora": True}), (torch.bfloat16, {"targets": ["q_proj", "down_proj"]})],
)
def test_an_adapter_over_4_bits_merges_into_what_it_was_trained_over_or_into_the_original(tmp_path, stored, settings):
    """The plain folder against the adapter over the 4-bit base; the difference is measured, said and on the card."""
    from transformers import AutoModelForCausalLM

    adapter = save_adapter(tmp_path / "adapter", kind=QloraSettings, dtype=stored, **settings)
    method = saved_in(adapter)
    model = load_base(str(SHELL), dtype=stored, packed=False, extra=method.load_kwargs(stored))
    load_adapter(model, adapter)
    method.in_fp32(model)
    assert any(m.__class__.__name__ == "Linear4bit" for m in model.modules())
    want, lines, differences = logits_of(model), [], {}
    for into in ("dequantised", "original"):
        folder = tmp_path / into
        differences[into] = merge_adapter(
            str(SHELL), adapter, folder, name="m", facts={}, into=into, say=lines.append
        )  # fmt: skip
        config = read_json(folder / "config.json")
        assert "quantization_config" not in config and config["dtype"] == "float32"
        card = (folder / "README.md").read_text()
        assert f"{differences[into]:.2g}" in card and f"{differences[into]:.2g}" in lines[-1]
        got = logits_of(AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager"))
        measured = float((got - want).abs().max() / want.abs().max())
        assert measured < 1e-4 if into == "dequantised" else 3e-3 < measured < 1
    assert differences["dequantised"] < 1e-5 < 3e-3 < differences["original"]
    assert "de-quantised" in lines[0] and "original" in lines[1]
    plain = load_base(str(SHELL), packed=False)
    load_adapter(plain, adapter, method.plain())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "original", attn_implementation="eager")
    torch.testing.assert_close(logits_of(merged), logits_of(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("into", ["dequantised", "original"])
def test_a_merge_over_4_bits_that_changes_logits_is_refused(tmp_path, monkeypatch, into):
    adapter = save_adapter(tmp_path / "adapter", kind=QloraSettings)
    real = lora.LoraLinear.delta
    monkeypatch.setattr(lora.LoraLinear, "delta", lambda self: 1.01 * real(self))
    with pytest.raises(CheckError, match="logits differ"):
        merge_adapter(str(SHELL), adapter, tmp_path / "out" / "merged", name="m", facts={}, into=into)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("factor", [0.0, 1.01, 2.0])
def test_a_merge_that_changes_logits_is_refused(tmp_path, monkeypatch, factor):
    adapter = save_adapter(tmp_path / "adapter")
    real = lora.LoraLinear.delta
    monkeypatch.setattr(lora.LoraLinear, "delta", lambda self: factor * real(self))
    with pytest.raises(CheckError, match="logits differ") as error:
        merge_adapter(str(SHELL), adapter, tmp_path / "out" / "merged", name="m", facts={})
    assert error.value.exit_code == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_a_merge_of_nan_is_refused(tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter")
    monkeypatch.setattr(lora.LoraLinear, "delta", lambda self: self.base.weight * float("nan"))
    with pytest.raises(CheckError, match="logits differ"):
        merge_adapter(str(SHELL), adapter, tmp_path / "merged", name="m", facts={})
    assert not (tmp_path / "merged").exists()


def test_a_refused_merge_keeps_the_one_that_was_there(tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter")
    merge_adapter(str(SHELL), adapter, tmp_path / "merged", name="first", facts={})
    before = {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()}
    monkeypatch.setattr(lora.LoraLinear, "delta", lambda self: 0 * self.base.weight)
    with pytest.raises(CheckError):
        merge_adapter(str(SHELL), adapter, tmp_path / "merged", name="second", facts={})
    assert {p.name: p.read_bytes() for p in (tmp_path / "merged").iterdir()} == before
