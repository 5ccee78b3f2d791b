"""A bottleneck adapter as a model folder: plain transformers, in a process without Fitout, gives the same logits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig

from fitout.chat.render import open_chat
from fitout.errors import CheckError, ModelError, RequestError
from fitout.export import patched
from fitout.export.write import save_chat
from fitout.model import methods
from fitout.model.load import SHELL, load_adapter, load_base
from fitout.model.methods import AdapterSettings, LoraSettings

IDS = [[5, 400, 31, 2000, 77, 9, 1203, 64]]
OUTSIDE = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
AutoTokenizer.from_pretrained(folder)
ids = torch.tensor(IDS)
with torch.no_grad():
    logits = model(input_ids=ids).logits
grown = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
assert "fitout" not in sys.modules
save_file({"logits": logits, "grown": grown}, out)
"""


def save_adapter(folder, settings, base=SHELL):
    model = load_base(str(base), packed=False)
    method = methods.create(settings)
    torch.manual_seed(3)
    method.apply(model)
    for name, parameter in model.named_parameters():
        if name.endswith("adapter.up.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir()
    method.save(model, folder, base=str(base))
    save_chat(open_chat(SHELL), folder)
    return folder


def outside(folder, out):
    """What the folder's model gives in a process without Fitout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(out.parent / "hub"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE.replace("IDS", str(IDS)), str(folder), str(out)],
        cwd=out.parent, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(out)


@pytest.mark.parametrize(
    "settings",
    [
        AdapterSettings(style="houlsby", activation="gelu"),
        AdapterSettings(style="parallel", activation="silu", scale=3),
    ],
    ids=lambda s: s.style,
)
def test_plain_transformers_computes_the_same(tmp_path, settings):
    adapter = save_adapter(tmp_path / "adapter", settings)
    assert patched.write_patched(str(SHELL), adapter, tmp_path / "model", name="m", facts={}) == 0.0
    ours = load_base(str(SHELL), packed=False)
    load_adapter(ours, adapter)
    ours.eval()
    theirs, ids = outside(tmp_path / "model", tmp_path / "out"), torch.tensor(IDS)
    with torch.no_grad():
        torch.testing.assert_close(theirs["logits"], ours(input_ids=ids).logits, rtol=2e-6, atol=1e-5)
        grown = ours.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=True)
        plain = load_base(str(SHELL), packed=False).eval()(input_ids=ids).logits
    assert torch.equal(theirs["grown"], grown)
    assert (theirs["logits"] - plain).abs().max() > 0.1


@pytest.mark.parametrize("config", [GPT2Config, GPTJConfig], ids=["class of another name", "no SDPA"])
def test_a_base_of_a_family_that_is_not_like_the_others(tmp_path, config):
    size = {"vocab_size": len(open_chat(SHELL).tokenizer), "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    more = {"rotary_dim": 8} if config is GPTJConfig else {}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(**size, **more)).save_pretrained(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", AdapterSettings(), tmp_path / "base")
    assert patched.write_patched(str(tmp_path / "base"), adapter, tmp_path / "model", name="m", facts={}) == 0.0
    ours = load_base(str(tmp_path / "base"), packed=False)
    load_adapter(ours, adapter)
    with torch.no_grad():
        logits = ours.eval()(input_ids=torch.tensor(IDS)).logits
    torch.testing.assert_close(outside(tmp_path / "model", tmp_path / "out")["logits"], logits, rtol=2e-6, atol=1e-5)


def test_without_its_code_it_is_refused_not_half_loaded(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", AdapterSettings())
    patched.write_patched(str(SHELL), adapter, tmp_path / "model", name="m", facts={})
    with pytest.raises(ModelError, match="trust_remote_code|custom code"):
        load_base(str(tmp_path / "model"))


def test_what_differs_is_not_kept_and_what_merges_is_sent_there(tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", AdapterSettings(style="parallel", scale=2))
    monkeypatch.setattr(
        patched, "_config", lambda m, s, real=patched._config: real(m, s.model_copy(update={"scale": 1.9}))
    )
    with pytest.raises(CheckError, match="logits differ"):
        patched.write_patched(str(SHELL), adapter, tmp_path / "model", name="m", facts={})
    assert not (tmp_path / "model").exists()
    lora = save_adapter(tmp_path / "lora", LoraSettings())
    with pytest.raises(RequestError, match="can be merged"):
        patched.write_patched(str(SHELL), lora, tmp_path / "model", name="m", facts={})
