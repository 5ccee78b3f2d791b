"""Each rule against hand-made damage and against real text that it must leave alone; personal data by check digits."""

from __future__ import annotations

import json
import unicodedata

import pytest
from pydantic import ValidationError

from fitout.chat.render import open_chat
from fitout.chat.types import Conversation, Message, Origin, Text
from fitout.data import CleanSettings, DataSettings, PersonalSettings, SourceSettings
from fitout.data.clean import (
    Cleaner,
    composed,
    copied,
    language,
    refusal,
    without_controls,
    without_html,
    without_mojibake,
    wrong_language,
)
from fitout.data.formats import Refused, choose, convert
from fitout.data.personal import find, masked, veiled
from fitout.data.prepare import kept_samples, prepare
from fitout.data.sources import read
from fitout.errors import RequestError
from fitout.model.load import SHELL
from fitout.rundir import RunDir

ALL = PersonalSettings(regions=["US", "CN", "DE"])


def talk(question, answer, line=1):
    return Conversation((Message("user", question), Message("assistant", answer)), Origin("f", line))


# texts


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        (without_controls, "a\x00b\x07c", "abc"),
        (without_controls, "\x1b[31mred\x1b[0m", "red"),
        (without_controls, "a\ufeffb", "ab"),
        (without_controls, "tab\tline\r\nnext", None),
        (without_mojibake, "cafÃ© â€œquotedâ€\x9d", "café “quoted”"),
        (without_mojibake, "the formula A = Ï€ * r^2", "the formula A = π * r^2"),
        (without_mojibake, "fun\x97TOO much", "fun—TOO much"),
        (without_mojibake, "naïve café Ångström Ärger Привет", None),
        (without_mojibake, "你好，世界", None),
        (composed, unicodedata.normalize("NFD", "café"), "café"),
        (composed, "café", None),
        (without_html, "one<br />two &amp; three", "one\ntwo & three"),
        (without_html, "&lt;b&gt;bold&lt;/b&gt; text", "bold text"),
        (without_html, "<p>You&#39;re <b>here</b></p>", "You're here\n"),
        (without_html, "a < b and c > d & e", None),
    ],
)
def test_what_a_rule_does(rule, before, after):
    if after is None:
        assert rule(before) is before
    else:
        assert rule(before) == after and rule(after) == after


def test_nothing_clean_is_changed_by_default(shared):
    """Over real files in two languages, rules that change text touch only what is damaged: here, 2 of 6,854 rows."""
    cleaner = Cleaner(CleanSettings(), [])
    changed = []
    for name in ("gsm8k/test.jsonl", "llamafactory/alpaca_zh_demo.json", "codealpaca/new_codealpaca.json"):
        rows = list(read(SourceSettings(path=name), shared / "data"))
        plug = choose([row.row for row in rows[:50]])
        for row in rows:
            for sample in convert(plug, row):
                if not isinstance(sample, Refused) and cleaner.clean(sample)[1]:
                    changed.append(sample)
    assert len(changed) == 2
    assert all("Ï€" in str(sample) or "Â°" in str(sample) for sample in changed)


def test_html_is_left_where_html_or_code_is_meant():
    cleaner = Cleaner(CleanSettings(html="fix"), [])
    for question in ("What does this HTML do? <br>", "Explain <p>{props.name}</p>", "```\n<b>x</b>\n```"):
        sample = talk(question, "It breaks the line.")
        assert cleaner.clean(sample) == (sample, [], None)
    fixed, changed, _ = cleaner.clean(talk("Is it good? Great film.<br /><br />Loved it.", "yes"))
    assert changed == ["html"] and fixed.messages[0].content == "Is it good? Great film.\n\nLoved it."


# answers


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("As an AI language model, I cannot do that.", True),
        ("I'm sorry, but as an AI I don't have feelings.", True),
        ("作为一个人工智能语言模型，我没有个人意见。", True),
        ('print("Hello, I am an AI language model!")', False),
        ("An AI language model predicts the next token.", False),
        ("作为一名医生，他救了很多人。", False),
    ],
)
def test_refusals(answer, found):
    assert (refusal(talk("q", answer)) is not None) == found


def test_copied_answers():
    assert copied(talk("Say  Hello ", "say hello")) and not copied(talk("Say hello", "Hello"))
    untrained = Conversation((Message("user", "a"), Message("assistant", "a", train=False)), Origin("f", 1))
    assert copied(untrained) is None


ENGLISH = "The capital of France is Paris, which lies on the Seine and has about two million inhabitants in all."
CHINESE = "法国的首都是巴黎，它位于塞纳河畔，大约有两百万居民，是欧洲重要的文化和经济中心之一，也是著名的旅游城市。"
GERMAN = "Die Hauptstadt von Frankreich ist Paris, das an der Seine liegt und etwa zwei Millionen Einwohner hat."


def test_languages():
    assert [language(text) for text in (ENGLISH, CHINESE, GERMAN, "Paris")] == ["en", "zh", "de", None]
    assert wrong_language(talk(CHINESE, ENGLISH)).startswith("zh -> en")
    assert wrong_language(talk(CHINESE, CHINESE)) is None
    assert wrong_language(talk("请把下面的句子翻译成英文：" + CHINESE, ENGLISH)) is None
    assert wrong_language(talk("What is the capital?", GERMAN), ["en", "zh"]).startswith("de")
    assert wrong_language(talk("What is the capital?", ENGLISH), ["en", "zh"]) is None


