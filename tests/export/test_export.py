"""`fitout export`: each form holds what was trained, and what does not is refused without a trace."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

from fitout import verbs
from fitout.chat import ChatSettings
from fitout.chat.render import SAMPLE, open_chat
from fitout.errors import CheckError, RequestError
from fitout.export.merge import logits, merge_adapter, probe_ids
from fitout.export.write import save_chat
from fitout.files import read_json
from fitout.model.load import SHELL, load_adapter, load_base
from tests.export.families import save_bottleneck, save_family, save_lora, save_run

GROWN = ChatSettings(template="chatml", add_tokens=True)


def trained_logits(adapter, probes):
    model = load_base(str(SHELL), packed=False)
    load_adapter(model, adapter)
    return logits(model, probes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("export") / "run")


@pytest.fixture
def corrupt(tmp_path):
    """A run one of whose merged weights is not what was merged."""
    run = save_run(tmp_path / "run")
    path = run.merged / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.down_proj.weight"] *= 1.02
    save_file(tensors, path, {"format": "pt"})
    return run


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_model_folder(tmp_path, run, engine):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = verbs.export(run.path, engine=engine, to=tmp_path / "out")
    probes = probe_ids(open_chat(SHELL), 2944)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(logits(plain, probes), trained_logits(run.adapter, probes), rtol=1e-4, atol=1e-4)
    asked = [message.as_dict() for message in SAMPLE[:1]]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == open_chat(SHELL).prompt_ids(SAMPLE[:1])
    assert any(("vllm.entrypoints.openai.api_server" in line) == (engine == "vllm") for line in exported.commands)
    assert "Checked after writing" in (tmp_path / "out" / "README.md").read_text()


def test_the_adapter_apart_for_vllm(tmp_path, run):
    exported = verbs.export(run.path, engine="vllm", to=tmp_path / "out", unmerged=True)
    words = shlex.split(exported.commands[0])
    flags = dict(zip(words, words[1:], strict=False))
    assert flags["--max-lora-rank"] == "8" and flags["--model"] == str(SHELL) and "--enable-lora" in words
    assert flags["--lora-modules"] == f"small={tmp_path / 'out'}"
    assert (tmp_path / "out" / "chat_template.jinja").samefile(flags["--chat-template"])
    assert read_json(tmp_path / "out" / "generation_config.json") == {"eos_token_id": 0}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (run.adapter / name).read_bytes()


def test_ollama(tmp_path, run):
    pytest.importorskip("gguf")
    exported = verbs.export(run.path, engine="ollama", to=tmp_path / "out", stored_as="f16")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "README.md", "small.gguf"]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./small.gguf\n") and 'PARAMETER stop "<|endoftext|>"' in text
    assert "ollama create" in exported.commands[0] and "renders as" in exported.checked["Ollama template"]
    import gguf

    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "out" / "small.gguf").fields.items()}
    chat = open_chat(SHELL)
    assert fields["tokenizer.chat_template"] == chat.tokenizer.chat_template
    assert fields["tokenizer.ggml.eos_token_id"] in chat.stop_ids and fields["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("engine", ["transformers", "llamacpp"])
def test_a_corrupted_merge_is_refused(tmp_path, corrupt, engine):
    with pytest.raises(CheckError, match="logits differ from what was trained"):
        verbs.export(corrupt.path, engine=engine, to=tmp_path / "out")
    assert not (tmp_path / "out").exists() and {p.name for p in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("generation_config.json", lambda values: {**values, "eos_token_id": 7}),
        ("tokenizer.json", lambda values: {**values, "model": {**values["model"], "merges": []}}),
    ],
)  # fmt: skip
def test_a_corrupted_tokenizer_or_stop_id_is_refused(tmp_path, file, change):
    run = save_run(tmp_path / "run")
    path = run.merged / file
    path.write_text(json.dumps(change(read_json(path))))
    with pytest.raises(CheckError, match="does not say what was trained"):
        verbs.export(run.path, to=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_folder_is_not_touched(tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(RequestError, match="not empty"):
        verbs.export(run.path, to=tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
    verbs.export(run.path, to=tmp_path / "out" / "new")


def test_wrong_requests(tmp_path, run):
    for wrong in ({"engine": "tgi"}, {"stored_as": "q4_0", "engine": "ollama"}, {"stored_as": "f16"}):
        with pytest.raises(RequestError):
            verbs.export(run.path, to=tmp_path / "out", **wrong)
    with pytest.raises(RequestError, match="takes a whole model"):
        verbs.export(run.path, to=tmp_path / "out", unmerged=True)
    assert not (tmp_path / "out").exists()


# added tokens, tied and untied heads


@pytest.mark.parametrize("tied", [True, False])
def test_added_tokens(tmp_path, tied):
    """Role tokens grow embedding and head; merged, exported and in GGUF the logits stay those of the adapter."""
    pytest.importorskip("gguf")
    from fitout.export.gguf_check import model_of, read_gguf

    base = SHELL
    if not tied:
        base = tmp_path / "base"
        save_family("qwen3" if tied else "llama", base)
    adapter = tmp_path / "adapter"
    chat = save_lora(adapter, base=base, settings=GROWN)
    assert len(chat.tokenizer) == 2946 and chat.stop_ids == (2944,)
    merge_adapter(str(base), adapter, tmp_path / "merged", name="m", facts={})
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape[0] == 2946 and ("lm_head.weight" in tensors) != tied
    assert read_json(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is tied
    model = load_base(str(base), packed=False)
    load_adapter(model, adapter)
    probes = [*probe_ids(chat, 2946), torch.tensor([[2944, 2945, 5, 2944]])]
    want = logits(model, probes)
    assert want.shape[0] % 2946 == 0
    exported = verbs.export(adapter, engine="ollama", to=tmp_path / "out")
    got = logits(model_of(read_gguf(tmp_path / "out" / "out.gguf")), probes)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert "pre-tokenizer" in exported.checked["token ids"]
    assert 'PARAMETER stop "<|im_end|>"' in (tmp_path / "out" / "Modelfile").read_text()
    found = verbs.can_load(adapter)
    assert found["vllm"] == [] and "tokens were added" in found["vllm --unmerged"][0]


def test_a_grown_row_that_is_lost_is_refused(tmp_path, monkeypatch):
    """The probes reach the added rows: a merge that resets them does not pass."""
    from fitout.model.methods import lora

    adapter = tmp_path / "adapter"
    save_lora(adapter, settings=GROWN)
    real = lora.Lora.merge

    def forgetful(self, model):
        real(self, model)
        with torch.no_grad():
            model.get_input_embeddings().weight[-2:] = 0

    monkeypatch.setattr(lora.Lora, "merge", forgetful)
    with pytest.raises(CheckError):
        verbs.export(adapter, to=tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_a_bare_model_folder(tmp_path):
    pytest.importorskip("gguf")
    save_family("qwen2", tmp_path / "model")
    verbs.export(tmp_path / "model", engine="llamacpp", to=tmp_path / "out", stored_as="q8_0")
    assert (tmp_path / "out" / "out.gguf").exists()


def test_a_model_whose_attention_knows_no_sdpa(tmp_path):
    from transformers import AutoModelForCausalLM, GPTJConfig

    chat = open_chat(SHELL)
    config = GPTJConfig(
        vocab_size=len(chat.tokenizer), n_embd=32, n_layer=1, n_head=2, rotary_dim=8, n_positions=128, eos_token_id=0
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    save_chat(chat, tmp_path / "model")
    assert (
        "difference"
        in verbs.export(tmp_path / "model", to=tmp_path / "out").checked["logits, plain transformers in fp32"]
    )


def test_a_nonlinear_adapter_brings_its_code(tmp_path):
    save_bottleneck(tmp_path / "adapter")
    exported = verbs.export(tmp_path / "adapter", to=tmp_path / "out")
    assert "from_pretrained(folder, trust_remote_code=True)\n" in (tmp_path / "out" / "README.md").read_text()
    assert list((tmp_path / "out").glob("*.py")) and "trust_remote_code=True" in exported.notes[-1]
    with pytest.raises(RequestError, match="nonlinear"):
        verbs.export(tmp_path / "adapter", engine="vllm", to=tmp_path / "vllm")
    assert not (tmp_path / "vllm").exists()
