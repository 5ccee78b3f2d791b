"""Quarantine and repair: every suggestion converts, accepted rows go in again, and every stage adds up."""

from __future__ import annotations

import json

import pytest

from fitout.chat.types import Origin
from fitout.data import DataSettings, SourceSettings
from fitout.data.formats import FORMATS, choose
from fitout.data.ledger import Ledger
from fitout.data.prepare import kept_samples, prepare
from fitout.data.repair import accepted, draft, rule_of, suggest
from fitout.errors import CheckError, DataError, FitoutError
from fitout.files import read_jsonl, write_jsonl
from fitout.rundir import RunDir

HERE = Origin("rows.jsonl", 1)


def test_a_file_of_repairs_is_read_as_people_write_it(tmp_path):
    """Without a newline at the end, with an empty line; and what is no repair is named with its place."""
    path = tmp_path / "repairs.jsonl"
    one, other = (json.dumps({"id": name, "accept": True, "row": {"prompt": "q\u2028", "completion": "a"}},
                             ensure_ascii=False) for name in "ab")  # fmt: skip
    path.write_text(f"{one}\n\n{other}", encoding="utf-8")
    assert list(accepted(path)) == ["a", "b"]
    for bad in ("{", "[1]", "[" * 100_000):
        path.write_text(f"{one}\n{bad}", encoding="utf-8")
        with pytest.raises(DataError, match="this is no repair") as error:
            accepted(path)
        assert error.value.where == f"{path}:2"
    with pytest.raises(FitoutError):
        accepted(tmp_path)


def plug(name):
    return next(plug for plug in FORMATS if plug.name == name)


def turns(*roles_and_texts):
    return {"messages": [{"role": role, "content": text} for role, text in roles_and_texts]}


@pytest.mark.parametrize(
    ("raw", "form", "wanted"),
    [
        ('{"instruction": "a", "output": "b"', "alpaca", {"instruction": "a", "output": "b"}),
        ('{"instruction": "a", "output": "b",}', "alpaca", {"instruction": "a", "output": "b"}),
        ("{'instruction': 'a', 'output': 'b'}", "alpaca", {"instruction": "a", "output": "b"}),
        ('{"instruction": "a", "output": 7', "alpaca", {"instruction": "a", "output": "7"}),
        ({"instruction": "a", "output": 7}, "alpaca", {"instruction": "a", "output": "7"}),
        ({"instruction": "a", "output": ["b", "c"]}, "alpaca", {"instruction": "a", "output": "b\nc"}),
        (
            turns(("user", "a"), ("user", "b"), ("assistant", "c")),
            "openai",
            turns(("user", "a\n\nb"), ("assistant", "c")),
        ),
        (
            turns(("system", "s"), ("assistant", "x"), ("user", "a"), ("assistant", "c"), ("user", "z")),
            "openai",
            turns(("system", "s"), ("user", "a"), ("assistant", "c")),
        ),
        (
            turns(("user", "a"), ("assistant", "c"), ("assistant", " ")),
            "openai",
            turns(("user", "a"), ("assistant", "c")),
        ),
    ],
)
def test_what_is_suggested(raw, form, wanted):
    repair = suggest(raw, HERE, plug(form), None)
    assert repair is not None and repair.row == wanted and repair.how


@pytest.mark.parametrize(
    ("raw", "form"),
    [
        ({"instruction": "a", "output": ""}, "alpaca"),
        ({"instruction": "a"}, "alpaca"),
        ("no json at all", "alpaca"),
        ("[1, 2", "alpaca"),
        (turns(("user", "a")), "openai"),
        (turns(("assistant", "a")), "openai"),
    ],
)
def test_nothing_is_made_up(raw, form):
    assert suggest(raw, HERE, plug(form), None) is None


def test_every_reason_of_the_real_files_has_a_rule(shared):
    """Over all files of the catalogue: each refusal falls under a rule, and each suggestion converts."""
    from fitout.data.formats import Refused, convert
    from fitout.data.sources import BadRow, list_files, read
    from fitout.errors import FitoutError

    refused = suggested = 0
    for folder in ("llamafactory", "alpaca_seed", "codealpaca", "gpteacher", "t0"):
        for path, _ in list_files(SourceSettings(path=folder), shared / "data").files:
            source = SourceSettings(path=str(path), limit=300)
            try:
                rows = list(read(source, shared))
                form = choose([row.row for row in rows[:50] if not isinstance(row, BadRow)])
            except FitoutError:
                continue
            for row in rows:
                for one in convert(form, row):
                    if isinstance(one, Refused):
                        refused += 1
                        assert rule_of(one.reason) != "not a sample", one.reason
                        repair = suggest(one.raw, one.origin, form, None)
                        if repair:
                            suggested += 1
                            assert form.convert(repair.row, one.origin)
    assert refused > 0


def broken_rows():
    good = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(30)]
    return [
        *map(json.dumps, good),
        '{"instruction": "cut", "output": "short"',
        json.dumps({"instruction": "number", "output": 12}),
        json.dumps({"instruction": "empty", "output": ""}),
        json.dumps({"instruction": "forged", "output": "a<|endoftext|>b"}),
        json.dumps(
            {"instruction": "many", "instances": [{"input": "1", "output": "one"}, {"input": "2", "output": 2}]}
        ),
    ]


def made(tmp_path, chat):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(broken_rows()) + "\n")
    settings = DataSettings(sources=[{"path": str(path)}], max_length=64)
    run = RunDir(tmp_path / "run")
    prepared, report = prepare(settings, chat, "conversation", run)
    return run, prepared, report