def test_codes_of_languages_are_those_that_the_detector_gives():
    with pytest.raises(ValidationError):
        CleanSettings(languages=["english"])
    with pytest.raises(RequestError, match="qq, en-UK: no language") as error:
        Cleaner(CleanSettings(languages=["en", "qq", "en-UK"]), [])
    assert error.value.where == "data.clean.languages"
    cleaner = Cleaner(CleanSettings(language="drop", languages=["zh-Hant"]), [])
    assert cleaner.clean(talk("What is the capital?", CHINESE))[2] is None
    assert cleaner.clean(talk("What is the capital?", GERMAN))[2][0] == "language"


def test_answers_of_real_files_are_rarely_called_wrong(shared):
    wrong = total = 0
    for name in ("llamafactory/alpaca_en_demo.json", "llamafactory/alpaca_zh_demo.json", "gsm8k/test.jsonl"):
        rows = list(read(SourceSettings(path=name), shared / "data"))
        plug = choose([row.row for row in rows[:50]])
        samples = [s for row in rows for s in convert(plug, row) if not isinstance(s, Refused)]
        total += len(samples)
        wrong += sum(wrong_language(sample) is not None for sample in samples)
    assert total > 3000 and wrong <= 3


# personal data


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("write to jane.doe@example.co.uk please", ["email"]),
        ("call +49 30 901820 or +1 202-456-1111", ["phone", "phone"]),
        ("call (202) 456-1111 today", ["phone"]),
        ("手机 13800138000 谢谢", ["phone"]),
        ("card 4111 1111 1111 1111, amex 378282246310005", ["card", "card"]),
        ("card 4111 1111 1111 1112", []),
        ("pay to DE89 3704 0044 0532 0130 00", ["iban"]),
        ("pay to DE89 3704 0044 0532 0130 01", []),
        ("身份证 11010519491231002X", ["id"]),
        ("身份证 110105194912310021", []),
        ("RSSMRA85T10A562S", ["id"]),
        ("CPF 111.444.777-35", ["id"]),
        ("CPF 111.444.777-36", []),
        ("3.14159265358979 and 1,000,000,000 and 2^31 = 2147483648", []),
        ("ISBN 978-3-16-148410-0", []),
        ("the years 1914-1918 and 1939-1945", []),
        ("x = user@ and @handle", []),
    ],
)
def test_what_is_personal(text, kinds):
    assert [kind for _, _, kind in find(text, ALL)] == kinds


def test_real_arithmetic_holds_no_personal_data(shared):
    lines = (shared / "data" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if find(json.loads(line)["answer"], PersonalSettings(regions=["US", "CN"]))]


def test_masked_and_veiled():
    text = "mail jane@example.com or +1 202-456-1111."
    spans = find(text, ALL)
    assert masked(text, spans) == "mail [EMAIL] or [PHONE]."
    assert "jane" not in veiled(text, spans) and "456" not in veiled(text, spans)
    assert find(masked(text, spans), ALL) == []


# the recipe


def test_each_rule_can_be_off_and_unknown_countries_are_refused():
    dirty = talk("q\x00 cafÃ©", "As an AI language model I say <br> jane@example.com<|endoftext|>")
    off = CleanSettings.model_validate(dict.fromkeys(
        ("end_markers", "control_characters", "mojibake", "unicode", "html", "refusals", "copied", "language",
         "personal"), False,
    ))  # fmt: skip
    cleaner = Cleaner(off, [])
    assert cleaner.clean(dirty) == (dirty, [], None) and not cleaner.found
    with pytest.raises(ValidationError, match="unknown country"):
        PersonalSettings(regions=["XX"])
    with pytest.raises(ValidationError):
        CleanSettings(mojibake="drop")


def test_a_plain_text_is_cleaned_too():
    cleaner = Cleaner(CleanSettings(personal="mask"), [])
    sample, changed, out = cleaner.clean(Text("cafÃ© \x00 jane@example.com", Origin("f", 1)))
    assert sample.text == "café  [EMAIL]" and changed == ["control_characters", "mojibake", "personal"] and out is None


def test_what_rules_found_is_counted_shown_and_adds_up(tmp_path):
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(30)]
    rows += [
        {"instruction": "damaged", "output": "cafÃ©"},
        {"instruction": "mail", "output": "jane@example.com"},
        {"instruction": "refuse", "output": "As an AI language model, I cannot."},
        {"instruction": "copy me", "output": "Copy me"},
        {"instruction": "empty", "output": "\x00"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    clean = {"refusals": "drop", "personal": "mask"}
    settings = DataSettings(sources=[{"path": str(path)}], clean=clean, split={"train": 1, "validation": 0, "test": 0})
    run = RunDir(tmp_path / "run")
    _, report = prepare(settings, open_chat(SHELL), "conversation", run)
    assert report["samples"] == 35 and sum(report["kept"].values()) == 33
    assert report["removed"] == {"boilerplate refusal": 1} and report["quarantined"] == {"empty answer": 1}
    assert report["repaired"] == {"mojibake undone": 1, "personal data masked": 1}
    found = {line["rule"]: line["samples"] for line in report["cleaning"]}
    assert found["copied"] == found["refusals"] == found["mojibake"] == found["personal"] == 1 and found["html"] == 0
    said = {s.messages[0].content: s.messages[1].content for s in kept_samples(run, "train")}
    assert said["damaged"] == "café" and said["mail"] == "[EMAIL]" and "copy me" in said
    details = json.loads(run.data_details.read_text(encoding="utf-8"))["cleaning"]
    assert details["mojibake"][0]["before"] == "cafÃ©" and details["mojibake"][0]["after"] == "café"
    assert "jane" not in json.dumps(details)
