"""Stop ids and the tokenizer, as other tools read them."""

from __future__ import annotations

import errno

import pytest

from fitout.chat import ChatSettings
from fitout.chat.render import open_chat
from fitout.export.write import save_chat, set_stop_ids
from fitout.model.load import SHELL, save_model
from tests.conftest import tiny_llama


def test_stop_ids_are_in_the_generation_config(tmp_path):
    from transformers import GenerationConfig

    for settings in (ChatSettings(), ChatSettings(template="chatml", add_tokens=True)):
        chat, model = open_chat(SHELL, settings), tiny_llama()
        model.generation_config.temperature = 0.7
        model.generation_config.do_sample = True
        set_stop_ids(model, chat)
        save_model(model, tmp_path)
        saved = GenerationConfig.from_pretrained(tmp_path)
        stop = saved.eos_token_id if isinstance(saved.eos_token_id, list) else [saved.eos_token_id]
        assert tuple(stop) == chat.stop_ids
        assert saved.temperature == 0.7  # what the base brought along stays


def test_a_saved_tokenizer_loads_with_its_template(tmp_path):
    from transformers import AutoTokenizer

    chat = open_chat(SHELL, ChatSettings(template="plain"))
    save_chat(chat, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    rows = [{"role": "user", "content": "hi"}]
    want = chat.tokenizer.apply_chat_template(rows, tokenize=False, add_generation_prompt=True)
    assert again.apply_chat_template(rows, tokenize=False, add_generation_prompt=True) == want
    assert again.eos_token == chat.tokenizer.eos_token


def test_a_full_disk_under_the_tokenizer_is_an_error_of_the_system(tmp_path):
    """The tokenizers library raises a bare Exception in words; a file system of its own that is full shows it."""
    import resource
    import signal

    chat = open_chat(SHELL)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1][1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            save_chat(chat, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert error.value.errno == errno.EFBIG and error.value.filename == str(tmp_path)
