"""What each engine cannot load is said beforehand, with the remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fitout.errors import RequestError
from fitout.export.engines import look, notes, obstacles, refuse, vllm_rank
from fitout.files import write_json
from tests.export.families import save_bottleneck, save_lora


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines") / "adapter"
    save_lora(folder)
    return look(folder)


def changed(parts, names=(), **config):
    return replace(
        parts, adapter_config={**parts.adapter_config, **config}, adapter_names=(*parts.adapter_names, *names)
    )


def test_a_plain_lora_goes_everywhere(parts):
    pytest.importorskip("gguf")
    for engine in ("transformers", "vllm", "ollama", "llamacpp"):
        assert obstacles(engine, parts) == []
    assert obstacles("vllm", parts, unmerged=True) == [] and notes(parts, unmerged=True) == []


@pytest.mark.parametrize(
    ("config", "names", "why"),
    [
        ({"use_dora": True}, (), "DoRA"),
        ({"modules_to_save": ["lm_head"]}, (), "lm_head"),
        ({"bias": "all"}, (), "biases"),
        ({"rank_pattern": {"q_proj": 16}}, (), "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 16}}, (), "alpha_pattern"),
        ({"r": 600}, (), "rank 600 is above the 512"),
        ({}, ("base_model.model.model.embed_tokens.weight",), "tokens were added"),
    ],
)
def test_what_vllm_does_not_take_apart_from_its_base(parts, config, names, why):
    found = obstacles("vllm", changed(parts, names, **config), unmerged=True)
    assert [why in one.why for one in found] == [True] and "merged" in found[0].remedy


def test_several_obstacles_are_said_together(parts):
    found = obstacles("vllm", changed(parts, use_dora=True, bias="all", r=600), unmerged=True)
    with pytest.raises(RequestError, match="DoRA.*biases.*rank 600") as error:
        refuse(found, "vllm", parts)
    assert error.value.exit_code == 2 and error.value.hint.count("without --unmerged") == 1


@pytest.mark.parametrize(("rank", "flag"), [(1, 1), (4, 8), (16, 16), (17, 32), (200, 256), (257, 320), (512, 512)])
def test_the_rank_flag(parts, rank, flag):
    ranked = changed(parts, r=rank)
    assert vllm_rank(ranked) == flag
    assert [f"--max-lora-rank {flag}" in note for note in notes(ranked, unmerged=True)] == [True] * (rank > 16)


def test_a_nonlinear_adapter_says_why(tmp_path):
    save_bottleneck(tmp_path / "adapter")
    parts = look(tmp_path / "adapter")
    for engine in ("vllm", "ollama", "llamacpp"):
        found = obstacles(engine, parts)
        assert "nonlinear" in found[0].why and "fitout serve" in found[0].remedy
    assert "fitout serve" in obstacles("vllm", parts, unmerged=True)[0].remedy
    assert obstacles("transformers", parts) == []  # with code of its own beside the weights


def test_other_adapters(tmp_path, parts):
    assert "SPARSE" in obstacles("vllm", changed(parts, peft_type="SPARSE"), unmerged=True)[0].why
    assert "merged" in obstacles("vllm", changed(parts, peft_type="SPARSE"), unmerged=True)[0].remedy
    for engine in ("transformers", "ollama"):
        assert "takes a whole model" in obstacles(engine, parts, unmerged=True)[0].why
    assert "no adapter" in obstacles("vllm", look("embedded:shell"), unmerged=True)[0].why
    save_lora(tmp_path / "adapter")
    write_json(tmp_path / "adapter" / "adapter_config.json", {**parts.adapter_config, "peft_type": "IA3"})
    for engine in ("transformers", "vllm", "ollama"):
        found = obstacles(engine, look(tmp_path / "adapter"))
        assert "type IA3" in found[0].why and "tool that made it" in found[0].remedy


def test_gguf_obstacles(parts, monkeypatch):
    from fitout.export import gguf

    other = type(parts.config)(**{**parts.config.to_dict(), "hidden_act": "relu"})
    found = obstacles("llamacpp", replace(parts, config=other))
    assert [one.why for one in found] == ["its activation is relu; the engine computes silu"]
    monkeypatch.setattr(gguf, "missing_package", lambda: "pip install 'fitout[gguf]'")
    assert "fitout[gguf]" in obstacles("llamacpp", parts)[0].remedy


def test_a_template_that_ollama_cannot_say_still_goes_to_llama_cpp(parts):
    from fitout.chat.render import open_chat
    from fitout.model.load import SHELL

    chat = open_chat(SHELL)
    chat.tokenizer.chat_template = (
        "{% for m in messages %}{{ loop.index }} {{ m.content }}{{ eos_token }}{% endfor %}> "
    )
    numbered = replace(parts, chat=chat)
    assert "Ollama's language" in obstacles("ollama", numbered)[0].why
    assert obstacles("llamacpp", numbered) == []
