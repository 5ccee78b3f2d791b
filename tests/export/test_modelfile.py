"""Chat templates in Ollama's language: the same prompt, character for character, or a refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitout.chat import ChatSettings
from fitout.chat.render import open_chat
from fitout.chat.types import Message
from fitout.errors import TemplateError
from fitout.export.modelfile import left_out, modelfile, render_go, translate
from fitout.model.load import SHELL

TURNS = (Message("user", "a"), Message("assistant", "b\n\nb"), Message("user", "c {x} 中文"))
ASKED = (TURNS[:1], TURNS, (Message("system", "s"), *TURNS))


def with_template(text: str):
    chat = open_chat(SHELL)
    chat.tokenizer.chat_template = text
    return chat


@pytest.mark.parametrize(
    "settings",
    [
        ChatSettings(),
        ChatSettings(template="plain"),
        ChatSettings(template="chatml", add_tokens=True),
        ChatSettings(template="llama3", add_tokens=True),
    ],
)
def test_bundled_templates(settings):
    chat = open_chat(SHELL, settings)
    template = translate(chat)
    for messages in ASKED:
        assert render_go(template, messages) == chat.prompt_text(messages)


def test_the_modelfile():
    text = modelfile(open_chat(SHELL, ChatSettings(template="chatml", add_tokens=True)), Path("x/m.gguf"))
    assert text == (
        'FROM ./m.gguf\nTEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n'
        '{{ .Content }}<|im_end|>\n{{ else if eq .Role "assistant" }}<|im_start|>assistant\n'
        '{{ .Content }}<|im_end|>\n{{ else if eq .Role "system" }}<|im_start|>system\n'
        '{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n'
    )


def test_a_system_prompt_that_stands_where_none_is_given():
    chat = with_template(
        "{% if messages[0].role != 'system' %}SYS: be kind\n{% endif %}"
        "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant> {% endif %}"
    )
    template = translate(chat)
    assert "{{ if not .System }}SYS: be kind\n{{ end }}" in template
    for messages in ASKED:
        assert render_go(template, messages) == chat.prompt_text(messages)


def test_a_beginning_of_text_is_left_to_ollama(shared):
    chat = open_chat(shared / "models" / "stories260K")
    for messages in ASKED:
        assert "<s>" + render_go(translate(chat), messages) == chat.prompt_text(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }} {{ m.content }}\n{% endfor %}> ",  # numbered turns
        "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}> ",
        "{% for m in messages %}{{ m.content | truncate(8) }}\n{% endfor %}> ",
        "{{ messages[-1].content }}> ",  # forgets what was said before
        "{% for m in messages %}{{ '{{' }}{{ m.content }}\n{% endfor %}> ",  # would be an action in Go
        "{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}",
    ],
)
def test_a_template_that_is_more_than_pieces_is_refused(template):
    with pytest.raises(TemplateError, match="cannot be said in Ollama's language") as error:
        translate(with_template(template))
    assert "llamacpp" in error.value.hint


def test_what_a_translation_leaves_out_is_said(shared):
    shell = open_chat(SHELL)
    assert left_out(shell, translate(shell)) == [
        "blanks around a message are sent as they are; the tokenizer's template removes them"
    ]
    thinking = open_chat(shared / "data" / "tokenizers" / "minimind")
    notes = left_out(thinking, translate(thinking))
    assert any("thinking" in note for note in notes) and any("tools" in note for note in notes)


@pytest.mark.parametrize(
    "text", ["{{ .Prompt }}", "{{ if .Tools }}x{{ end }}", "{{ range .Messages }}{{ if eq .Role 1 }}{{ end }}{{ end }}",
             "x{{ end }}"],
)  # fmt: skip
def test_go_actions_that_are_not_ours_are_refused(text):
    with pytest.raises(ValueError):
        render_go(text, TURNS)
