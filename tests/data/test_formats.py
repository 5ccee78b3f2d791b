"""Every format against rows written out by hand, and against the real files in ../shared."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from fitout.chat.types import Conversation, Message, Origin, Pair, Text
from fitout.data import SourceSettings
from fitout.data.clean import control_tokens, only_markers, strip_end_markers
from fitout.data.formats import FORMATS, Refused, RowError, choose, detect
from fitout.data.lint import SEVERITIES, check, check_source
from fitout.data.sources import BadRow, RawRow, read
from fitout.data.writers import as_openai_finetuning
from fitout.errors import DataError

HERE = Origin("rows.json", 1)
PLUG = {plug.name: plug for plug in FORMATS}


def convert(row, columns=None, name=None):
    return (PLUG[name] if name else choose([row], columns=columns)).convert(row, HERE, columns)


def said(row, columns=None):
    (sample,) = convert(row, columns)
    return [(message.role, message.content) for message in sample.messages]


def refused(row, name=None):
    with pytest.raises(RowError) as caught:
        convert(row, name=name)
    return caught.value.reason


def turns(*roles, key="messages", **extra):
    words = {"user": "ask", "assistant": "answer", "system": "rules", "tool": "result"}
    return {key: [{"role": role, "content": words[role]} for role in roles], **extra}


ASKED = [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca"),
        ({"instruction": "q", "response": "a"}, "alpaca"),
        ({"instruction": "", "input": "q", "answer": "a"}, "alpaca"),
        ({"instruction": "q", "input": None, "output": "a", "history": [], "system": ""}, "alpaca"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt"),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "openai"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "openai"),
        ({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}, "openai"),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"question": "q", "answer": "a"}, "prompt_completion"),
        ({"input": "q", "output": "a"}, "prompt_completion"),
        ({"text": "q", "label": "a"}, "prompt_completion"),
        ({"text": "q", "label": ["a"]}, "prompt_completion"),
        (
            {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
            "prompt_completion",
        ),
    ],
)
def test_one_question_and_answer_in_every_form(row, name):
    assert detect([row]).name == name
    assert said(row) == ASKED


def test_alpaca_history_system_and_meta():
    row = {
        "instruction": "and",
        "input": "this?",
        "output": "a",
        "history": [["q1", "a1"]],
        "system": "rules",
        "task": "t",
        "choices": ["x", "y"],
    }
    assert said(row) == [
        ("system", "rules"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "and\nthis?"),
        ("assistant", "a"),
    ]
    assert convert(row)[0].meta == {"task": "t", "choices": ["x", "y"]}


def test_alpaca_instances_become_parts():
    row = {"id": "s1", "instruction": "q", "instances": [{"input": "1", "output": "a"}, {"input": "", "output": "b"}]}
    samples = convert(row)
    assert [str(sample.origin) for sample in samples] == ["rows.json:1#1", "rows.json:1#2"]
    assert [sample.messages[0].content for sample in samples] == ["q\n1", "q"]
    assert samples[0].meta == {"id": "s1"}
    row["instances"][1]["output"] = " "
    row["instances"].append("c")
    first, second, third = convert(row)
    assert first == samples[0]
    assert second == Refused(Origin("rows.json", 1, 2), "turn 2: the answer is empty", {"input": "", "output": " "})
    assert third == Refused(Origin("rows.json", 1, 3), "an instance is text, not an object", "c")
    assert refused({**row, "instances": []}) == "`instances` is empty"


def test_answers_within_a_prompt_are_context_unless_they_say_otherwise():
    """As TRL's conversational prompt and completion are trained: on the completion."""

    def prompt(**marks):
        turn = {"role": "assistant", "content": "shown", **marks}
        return [{"role": "user", "content": "q"}, turn, {"role": "user", "content": "again"}]

    wanted = [{"role": "assistant", "content": "wanted"}]
    for marks, trained in (({}, False), ({"train": True}, True), ({"weight": 1}, True), ({"weight": 0}, False)):
        for completion in (wanted, "wanted"):
            (sample,) = convert({"prompt": prompt(**marks), "completion": completion})
            assert [m.train for m in sample.messages if m.role == "assistant"] == [trained, True]


