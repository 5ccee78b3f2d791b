"""What is trained, against transformers' assistant mask over TRL's packaged templates; Qwen3's rewriting of history."""

from __future__ import annotations

from pathlib import Path

import pytest

from fitout.chat import ChatSettings
from fitout.chat.types import Message
from tests.chat.folders import SPELLED, TURNS, folder, open_chat, talk, trained_text

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

#: TRL's training templates that mark, with {% generation %}, the same text as ours: what follows the generation prompt.
MARKED = {
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "qwen2_5_vl": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
    "qwen3_vl": "<|im_end|>",
}
#: Original templates that leave the history as it was said.
ORIGINAL = {**{name: end for name, end in MARKED.items() if name != "qwen3"}, "llama3_1": "<|eot_id|>"}


def template(name: str) -> str:
    path = TEMPLATES / f"{name}.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {path.name}")
    return path.read_text(encoding="utf-8")


def grown(path: Path, name: str, end: str):
    return open_chat(folder(path, template(name), tokens=SPELLED, eos=end, bos="<|begin_of_text|>"))


def until_the_end(ids: list[int], mask: list[int], end: int) -> list[bool]:
    """A mask without what a run has after its last end-of-turn token (a newline that no engine ever generates)."""
    wanted = [bool(on) for on in mask]
    for at in range(len(ids) - 1, -1, -1):
        last_of_run = wanted[at] and (at + 1 == len(ids) or not wanted[at + 1])
        if last_of_run and ids[at] != end:
            wanted[at] = False
    return wanted


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("count", [2, 4])
def test_trained_is_what_trl_marks(tmp_path, name, count):
    chat = grown(tmp_path, f"{name}_training", MARKED[name])
    messages = TURNS[:count]
    [tokens] = chat.render(talk(*messages))
    want = chat.tokenizer.apply_chat_template(
        [m.as_dict() for m in messages], return_dict=True, return_assistant_tokens_mask=True
    )
    end = chat.tokenizer.convert_tokens_to_ids(MARKED[name])
    assert tokens.ids == want["input_ids"]
    assert list(tokens.train_on) == until_the_end(want["input_ids"], want["assistant_masks"], end)
    assert sum(tokens.train_on) > 2 * len(messages) // 2


@pytest.mark.parametrize("name", ORIGINAL)
def test_original_templates_need_no_marks(tmp_path, name):
    """The same without `generation` marks: ids are transformers', each answer and its end are trained."""
    chat = grown(tmp_path, name, ORIGINAL[name])
    chat.check()
    [tokens] = chat.render(talk(*TURNS))
    want = chat.tokenizer.apply_chat_template([m.as_dict() for m in TURNS], return_dict=True)["input_ids"]
    assert tokens.ids == want
    assert trained_text(chat, tokens) == [m.content + ORIGINAL[name] for m in TURNS[1::2]]


# Qwen3 writes an empty thought into the last answer, and takes it out when the answer becomes history


@pytest.fixture
def qwen3(tmp_path):
    return grown(tmp_path, "qwen3", "<|im_end|>")


THOUGHTS = (
    TURNS[0],
    Message("assistant", "<think>\nmoss, sun\n</think>\n\nThat way."),
    TURNS[2],
    Message("assistant", "<think>\nagain\n</think>\n\nUp."),
)


@pytest.mark.parametrize("messages", [TURNS, THOUGHTS], ids=["plain", "thoughts"])
def test_each_turn_gets_the_context_it_will_see(qwen3, messages):
    samples = qwen3.render(talk(*messages))
    assert len(samples) == 2
    for tokens, turn in zip(samples, (1, 3), strict=True):
        prompt = qwen3.prompt_ids(messages[:turn])
        assert tokens.ids[: len(prompt)] == prompt
        assert not any(tokens.train_on[: len(prompt)])
        end = qwen3.tokenizer.convert_tokens_to_ids("<|im_end|>")
        want = qwen3.tokenizer.apply_chat_template([m.as_dict() for m in messages[: turn + 1]], return_dict=True)[
            "input_ids"
        ]
        assert tokens.ids == want
        trained = tokens.ids[len(prompt) : len(prompt) + sum(tokens.train_on)]
        assert all(tokens.train_on[len(prompt) : len(prompt) + len(trained)]) and trained[-1] == end
        assert trained.count(end) == 1


def test_the_thought_is_trained_where_it_is_written_and_gone_from_history(qwen3):
    first, second = qwen3.render(talk(*THOUGHTS))
    assert trained_text(qwen3, first) == ["<think>\nmoss, sun\n</think>\n\nThat way.<|im_end|>"]
    assert trained_text(qwen3, second) == ["<think>\nagain\n</think>\n\nUp.<|im_end|>"]
    assert "moss" not in qwen3.tokenizer.decode(second.ids) and "That way." in qwen3.tokenizer.decode(second.ids)


def test_a_turn_not_trained_makes_no_sample(qwen3):
    silent = Message("assistant", TURNS[1].content, train=False)
    [tokens] = qwen3.render(talk(TURNS[0], silent, *TURNS[2:]))
    assert trained_text(qwen3, tokens) == ["<think>\n\n</think>\n\n" + TURNS[3].content + "<|im_end|>"]


def test_one_turn_is_one_sample(qwen3):
    assert len(qwen3.render(talk(*TURNS[:2]))) == 1


def test_thinking_switched_off_is_baked_in(tmp_path):
    """The empty thought moves into the prompt, is no longer trained, and stays there after saving and loading."""
    settings = ChatSettings(template_kwargs={"enable_thinking": False})
    path = folder(tmp_path / "a", template("qwen3"), tokens=SPELLED, eos="<|im_end|>")
    plain, chat = open_chat(path), open_chat(path, settings)
    chat.check()
    rows = [TURNS[0].as_dict()]
    want = plain.tokenizer.apply_chat_template(
        rows, add_generation_prompt=True, return_dict=True, enable_thinking=False
    )["input_ids"]
    assert chat.prompt_ids(TURNS[:1]) == want
    assert trained_text(chat, chat.render(talk(*TURNS[:2]))[0]) == ["That way.<|im_end|>"]
    chat.tokenizer.save_pretrained(tmp_path / "b")
    again = open_chat(tmp_path / "b")
    assert again.prompt_ids(TURNS[:1]) == want and again.render(talk(*TURNS)) == chat.render(talk(*TURNS))
