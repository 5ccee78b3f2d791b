"""The GGUF files in llama.cpp itself: the logits and the token ids of transformers.

Skips without llama-cpp-python, which builds from source (about ten minutes on two cores):

    pip install llama-cpp-python==0.3.36
    python -m pytest tests/export/test_llama_cpp.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fitout.chat.render import SAMPLE, open_chat
from fitout.export.gguf import write_gguf
from fitout.export.gguf_vocab import COMMON, RARE, describe
from fitout.export.merge import probe_ids
from fitout.model.load import SHELL, load_base
from tests.export.families import SHAPES, save_family

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def plain_buffers(monkeypatch):
    """llama-cpp-python 0.3.36 crashes in its own AMX multiplication of q8_0 on some processors; this leaves it out."""
    real = llama_cpp.llama_cpp.llama_model_default_params

    def parameters():
        found = real()
        found.use_extra_bufts = False
        return found

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", parameters)


def compare(folder: Path, path: Path, kind: str) -> tuple[float, float, list[str]]:
    """Largest difference of logits over their largest size, the share of equal argmax, and texts with other ids."""
    chat, model = open_chat(folder), load_base(str(folder), packed=False)
    write_gguf(folder, path, chat, describe(chat, model.config.vocab_size), name="m", kind=kind)
    engine = llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1,
        type_k=0, type_v=0, flash_attn=False,  # its cache in fp32, as transformers computes
    )  # fmt: skip
    worst = size = 0.0
    same = []
    for ids in probe_ids(chat, model.config.vocab_size):
        with torch.no_grad():
            want = model(input_ids=ids, use_cache=False).logits[0].numpy()
        engine.reset()
        engine.eval(ids[0].tolist())
        got = np.array(engine.scores[: ids.shape[1]])
        worst, size = max(worst, float(np.abs(got - want).max())), max(size, float(np.abs(want).max()))
        same.append((got.argmax(-1) == want.argmax(-1)).mean())
    encode = chat.tokenizer.backend_tokenizer.encode
    texts = [*COMMON, *RARE, chat.prompt_text(SAMPLE[:1])]
    other = [
        text
        for text in texts
        if engine.tokenize(text.encode(), add_bos=False, special=True) != encode(text, add_special_tokens=False).ids
    ]
    engine.close()
    return worst / size, float(np.mean(same)), other


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_has_the_logits_of_transformers(tmp_path, name):
    save_family(name, tmp_path / "model")
    difference, same, other = compare(tmp_path / "model", tmp_path / "m.gguf", "f32")
    assert difference < (2e-3 if name == "gemma" else 1e-5)  # llama.cpp reads GELU from a table in half precision
    assert same == 1.0
    assert set(other) <= {RARE[0]}  # transformers composes accents for Qwen2; the notes say that llama.cpp does not


@pytest.mark.parametrize(("kind", "most"), [("f32", 3e-6), ("f16", 2e-3), ("bf16", 1.5e-2), ("q8_0", 5e-2)])
def test_the_embedded_model(tmp_path, kind, most):
    difference, same, other = compare(SHELL, tmp_path / "m.gguf", kind)
    assert difference < most and other == [] and same > (0.9 if kind != "f32" else 0.999)


def test_a_sentencepiece_tokenizer(tmp_path, shared):
    difference, same, other = compare(shared / "models" / "stories260K", tmp_path / "m.gguf", "f32")
    assert difference < 1e-5 and same == 1.0 and other == []