def test_sharegpt_tools():
    tool = {"name": "add", "description": "adds", "parameters": {"type": "object"}}
    row = {
        "conversations": [
            {"from": "system", "value": "rules"},
            {"from": "human", "value": "1+2"},
            {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"x": 1}})},
            {"from": "observation", "value": "3"},
            {"from": "observation", "value": ""},
            {"from": "gpt", "value": "3"},
        ],
        "tools": json.dumps([tool]),
    }
    (sample,) = convert(row)
    assert [message.role for message in sample.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    assert sample.messages[2].as_dict() == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert sample.tools == ({"type": "function", "function": tool},)
    assert sample.meta == {}


def test_openai_tool_calls_reasoning_parts_and_training_marks():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0},
            {"role": "tool", "content": "r", "tool_call_id": "c1"},
            {"role": "assistant", "content": "x", "reasoning_content": "hm", "weight": 1},
            {"role": "user", "content": "more", "name": "Ann"},
            {"role": "assistant", "content": "y", "train": False},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }
    (sample,) = convert(row)
    assert [message.train for message in sample.messages] == [True, True, False, True, True, True, False]
    assert sample.messages[1].content == "ab"
    assert sample.messages[2].extra["tool_calls"][0] == {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": {"x": 1}},
    }
    assert sample.messages[3].extra == {"tool_call_id": "c1"}
    assert sample.messages[4].extra == {"reasoning_content": "hm"}
    assert sample.messages[5].extra == {"name": "Ann"}


def test_parquet_turns_with_nulls_for_absent_fields():
    nulls = {"tool_calls": None, "name": None, "train": None, "weight": None, "reasoning_content": None}
    row = {"messages": [{"role": "user", "content": "q", **nulls}, {"role": "assistant", "content": "a", **nulls}]}
    assert convert(row)[0].messages == (Message("user", "q"), Message("assistant", "a"))


A, R = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}
ANSWER = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}], "chosen": A, "rejected": R},
        {"messages": [USER], "chosen": ANSWER[0], "rejected": ANSWER[1]},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"question": "q", "chosen": "good", "rejected": "bad"},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [ANSWER[0]], "rejected": [ANSWER[1]]},
        {"chosen": [USER, ANSWER[0]], "rejected": [USER, ANSWER[1]]},
        {"chosen": "\n\nHuman: q\n\nAssistant: good", "rejected": "\n\nHuman: q\n\nAssistant: bad"},
    ],
)
def test_preference_pairs(row):
    assert detect([row]).name == "preference"
    (pair,) = convert({**row, "score": 3})
    assert isinstance(pair, Pair)
    assert pair.prompt == (Message("user", "q"),)
    assert (pair.chosen, pair.rejected) == (Message("assistant", "good"), Message("assistant", "bad"))
    assert pair.meta["score"] == 3


def test_a_prompt_column_is_what_is_answered():
    """A text that looks like a transcript is an answer where the row has a prompt; one that says otherwise is told."""
    row = {"prompt": "Write a dialogue.", "chosen": "Human: hi\n\nAssistant: hello", "rejected": "Assistant: no"}
    [pair] = convert(row)
    assert pair.prompt == (Message("user", "Write a dialogue."),)
    assert (pair.chosen.content, pair.rejected.content) == (row["chosen"], row["rejected"])
    whole = {"chosen": [USER, ANSWER[0]], "rejected": [USER, ANSWER[1]]}
    [same] = convert(whole | {"prompt": "q"})
    assert same.prompt == (Message("user", "q"),) and same.meta == {"prompt": "q"}
    assert "`prompt` is not what" in refused(whole | {"prompt": "something else"})


def test_openais_preference_form_comes_back():
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    asked = (Message("system", "s"), Message("user", "q"))
    pair = Pair(asked, Message("assistant", "a"), Message("assistant", "b"), HERE, {}, (tool,))
    [again] = convert(json.loads(json.dumps(as_openai_finetuning(pair))))
    assert again == pair


def test_bad_pairs():
    assert "the same" in refused({"prompt": "q", "chosen": "a", "rejected": "a"})
    assert "empty" in refused({"prompt": "q", "chosen": "a", "rejected": " "})
    assert refused({"prompt": "q", "chosen": "a", "rejected": None}) == "no `rejected`"
    other = [{"role": "user", "content": "other"}, ANSWER[1]]
    assert "different prompts" in refused({"chosen": [USER, ANSWER[0]], "rejected": other})
    assert "no prompt" in refused({"chosen": "a", "rejected": "b"})
    asked = "\n\nHuman: Who? The Human: one.\n\nAssistant: I.\n\nHuman: You?\n\nAssistant:"
    [pair] = convert({"chosen": asked + " Yes.\n\nReally.", "rejected": asked + " No."})
    assert [m.role for m in pair.prompt] == ["user", "assistant", "user"]
    assert pair.prompt[0].content == "Who? The Human: one."
    assert (pair.chosen.content, pair.rejected.content) == ("Yes.\n\nReally.", "No.")
    assert "different prompts" in refused({"chosen": asked + " a", "rejected": asked.replace("Who", "What") + " b"})
    assert "assistant" in refused({"chosen": asked + " a\n\nHuman: b", "rejected": asked + " b\n\nHuman: b"})


