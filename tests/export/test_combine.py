"""Several adapters as one: linear is the weighted sum of what they add, ties and dare are PEFT's."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from safetensors.torch import load_file

from fitout import verbs
from fitout.chat import ChatSettings
from fitout.chat.render import open_chat
from fitout.cli.app import app
from fitout.errors import CheckError, FitoutError, ModelError
from fitout.export.combine import SEED, combine
from fitout.export.write import save_chat
from fitout.files import read_json, write_json
from fitout.model.load import SHELL
from fitout.model.methods import lora
from tests.export.families import save_lora

pytest.importorskip("peft")
PREFIX = "base_model.model."


def deltas(folder, scale: float | None = None) -> dict[str, torch.Tensor]:
    """What the adapter in `folder` adds to each weight, in fp64, from its files alone."""
    config, tensors = read_json(folder / "adapter_config.json"), load_file(folder / "adapter_model.safetensors")
    if scale is None:
        scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    end = ".lora_A.weight"
    return {
        name.removeprefix(PREFIX).removesuffix(end):
            scale * tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        for name in tensors if name.endswith(end)
    }  # fmt: skip


def shell_weights() -> dict[str, torch.Tensor]:
    return load_file(SHELL / "model.safetensors")


def test_linear_is_the_weighted_sum(tmp_path):
    save_lora(tmp_path / "a", rank=4, alpha=16, seed=1)
    save_lora(tmp_path / "b", rank=6, alpha=3, seed=2)
    verbs.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[0.7, -0.4])
    a, b = deltas(tmp_path / "a"), deltas(tmp_path / "b")
    base, merged = shell_weights(), load_file(tmp_path / "out" / "merged" / "model.safetensors")
    for name, delta in deltas(tmp_path / "out" / "adapter").items():
        want = 0.7 * a[name] - 0.4 * b[name]
        torch.testing.assert_close(delta, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            merged[f"{name}.weight"].double(), base[f"{name}.weight"] + want, rtol=1e-5, atol=1e-6
        )
    assert read_json(tmp_path / "out" / "adapter" / "adapter_config.json")["r"] == 10
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert "| combined by | linear |" in card and "| weights | 0.7, -0.4 |" in card


def test_equal_shares_by_default_and_other_targets(tmp_path):
    save_lora(tmp_path / "a", seed=1, targets=["q_proj"])
    save_lora(tmp_path / "b", seed=2, targets=["q_proj", "up_proj"])
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", how="linear")
    a, b, got = deltas(tmp_path / "a"), deltas(tmp_path / "b"), deltas(tmp_path / "out")
    assert got.keys() == b.keys()
    for name, delta in got.items():
        torch.testing.assert_close(delta, 0.5 * (a.get(name, 0) + b[name]), rtol=1e-5, atol=1e-6)


def test_rank_stabilised_scales_are_kept(tmp_path):
    """PEFT hands use_rslora on to the sum, whose factors hold the scales already; left so it would scale twice."""
    for name, seed in (("a", 1), ("b", 2)):
        save_lora(tmp_path / name, seed=seed)
        config = read_json(tmp_path / name / "adapter_config.json")
        write_json(tmp_path / name / "adapter_config.json", {**config, "use_rslora": True})
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", how="linear", weights=[1, 2])
    a, b = deltas(tmp_path / "a"), deltas(tmp_path / "b")
    assert a.keys() == deltas(tmp_path / "out").keys()
    for name, delta in deltas(tmp_path / "out").items():
        torch.testing.assert_close(delta, a[name] + 2 * b[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["ties", "dare_linear", "dare_ties"])
def test_the_others_are_pefts(tmp_path, how):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    for name, seed in (("a", 1), ("b", 2)):
        save_lora(tmp_path / name, seed=seed)
    verbs.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", how=how, weights=[0.6, 0.8], density=0.4)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SHELL), str(tmp_path / "a"), "a")
    theirs.load_adapter(str(tmp_path / "b"), "b")
    torch.manual_seed(SEED)
    theirs.add_weighted_adapter(["a", "b"], [0.6, 0.8], "ab", combination_type=how, density=0.4)
    theirs.set_adapter("ab")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    ours_again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(SHELL), str(tmp_path / "out" / "adapter")
    )
    ids = torch.tensor([[5, 400, 31, 2000, 77]])
    with torch.no_grad():
        want = theirs(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours_again(input_ids=ids).logits, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "how", "message"),
    [
        ({"base_model_name_or_path": "owner/name"}, "linear", "different bases"),
        ({"use_dora": True}, "linear", "DoRA"),
        ({"bias": "all"}, "linear", "biases"),
        ({"modules_to_save": ["lm_head"]}, "linear", "trained whole"),
        ({"peft_type": "SPARSE"}, "linear", "type SPARSE"),
        ({"r": 8}, "ties", "one rank"),
    ],
)
def test_adapters_that_do_not_go_together(tmp_path, change, how, message):
    for name in ("a", "b"):
        save_lora(tmp_path / name)
    config = read_json(tmp_path / "b" / "adapter_config.json")
    write_json(tmp_path / "b" / "adapter_config.json", {**config, **change})
    with pytest.raises(FitoutError, match=message) as error:
        verbs.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", how=how)
    assert error.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_a_model_that_peft_cannot_combine_adapters_of(tmp_path):
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=2944, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, n_group=1,
        topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    save_chat(open_chat(SHELL), tmp_path / "base")
    for name in ("a", "b"):
        save_lora(tmp_path / name, base=tmp_path / "base")
    with pytest.raises(ModelError, match="PEFT does not combine"):
        verbs.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_over_four_bits_is_refused(tmp_path):
    """It belongs to another base than the 16-bit one that it would be added to."""
    from fitout.model.methods.qlora import RECORD

    save_lora(tmp_path / "a")
    save_lora(tmp_path / "b")
    write_json(tmp_path / "b" / RECORD, {"quant": "nf4", "double_quant": True})
    with pytest.raises(FitoutError, match="held in 4 bits, nf4 with double quantisation cannot be combined"):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", how="linear")


def test_templates_and_trained_embeddings(tmp_path):
    save_lora(tmp_path / "a")
    save_lora(tmp_path / "b", settings=ChatSettings(template="plain"))
    save_lora(tmp_path / "c", settings=ChatSettings(template="chatml", add_tokens=True))
    with pytest.raises(FitoutError, match="chat templates"):
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", how="linear")
    with pytest.raises(FitoutError, match="embeddings"):
        combine([tmp_path / "a", tmp_path / "c"], tmp_path / "out", how="linear")


def test_a_weight_that_is_no_number_is_refused(tmp_path):
    for name in ("a", "b"):
        save_lora(tmp_path / name)
    with pytest.raises(FitoutError, match="a weight is no number") as error:
        combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out", how="linear", weights=[float("nan"), 1.0])
    assert error.value.exit_code == 2


def test_wrong_requests(tmp_path):
    for name in ("a", "b"):
        save_lora(tmp_path / name)
    both = [tmp_path / "a", tmp_path / "b"]
    for adapters, wrong in ((both[:1], {}), (both, {"weights": [1]}), (both, {"density": 0}), (both, {"how": "mean"})):
        with pytest.raises(FitoutError) as error:
            verbs.combine(adapters, tmp_path / "out", **wrong)
        assert error.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_a_refused_merge_leaves_nothing(tmp_path, monkeypatch):
    for name in ("a", "b"):
        save_lora(tmp_path / name)
    monkeypatch.setattr(lora.LoraLinear, "delta", lambda self: 0 * self.base.weight)
    with pytest.raises(CheckError):
        verbs.combine([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_the_command(tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 2)):
        save_lora(tmp_path / name, seed=seed)
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    typer.main.get_command(app)(["merge", *both, "--weights", "1,0.5", "--to", str(tmp_path / "out"), "--json"],
                                standalone_mode=False)  # fmt: skip
    assert json.loads(capsys.readouterr().out)["merged model"] == str(tmp_path / "out" / "merged")
    for wrong in ([], ["--weights", "x", "--to", str(tmp_path / "o")]):
        with pytest.raises(FitoutError) as error:
            typer.main.get_command(app)(["merge", *both, *wrong], standalone_mode=False)
        assert error.value.exit_code == 2
