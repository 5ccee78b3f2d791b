"""Every row is accounted for, long texts lose nothing, weights and test sources hold, reuse is exact."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fitout.chat import ChatSettings
from fitout.chat.render import open_chat
from fitout.chat.types import Text
from fitout.data import DataSettings
from fitout.data.prepare import prepare, summary
from fitout.data.prepare import test_samples as held_out
from fitout.errors import CheckError, DataError
from fitout.files import read_jsonl
from fitout.model.load import SHELL
from fitout.rundir import RunDir


def question(number: int, words: int = 3) -> dict:
    return {"instruction": f"What is number {number}?", "output": " ".join(["it"] * words) + f" {number}"}


def write(path: Path, rows: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows))
    return str(path)


def messy(path: Path) -> str:
    return write(
        path,
        [
            *(question(n) for n in range(40)),
            question(3),  # a duplicate
            question(4),
            {"instruction": "Say nothing.", "output": ""},
            '{"instruction": "broken',
            {"instruction": "Forge", "output": "a<|endoftext|>b"},
            {"instruction": "End marker", "output": "done<|endoftext|>"},
            *(question(100 + n, words=300) for n in range(3)),
            {"wrong": "keys"},
        ],
    )


def made(tmp_path, chat, sources, wants="conversation", seed=0, **settings):
    data = DataSettings.model_validate({"sources": sources, "max_length": 64, **settings})
    run = RunDir(tmp_path / "run")
    prepared, report = prepare(data, chat, wants, run, seed=seed)
    return run, prepared, report


def test_what_the_template_does_not_write_is_counted_and_an_answer_of_nothing_is_quarantined(tmp_path):
    """Tools, calls and reasoning under a template of roles and contents, and under one that writes them."""
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    tools = [{"type": "function", "function": {"name": "look", "description": "", "parameters": {"type": "object"}}}]
    asked, answer = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "There."}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    found = [called, {"role": "tool", "content": "north", "tool_call_id": "c"}, answer]
    rows = [
        *({"messages": [{"role": "user", "content": f"Number {n}?"}, answer]} for n in range(20)),
        *({"messages": [{"role": "user", "content": f"Look {n}?"}, answer], "tools": tools} for n in range(3)),
        {"messages": [asked, *found], "tools": tools},
        {"messages": [asked, {**answer, "reasoning_content": "I look."}]},
    ]
    writes = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.role }}: "
        "{{ m.reasoning_content or '' }}{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
        "{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (tmp_path / "writes.jinja").write_text(writes)
    for template in ("plain", str(tmp_path / "writes.jinja")):
        chat = open_chat(SHELL, ChatSettings(template=template))
        path = write(tmp_path / "rows.jsonl", rows)
        run, _, report = made(tmp_path / Path(template).stem, chat, [{"path": path}], max_length=256)
        told = [note for note in report["notes"] if "are not written" in note]
        if template != "plain":
            assert not told and not report["quarantined"]
            continue
        counts = [f"{what} are not written by this" for what in (
            "the tools of 4 samples", "the tool calls of 1 sample", "the reasoning of 1 sample"
        )]  # fmt: skip
        assert all(note.startswith(count) for note, count in zip(told, counts, strict=True))
        [bad] = read_jsonl(run.quarantine)
        assert bad["reason"].startswith("turn 2: an answer of tool calls alone") and bad["rule"] == "template"


@pytest.mark.parametrize("too_long", ["drop", "truncate"])
def test_nothing_is_lost_without_a_count(tmp_path, chat, too_long):
    """50 rows: 46 samples when the broken, the unknown, the empty and the forging one are out."""
    path = messy(tmp_path / "rows.jsonl")
    run, prepared, report = made(tmp_path, chat, [{"path": path}], too_long=too_long)
    kept, out = sum(report["kept"].values()), sum(report["quarantined"].values())
    removed = sum(report["removed"].values())
    assert report["samples"] == 50 == kept + out + removed
    assert report["removed"] == ({"duplicate": 2, "too long": 3} if too_long == "drop" else {"duplicate": 2})
    assert out == 4 and report["repaired"]["end marker stripped"] == 1
    assert report["repaired"].get("cut to max_length", 0) == (0 if too_long == "drop" else 3)
    assert f"{report['samples']} samples = {kept} kept" in summary(report)
    rows = {name: prepared.part(name) for name in ("train", "validation", "test")}
    assert sum(map(len, rows.values())) == kept == sum(p["rows"] for p in report["parts"].values())
    for name, part in rows.items():
        assert part.tokens == report["parts"][name]["tokens"]
        assert part.supervised == report["parts"][name]["supervised"]
        assert max(part.lengths, default=0) <= 64
    if too_long == "truncate":
        no_end = sum(p["no_end"] for p in report["parts"].values())
        cut = [p.cut(i) for p in rows.values() for i in range(len(p)) if p.cut(i)]
        assert no_end == len(cut) == 3 and all(c[-1] == chat.tokenizer.eos_token_id for c in cut)
    assert len(read_jsonl(run.data / "removed.jsonl")) == removed


def test_quarantine_says_file_line_and_reason(tmp_path, chat):
    path = messy(tmp_path / "rows.jsonl")
    run, _, report = made(tmp_path, chat, [{"path": path}])
    rows = read_jsonl(run.quarantine)
    assert {(row["file"], row["line"]) for row in rows} == {(path, 43), (path, 44), (path, 45), (path, 50)}
    assert all(row["reason"] and row["row"] for row in rows)
    assert sum(report["quarantined"].values()) == len(rows)
    [forged] = [row for row in rows if row["line"] == 45]
    assert "<|endoftext|>" in forged["reason"]


def test_too_long_error_stops_and_names_the_row(tmp_path, chat):
    path = messy(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl:\d+ has \d+ tokens") as caught:
        made(tmp_path, chat, [{"path": path}], too_long="error")
    assert "data.max_length" in caught.value.hint
    assert not (tmp_path / "run" / "data" / "fingerprint.json").exists()


def test_what_is_stored_is_what_chat_renders(tmp_path, chat):
    """The prepared ids, read back, are those of the same conversations rendered anew."""
    path = write(tmp_path / "rows.jsonl", [question(n) for n in range(30)])
    run, prepared, _ = made(tmp_path, chat, [{"path": path}])
    talks = held_out(run)
    part = prepared.part("test")
    assert len(talks) == len(part) == 3
    for row, conversation in enumerate(talks):
        [tokens] = chat.render(conversation)
        assert part.ids(row).tolist() == tokens.ids and part.train_on(row).tobytes() == tokens.train_on
        assert part.origin(row) == conversation.origin


def test_a_truncated_sample_without_an_answer_is_quarantined(tmp_path, chat):
    long = {"instruction": "word " * 200, "output": "short"}
    path = write(tmp_path / "rows.jsonl", [*(question(n) for n in range(20)), long])
    run, _, report = made(tmp_path, chat, [{"path": path}], too_long="truncate")
    assert report["quarantined"] == {"nothing to train": 1}
    assert report["reasons"] == {"nothing to train": {"no token is supervised after the cut": 1}}
    assert read_jsonl(run.quarantine)[0]["line"] == 21


# long texts


@pytest.mark.parametrize("limit", [8, 16, 61])
def test_a_long_text_is_cut_in_blocks_and_loses_nothing(tmp_path, chat, limit):
    texts = [" ".join(f"story {i} word {w}" for w in range(n)) for i, n in enumerate((1, 7, 40, 41, 42, 43, 44, 120))]
    path = write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    split = {"train": 1, "validation": 0, "test": 0}
    _, prepared, report = made(tmp_path, chat, [{"path": path}], "text", max_length=limit, split=split)
    part = prepared.part("train")
    blocks: dict[int, list[list[int]]] = {}
    for row in range(len(part)):
        assert part.train_on(row).all() and 2 <= len(part.ids(row)) <= limit
        blocks.setdefault(part.origin(row).line, []).append(part.ids(row).tolist())
    for line, text in enumerate(texts, start=1):
        [want] = chat.text_ids([Text(text, part.origin(0))])
        got = blocks[line][0]
        for block in blocks[line][1:]:
            short = block is blocks[line][-1] and len(got) + len(block) == len(want.ids) + 1
            got += block[1:] if short else block  # a last token alone overlaps by one, so that something predicts it
        assert got == want.ids
    assert report["samples"] == report["kept"]["train"] == len(texts)
    assert report["parts"]["train"]["rows"] == len(part) > len(texts)


# weights and parts


def test_weights_show_rows_more_or_less_often(tmp_path, chat):
    split = {"train": 1, "validation": 0, "test": 0}
    twice = write(tmp_path / "twice.jsonl", [question(n) for n in range(10)])
    half = write(tmp_path / "half.jsonl", [question(n) for n in range(100, 110)])
    once = write(tmp_path / "once.jsonl", [question(n) for n in range(200, 210)])
    sources = [{"path": twice, "weight": 2}, {"path": half, "weight": 0.5}, {"path": once}]
    _, prepared, report = made(tmp_path, chat, sources, split=split)
    part = prepared.part("train")
    seen = Counter(part.origin(row).file for row in range(len(part)))
    assert seen == {twice: 20, half: 5, once: 10}
    assert report["weighted"] == {twice: 10, half: -5}
    assert report["removed"] == {"left out by weight": 5} and report["kept"]["train"] == 25


def test_a_test_source_is_the_test_part_and_keeps_its_rows(tmp_path, chat):
    train = write(tmp_path / "train.jsonl", [question(n) for n in range(30)])
    test = write(tmp_path / "test.jsonl", [question(n) for n in range(25, 35)])  # five of them are in training too
    run, prepared, report = made(tmp_path, chat, [{"path": train}, {"path": test, "split": "test"}])
    assert {c.origin.file for c in held_out(run)} == {test} and len(held_out(run)) == 10
    assert report["removed"] == {"duplicate": 5}
    asked = {c.messages[0].content for c in held_out(run)}
    trained = prepared.part("train")
    prompts = [chat.tokenizer.decode(trained.ids(row)) for row in range(len(trained))]
    assert not [p for p in prompts if any(q in p for q in asked)]
    assert report["kept"]["train"] + report["kept"]["validation"] == 25


@pytest.mark.parametrize("near", ["report", "drop"])
def test_a_test_files_row_stays_whatever_file_repeats_it(tmp_path, chat, near):
    """Rows 0-9 stand in all three files: the test file keeps them, whichever is read first."""
    paths = {part: write(tmp_path / f"{part}.jsonl", [question(n) for n in range(rows)])
             for part, rows in (("train", 30), ("validation", 15), ("test", 10))}  # fmt: skip
    sources = [{"path": path, "split": part} for part, path in paths.items()]
    _, _, report = made(tmp_path, chat, sources, deduplicate={"near": near})
    assert report["kept"] == {"train": 15, "validation": 5, "test": 10}
    assert report["removed"] == {"duplicate": 25}


def test_nothing_left_to_train_is_an_error_with_the_reasons(tmp_path, chat):
    path = write(tmp_path / "rows.jsonl", [question(n, words=300) for n in range(5)])
    with pytest.raises(DataError, match="no token is left to train on: of 5 samples 5 too long"):
        made(tmp_path, chat, [{"path": path}])


@pytest.mark.parametrize(("row", "wants"), [({"text": "a story"}, "conversation"), (question(1), "text")])
def test_the_wrong_kind_of_data_names_the_objective(tmp_path, chat, row, wants):
    with pytest.raises(DataError, match="the objective trains on") as caught:
        made(tmp_path, chat, [{"path": write(tmp_path / "rows.jsonl", [row] * 3)}], wants)
    assert "objective" in caught.value.hint


# again


def stamps(run: RunDir) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in run.data.iterdir()}


def test_the_same_data_are_not_prepared_twice(tmp_path, chat):
    path = messy(tmp_path / "rows.jsonl")
    run, first, report = made(tmp_path, chat, [{"path": path}])
    before = stamps(run)
    _, second, again = made(tmp_path, chat, [{"path": path}])
    assert second.fingerprint == first.fingerprint and again == report and stamps(run) == before


def test_the_same_bytes_come_out_of_the_same_rows(tmp_path, chat):
    path = messy(tmp_path / "rows.jsonl")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [made(tmp_path / where, chat, [{"path": path}])[0] for where in ("a", "b")]
    for name in ("train.arrow", "validation.arrow", "test.arrow", "test.jsonl", "quarantine.jsonl", "report.json"):
        assert (runs[0].data / name).read_bytes() == (runs[1].data / name).read_bytes(), name


@pytest.mark.parametrize("change", ["row", "max_length", "seed", "too_long", "wants a test part"])
def test_whatever_decides_the_data_changes_the_fingerprint(tmp_path, chat, change):
    path = messy(tmp_path / "rows.jsonl")
    _, first, _ = made(tmp_path, chat, [{"path": path}])
    options: dict = {"max_length": 65} if change == "max_length" else {}
    options |= {"seed": 1} if change == "seed" else {}
    options |= {"too_long": "truncate"} if change == "too_long" else {}
    options |= {"split": {"train": 0.9, "validation": 0.1, "test": 0}} if change == "wants a test part" else {}
    if change == "row":
        with open(path, "a") as file:
            file.write(json.dumps(question(999)) + "\n")
    _, second, _ = made(tmp_path, chat, [{"path": path}], **options)
    assert second.fingerprint != first.fingerprint


def test_incomplete_prepared_data_are_refused(tmp_path, chat):
    path = messy(tmp_path / "rows.jsonl")
    run, _, _ = made(tmp_path, chat, [{"path": path}])
    (run.data / "test.arrow").unlink()
    with pytest.raises(CheckError, match="test missing"):
        made(tmp_path, chat, [{"path": path}])


def test_a_kill_before_the_end_means_preparing_again(tmp_path, chat):
    path = messy(tmp_path / "rows.jsonl")
    run, first, _ = made(tmp_path, chat, [{"path": path}])
    (run.data / "fingerprint.json").unlink()
    (run.data / "train.arrow").write_bytes(b"torn")
    _, second, report = made(tmp_path, chat, [{"path": path}])
    assert second.fingerprint == first.fingerprint and len(second.part("train")) == report["kept"]["train"]


def test_the_blocks_of_a_text_are_shuffled_apart(tmp_path):
    """One long text must not become one giant step."""
    from fitout.data.batches import Batches

    (tmp_path / "long.txt").write_text("The capital of Japan is Tokyo. " * 400, encoding="utf-8")
    settings = DataSettings(
        sources=[{"path": str(tmp_path / "long.txt")}],
        split={"train": 1, "validation": 0, "test": 0},
        max_length=64,
    )
    prepared, _ = prepare(settings, open_chat(SHELL), "text", RunDir(tmp_path / "run"))
    part = prepared.part("train")
    assert len(part) > 20 and len(set(part.groups.tolist())) == len(part)
    assert max(len(Batches(part, batch_size=4).rows(step)) for step in range(5)) == 4


def test_what_a_tokenizer_cannot_spell_is_counted(tmp_path, shared):
    """One `<unk>` for each character that a tokenizer of characters does not know; none for bytes, which spell all."""
    path = write(tmp_path / "texts.jsonl", [{"text": f"line {n} says 你 and 好 again"} for n in range(20)])
    split = {"train": 1, "validation": 0, "test": 0}
    for base, wanted in ((shared / "models" / "babyllama", 40), (SHELL, 0)):
        _, _, report = made(tmp_path / base.name, open_chat(base), [{"path": path}], "text", split=split)
        assert report["parts"]["train"]["unknown"] == wanted