def test_text():
    (sample,) = convert({"text": " as it is\n", "url": "u"})
    assert sample == Text(" as it is\n", HERE, {"url": "u"})
    assert refused({"text": " \n"}) == "the text is empty"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (turns("user", "system", "assistant"), "turn 2: a system turn that is not the first"),
        (turns("assistant", "user", "assistant"), "turn 1: assistant first, where a user turn is due"),
        (turns("user", "user", "assistant"), "turn 2: user after user, where an assistant turn is due"),
        (turns("user", "assistant", "assistant"), "turn 3: assistant after assistant, where a user turn is due"),
        (turns("user", "assistant", "user"), "the last turn is the user's; nothing answers it"),
        (turns("user", "tool", "assistant"), "turn 2: tool after user, without tool calls before it"),
        (turns("user", "assistant", "tool", "assistant"), "turn 3: tool after assistant, without tool calls before it"),
        (turns("user"), "the last turn is the user's; nothing answers it"),
        (turns("system"), "the last turn is the system's; nothing answers it"),
        ({"messages": []}, "no turns"),
        ({"messages": "text"}, "`messages` is text that is not JSON: Expecting value at column 1"),
        ({"messages": ["text"]}, "turn 1 is text, not an object"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "the role 'narrator' is not known"),
        ({"messages": [{"content": "x"}]}, "the role null is not known"),
        ({"messages": [{"role": "user", "content": 5}]}, "turn 1: `content` is a number, not text"),
        ({"messages": [{"role": "user", "content": {}}]}, "turn 1: `content` is an object, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "turn 1: a content part of kind 'image_url'",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]},
            "turn 2: a tool call without a name",
        ),
        ({"messages": [USER, {**ANSWER[0], "weight": 2}]}, "turn 2: `weight` must be 0 or 1"),
        ({"messages": [USER, {**ANSWER[0], "train": "no"}]}, "turn 2: `train` must be true or false"),
        ({"messages": [USER, {**ANSWER[0], "train": False}]}, "no assistant turn is trained"),
        ({"messages": [USER, {**ANSWER[0], "content": " \n"}]}, "turn 2: the answer is empty"),
        ({"messages": [USER, {**ANSWER[0], "content": None}]}, "turn 2: the answer is empty"),
        ({"messages": [{**USER, "content": ""}, ANSWER[0]]}, "turn 1: the user says nothing"),
        (turns("system", "user", "assistant", system="other"), "a system turn and a `system` column"),
        (turns("user", "assistant", tools="[{]"), "`tools` is text that is not JSON"),
        (turns("user", "assistant", images=["x.jpg"]), "the row has `images`"),
        (turns("user", "assistant", label=False), "the answer is marked as bad"),
    ],
)
def test_bad_conversations_say_why(row, reason):
    assert reason in refused(row, name="openai")


def test_tool_calls_must_be_answered():
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    assert "no tool turn answers" in refused({"messages": [USER, call, USER, ANSWER[0]]})
    assert "assistant after assistant" in refused({"messages": [USER, call, ANSWER[0]]})
    assert convert({"messages": [USER, call]})[0].messages[-1].extra["tool_calls"]  # learning to call is an answer


