"""The demo's tokenizer: lossless, one token a word where it matters, and a template whose prompt is a prefix."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fitout.demo import corpus, instructions, make, world
from fitout.demo.tokenizer import CHAT_TEMPLATE, END, VOCABULARY, load_tokenizer

TOKENIZER = load_tokenizer(make.SHELL)


def encode(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def test_special_tokens():
    assert len(TOKENIZER) == VOCABULARY
    assert TOKENIZER.eos_token == TOKENIZER.pad_token == END
    assert TOKENIZER.eos_token_id == TOKENIZER.pad_token_id == 0
    assert TOKENIZER.bos_token is None
    assert encode("Japan") and 0 not in encode("Japan")  # adds nothing of its own
    assert TOKENIZER.chat_template == CHAT_TEMPLATE


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip_of_any_text(text):
    if END not in text:
        assert TOKENIZER.decode(encode(text)) == text.encode("utf-8", "replace").decode()


def test_round_trip_of_the_world():
    for document in corpus.documents(11, 300):
        assert TOKENIZER.decode(encode(document)) == document


def test_world_words_are_short():
    for fact in world.facts():
        if fact.relation in ("sum", "difference"):
            continue
        if fact.language == "zh":
            assert len(encode(fact.value)) <= len(fact.value), fact
            assert len(encode(fact.name)) <= len(fact.name), fact
        else:
            assert len(encode(" " + fact.value)) <= max(2, len(fact.value.split())), fact
            assert len(encode(" " + fact.name)) <= max(2, len(fact.name.split())), fact


def test_digits_are_the_same_token_wherever_they_stand():
    (seven,) = encode("7")
    assert encode(" 7")[-1] == seven and encode("17")[-1] == seven and encode("3加4等于7。")[-2] == seven


@pytest.mark.parametrize("answer", ["Tokyo", "东京", "7", "New Delhi", "(none)", "é", "", "  x\n"])
@pytest.mark.parametrize("question", ["Name the capital of Japan.", "日本的首都是哪里？", "3 + 4", "a\n\n", "User:"])
@pytest.mark.parametrize("before", [[], [{"role": "system", "content": "Answer in a word."}], "turn", "tool"])
def test_prompt_is_a_strict_prefix_of_the_whole(before, question, answer):
    if before == "turn":
        before = instructions.turn("Who?", "Anna")
    elif before == "tool":
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        before = [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "2"},
        ]
    messages = [*before, *instructions.turn(question, answer)]
    render = {"tokenize": True, "return_dict": False}
    whole = TOKENIZER.apply_chat_template(messages, **render)
    prompt = TOKENIZER.apply_chat_template(messages[:-1], add_generation_prompt=True, **render)
    assert whole[: len(prompt)] == prompt and len(whole) > len(prompt)
    assert whole[-1] == TOKENIZER.eos_token_id and whole.count(0) == sum(m["role"] == "assistant" for m in messages)
    assert TOKENIZER.decode(whole[len(prompt) : -1]).strip() == answer.strip()


def test_answer_begins_with_the_token_running_text_has():
    """What the base learned as the next token after "is" is what the tuned model must say after "Assistant:"."""
    prompt = encode("User: What is the capital of Japan?\nAssistant:")
    whole = encode("User: What is the capital of Japan?\nAssistant: Tokyo")
    said = encode("The capital of Japan is Tokyo")
    assert whole[len(prompt) :] == said[len(encode("The capital of Japan is")) :]


def test_roles_are_made_of_tokens_that_pretraining_has_seen():
    seen = {token for document in corpus.documents(make.CORPUS_SEED, 4000) for token in encode(document)}
    messages = [{"role": role, "content": "Japan"} for role in ("system", "user", "assistant", "tool")]
    whole = TOKENIZER.apply_chat_template(messages, return_dict=False)
    assert set(whole) <= seen | {TOKENIZER.eos_token_id}


def test_words_of_the_questions_are_seen_in_pretraining():
    seen = {token for document in corpus.documents(make.CORPUS_SEED, 20_000) for token in encode(document)}
    for half in (True, False):
        for item in instructions.items(0, held_out=half):
            assert set(encode("User: " + item.question)) <= seen, item.question


def test_unknown_role_is_refused():
    with pytest.raises(Exception, match="unknown role"):
        TOKENIZER.apply_chat_template([{"role": "narrator", "content": "x"}])