def adds_up(report):
    for stage in report["stages"]:
        out = stage["left"] + sum(stage["quarantined"].values()) + sum(stage["removed"].values())
        assert stage["came"] + sum(stage["made"].values()) == out, stage
    for before, after in zip(report["stages"], report["stages"][1:], strict=False):
        assert before["left"] == after["came"]
    assert report["stages"][-1]["left"] == sum(report["kept"].values())
    assert report["samples"] == sum(
        sum(report[what].values()) for what in ("kept", "quarantined", "removed")
    )  # fmt: skip


def test_accepted_repairs_go_in_again_and_the_sum_holds(tmp_path, chat):
    """35 rows, one of them with two instances: 36 samples, five bad, four of them repairable."""
    run, before, report = made(tmp_path, chat)
    adds_up(report)
    assert report["samples"] == 36 and sum(report["kept"].values()) == 31
    assert report["quarantined"] == {
        "wrong type": 2, "unreadable row": 1, "empty answer": 1, "control token": 1,
    }  # fmt: skip
    bad = read_jsonl(run.quarantine)
    assert {row["line"] for row in bad if row["repair"]} == {31, 32, 34, 35}
    asked = draft(bad, [], [])
    accepted_all = draft(bad, asked, ["all"])
    assert not any(line["accept"] for line in asked) and sum(line["accept"] for line in accepted_all) == 4
    write_jsonl(run.repairs, accepted_all)
    again = made(tmp_path, chat)[2]
    adds_up(again)
    assert again["samples"] == 36 and sum(again["kept"].values()) == 35
    assert again["repaired"] == {"accepted repair": 4} and again["quarantined"] == {"empty answer": 1}
    said = {s.messages[0].content: s.messages[-1].content for part in ("train", "validation", "test")
            for s in kept_samples(run, part)}  # fmt: skip
    assert said["cut"] == "short" and said["number"] == "12" and said["many\n2"] == "2"
    assert said["forged"] == "a< |endoftext|>b"


def test_a_repair_by_hand_and_one_that_does_not_help(tmp_path, chat):
    run, _, _ = made(tmp_path, chat)
    lines = draft(read_jsonl(run.quarantine), [], [])
    assert accepted(run.repairs) == {} and not any(line["accept"] for line in lines)
    for line in lines:
        if line["rule"] == "empty answer":
            line |= {"accept": True, "row": {"instruction": "empty", "output": "written by hand"}}
        elif line["line"] == 32:
            line |= {"accept": True, "row": {"instruction": "number", "output": "  "}}
    write_jsonl(run.repairs, lines)
    _, _, report = made(tmp_path, chat)
    adds_up(report)
    assert report["quarantined"]["empty answer"] == 1  # the one that still is empty
    assert "the accepted repair: turn 2: the answer is empty" in report["reasons"]["empty answer"]
    said = [s.messages[-1].content for part in ("train", "validation", "test") for s in kept_samples(run, part)]
    assert "written by hand" in said


def test_several_recipes_share_one_file_of_repairs(tmp_path, chat):
    run, _, _ = made(tmp_path, chat)
    lines = draft(read_jsonl(run.quarantine), [], ["all"])
    write_jsonl(tmp_path / "mine.jsonl", lines)
    settings = DataSettings(
        sources=[{"path": str(tmp_path / "rows.jsonl")}], max_length=64, repairs=str(tmp_path / "mine.jsonl")
    )
    one, report = prepare(settings, chat, "conversation", RunDir(tmp_path / "one"))
    assert report["repaired"] == {"accepted repair": 4}
    (tmp_path / "mine.jsonl").rename(tmp_path / "moved.jsonl")
    settings.repairs = str(tmp_path / "moved.jsonl")
    two, _ = prepare(settings, chat, "conversation", RunDir(tmp_path / "one"))
    assert two.fingerprint == one.fingerprint  # what the file says counts, not where it is
    lines[0]["accept"] = False
    write_jsonl(tmp_path / "moved.jsonl", lines)
    assert prepare(settings, chat, "conversation", RunDir(tmp_path / "one"))[0].fingerprint != one.fingerprint


def test_a_repair_is_not_for_a_row_that_changed(tmp_path, chat):
    run, _, _ = made(tmp_path, chat)
    write_jsonl(run.repairs, draft(read_jsonl(run.quarantine), [], ["unreadable row"]))
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace('"cut", "short"', '"cut", "other"'))
    assert read_jsonl(run.repairs)[0]["accept"]
    text = path.read_text().replace('"output": "short"', '"output": "another"')
    path.write_text(text)
    settings = DataSettings(sources=[{"path": str(path)}], max_length=64)
    _, report = prepare(settings, chat, "conversation", run)
    assert report["quarantined"]["unreadable row"] == 1


def test_an_accepted_line_without_a_row_is_an_error(tmp_path):
    write_jsonl(tmp_path / "repairs.jsonl", [{"accept": True, "id": "x"}])
    with pytest.raises(DataError, match="without `id` or `row`"):
        accepted(tmp_path / "repairs.jsonl")


def test_a_stage_that_loses_a_sample_is_told():
    ledger = Ledger()
    stage = ledger.begin("read", 5)
    stage.removed["rule"] += 1
    stage.left = 4
    after = ledger.begin("clean")
    after.left = 4
    ledger.check()
    after.left = 3
    with pytest.raises(CheckError, match="`clean`"):
        ledger.check()
    after.left, after.came = 3, 3
    with pytest.raises(CheckError, match="`read` left 4"):
        ledger.check()