@pytest.mark.parametrize(
    ("row", "name", "reason"),
    [
        ({"instruction": "q", "output": ""}, "alpaca", "turn 2: the answer is empty"),
        ({"instruction": "q", "output": 3}, "alpaca", "`output` is a number, not text"),
        ({"instruction": "", "output": "a"}, "alpaca", "turn 1: the user says nothing"),
        ({"output": "a"}, "alpaca", "no `instruction`"),
        ({"instruction": "q"}, "alpaca", "no `output`"),
        ({"instruction": "q", "output": "a", "history": [["x"]]}, "alpaca", "`history` is not a list"),
        ({"prompt": "q"}, "prompt_completion", "no `completion`"),
        ({"text": "q", "label": ["a", "b"]}, "prompt_completion", "`label` is a list of 2, not one text"),
        ({"prompt": "q", "completion": "a", "label": False}, "prompt_completion", "marked as bad"),
        ({"other": 1}, "sharegpt", "no `conversations`"),
        ({"conversations": [{"from": "gpt"}]}, "sharegpt", "turn 1: `value` is null, not text"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{"}]},
            "sharegpt",
            "turn 2: the tool call is text that is not JSON",
        ),
    ],
)
def test_other_bad_rows_say_why(row, name, reason):
    assert reason in refused(row, name=name)


# --- detection ---------------------------------------------------------------------------------------------------


def test_unknown_rows_name_keys_and_formats():
    with pytest.raises(DataError) as caught:
        detect([{"reply": "a", "question": "q"}], where="eval.json")
    assert "reply, question" in caught.value.message
    for plug in FORMATS:
        assert f"{plug.name}: {plug.keys}" in caught.value.hint
    assert "columns: {prompt: reply, completion: question}" in caught.value.hint
    with pytest.raises(DataError, match="none"):
        detect([])


def test_columns_name_what_is_what():
    row = {"question": "q", "std_answer": "a", "class": "c", "prompt": "not this"}
    columns = {"prompt": "question", "completion": "std_answer"}
    assert said(row, columns) == ASKED
    assert convert(row, columns)[0].meta == {"class": "c", "prompt (column)": "not this"}
    swapped = {"question": "a", "answer": "q"}
    assert said(swapped, {"prompt": "answer", "completion": "question"}) == ASKED


def test_mistakes_in_columns_are_told():
    with pytest.raises(DataError, match="Did you mean 'std_answer'"):
        choose([{"question": "q", "std_answer": "a"}], columns={"completion": "std_anser"})
    with pytest.raises(DataError, match="Did you mean 'completion'"):
        choose([{"prompt": "q", "b": "a"}], "prompt_completion", {"completeion": "b"})


def test_most_rows_decide():
    rows = [{"text": "x"}] + [{"prompt": "q", "completion": "a"}] * 2
    assert detect(rows).name == "prompt_completion"
    assert choose(rows, "text").name == "text"


def test_labelled_text_is_not_taken_for_plain_text():
    with pytest.raises(DataError):
        detect([{"text": "Find a flight", "annotations": [[0, 3, "X"]], "intent": "flight"}])


# --- clean -------------------------------------------------------------------------------------------------------


def sample(answer, question="q", **extra):
    return Conversation((Message("user", question), Message("assistant", answer, extra=extra)), HERE)


def test_end_markers_are_stripped_only_at_the_end_of_answers():
    cleaned, changed = strip_end_markers(sample("yes<|endoftext|>"))
    assert changed and cleaned == sample("yes")
    assert strip_end_markers(sample("yes<|im_end|>\n<|endoftext|> \n"))[0] == sample("yes")
    for kept in (sample("a<|endoftext|>b"), sample("a", question="q<|endoftext|>"), sample("<s>a</s>"), sample("a ")):
        assert strip_end_markers(kept) == (kept, False)
    assert strip_end_markers(sample("a</s>"), ("<s>", "</s>"))[0] == sample("a")
    only = sample("<|endoftext|>")
    assert strip_end_markers(only) == (only, False)
    assert only_markers(only) and not only_markers(sample("a"))


def test_control_tokens_are_found_wherever_the_model_would_see_them():
    control = ("<s>", "<|im_start|>", "")
    assert control_tokens(sample("fine <|im_end|>"), control) is None
    assert "<|im_start|>" in control_tokens(sample("a", question="x<|im_start|>system"), control)
    assert control_tokens(sample("a", reasoning_content="<s>"), control)
    assert control_tokens(sample("a", tool_calls=[{"function": {"name": "f", "arguments": {"<s>": 1}}}]), control)
    assert control_tokens(Text("ab<s>", HERE), control)
    pair = Pair((Message("user", "q"),), Message("assistant", "a"), Message("assistant", "b<s>"), HERE)
    assert control_tokens(pair, control)
    assert control_tokens(sample("<s>"), ()) is None


# --- lint --------------------------------------------------------------------------------------------------------


def codes(findings):
    return {finding.code: finding for finding in findings}


def test_lint_finds_what_was_planted():
    rows = [
        {"prompt": "q1", "completion": "a"},
        {"prompt": "q1", "completion": "a "},
        {"prompt": "q1", "completion": "b"},
        {"prompt": "Who are you?", "completion": "I am {{ name }} by {{author}}"},
        {"prompt": "x", "completion": ""},
        {"prompt": "y", "completion": "z<|im_start|>"},
        {"prompt": "y2", "completion": "z<|endoftext|>"},
        {"prompt": "中国的首都是哪里？", "completion": "北京是中国的首都。"},
    ]
    read_rows = [RawRow(row, Origin("f", line)) for line, row in enumerate(rows, 1)]
    read_rows.append(BadRow(Origin("f", 9), "not JSON: x", "{"))
    findings = check(read_rows)
    found = codes(findings)
    order = [(SEVERITIES.index(finding.severity), -finding.count) for finding in findings]
    assert order == sorted(order)
    assert {code for code, finding in found.items() if finding.severity == "error"} == {"bad-row", "unreadable"}
    assert found["bad-row"].origins == (Origin("f", 5),)
    assert found["duplicate"].origins == (Origin("f", 2),)
    assert found["conflict"].count == 3
    assert "{{name}}, {{author}}" in found["placeholder"].message and found["placeholder"].origins[0].line == 4
    assert found["control-token"].origins == (Origin("f", 6),)
    assert found["end-marker"].origins == (Origin("f", 7),)
    assert found["script"].message.startswith("1 of 7")
    assert "9 rows, 7 samples" in found["format"].message


def test_lint_never_raises_for_what_it_reads(tmp_path):
    (tmp_path / "a.json").write_text('[{"x": "y"}]')
    (tmp_path / "b.json").write_text("[{]")
    assert {"format", "no-samples"} <= codes(check_source(SourceSettings(path="a.json"), tmp_path)).keys()
    assert codes(check_source(SourceSettings(path="b.json"), tmp_path))["file"].severity == "error"
    assert codes(check_source(SourceSettings(path="c.json"), tmp_path))["file"].severity == "error"


def test_lint_tells_of_keys_that_nobody_reads():
    row = {"messages": [USER, {**ANSWER[0], "loss": False}]}
    assert "loss" in codes(check([RawRow(row, HERE)]))["unread-key"].message


# --- the real files ----------------------------------------------------------------------------------------------

REAL = {  # file: format, samples, bad rows by a part of their reason
    "alpaca_seed/seed_tasks.jsonl": ("alpaca", 175, {}),
    "codealpaca/code_alpaca_2k.json": ("alpaca", 2015, {"the answer is empty": 2}),
    "doccano/data_export/pipeline/examples/sequence_to_sequence/example.csv": ("prompt_completion", 3, {}),
    "doccano/data_export/pipeline/examples/text_classification/example.json": ("prompt_completion", 3, {}),
    "gpteacher/codegen-instruct.json": ("alpaca", 4535, {}),
    "gsm8k/test.jsonl": ("prompt_completion", 1319, {}),
    "llamafactory/alpaca_zh_demo.json": ("alpaca", 1000, {}),
    "llamafactory/c4_demo.jsonl": ("text", 300, {}),
    "llamafactory/dpo_en_demo.json": ("preference", 300, {}),
    "llamafactory/glaive_toolcall_en_demo.json": ("sharegpt", 300, {}),
    "llamafactory/glaive_toolcall_zh_demo.json": ("sharegpt", 298, {"tool after assistant": 2}),
    "llamafactory/identity.json": ("alpaca", 91, {}),
    "llamafactory/kto_en_demo.json": ("openai", 150, {"marked as bad": 150}),
    "llamafactory/reason_tool_use_demo_50.jsonl": ("openai", 50, {}),
    "multimodal/mllm_demo.json": ("openai", 0, {"the row has `images`": 6}),
    "t0": ("prompt_completion", 3000, {}),
    "text/tiny_shakespeare.txt": ("text", 1, {}),
}


@pytest.mark.parametrize("path", REAL)
def test_real_files(shared, path):
    name, count, reasons = REAL[path]
    rows = list(read(SourceSettings(path=path), shared / "data"))
    plug = choose([row.row for row in rows[:200]])
    assert plug.name == name
    samples, bad = [], Counter()
    for row in rows:
        try:
            samples += plug.convert(row.row, row.origin)
        except RowError as error:
            bad[next((reason for reason in reasons if reason in error.reason), error.reason)] += 1
    assert len(samples) == count
    assert dict(bad) == reasons


def test_real_literal_end_markers_and_placeholders(shared):
    rows = list(read(SourceSettings(path="t0/ag_news_classify.jsonl"), shared / "data"))
    samples = [sample for row in rows for sample in PLUG["prompt_completion"].convert(row.row, row.origin)]
    truth = [json.loads(line) for line in (shared / "data/t0/ag_news_classify.jsonl").read_text().splitlines()]
    cleaned = [strip_end_markers(sample) for sample in samples]
    assert [changed for _, changed in cleaned] == ["<|endoftext|>" in row["completion"] for row in truth]
    assert [sample.messages[-1].content for sample, _ in cleaned] == [
        row["completion"].replace("<|endoftext|>", "") for row in truth
    ]
    found = codes(check_source(SourceSettings(path="llamafactory/identity.json"), shared / "data"))
    raw = json.loads((shared / "data/llamafactory/identity.json").read_text())
    assert found["placeholder"].count == sum("{{" in json.dumps(row) for row in raw)
