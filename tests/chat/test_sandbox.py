"""Templates in a process of their own: the same strings as transformers gives, and nothing a template does gets out."""

from __future__ import annotations

import os
import signal
import threading
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from fitout.chat import render as rendering
from fitout.chat import sandbox
from fitout.chat.render import open_chat
from fitout.chat.sandbox import Ask, Renderer
from fitout.chat.types import Message
from fitout.errors import TemplateError, TemplateLimitError
from tests.chat.folders import SPELLED, TURNS, folder, talk

ONE = [{"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {}}}},
}


@pytest.fixture(scope="module")
def renderer():
    """One with limits that a test can wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "SECONDS", 1)
        made = Renderer()
        yield made
        made.stop()


def render(renderer, template, messages=ONE, **variables):
    [found] = renderer.render(template, variables, [Ask(messages, (), [(len(messages), True)])])
    if isinstance(found, TemplateError):
        raise found
    return found[0]


# the same as transformers


def shapes():
    user, answer = {"role": "user", "content": "Where?\n"}, {"role": "assistant", "content": " There 北 😀. "}
    system = {"role": "system", "content": "Be brief."}
    call = {
        "role": "assistant", "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": [1, 2.5, None, True]}}}],
    }  # fmt: skip
    thought = {**answer, "reasoning_content": "Let me think."}
    yield from ([user], [user, answer], [system, user, answer, user, answer], [answer], [user, user])
    yield from ([user, call, {"role": "tool", "name": "f", "content": "7"}, answer], [user, thought], [user, call])


def test_every_template_renders_as_in_transformers(tmp_path):
    trl = pytest.importorskip("trl")
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    compared = refused = 0
    chat = open_chat(folder(tmp_path, "x", tokens=SPELLED, eos="<|im_end|>", bos="<|begin_of_text|>"))
    for file in files:
        chat.tokenizer.chat_template = file.read_text(encoding="utf-8")
        for messages in shapes():
            for tools in (None, [TOOL]):
                for generation in (False, True):
                    [found] = chat._ask([Ask(messages, tools or (), [(len(messages), generation)])])
                    try:
                        want = chat.tokenizer.apply_chat_template(
                            messages, tools=tools, add_generation_prompt=generation, tokenize=False
                        )
                    except Exception as error:
                        refused += 1
                        assert isinstance(found, TemplateError) and found.message == (
                            str(error) or type(error).__name__
                        ), file.name
                        continue
                    assert found == [want], (file.name, messages)
                    compared += 1
    assert compared > 10 * len(files) and refused


def test_cuts_are_the_strings_themselves(tmp_path):
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ add_generation_prompt }}"
    chat = open_chat(folder(tmp_path, text))
    cuts = [(4, False), (1, True), (2, False), (2, False), (3, True), (4, False)]
    [found] = chat._ask([Ask([m.as_dict() for m in TURNS], (), cuts)])
    for text, (count, generation) in zip(found, cuts, strict=True):
        assert text == "".join(f"[{m.content}]" for m in TURNS[:count]) + str(generation)


def test_what_json_does_not_know(renderer):
    message = {"role": "user", "content": "a\ud800b", "when": date(2026, 1, 1), "n": np.float32(2.5), "t": (1, 2)}
    text = render(renderer, "{{ messages[0].content }}|{{ messages[0].when }}|{{ messages[0].n + 1 }}", [message])
    assert text == "a\ud800b|<date>|3.5"
    assert message["when"] == date(2026, 1, 1)


# time and memory


ATTACKS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a power of a power": "{{ (10 ** (10 ** 8)) % 7 }}",  # one call into C, where no handler of Python's runs
    "two calls for each": "{% macro f(n) %}{{ f(n-1) if n else '' }}{{ f(n-1) if n else '' }}{% endmacro %}{{ f(99) }}",
    "a string times": "{{ 'a' * 10 ** 10 }}",
    "a list times": "{{ [0] * 10 ** 9 }}",
    "doubling": "{% set ns = namespace(x='a' * 100) %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a wide format": "{{ '{:>9999999999}'.format(1) }}",
    "a wide percent": "{{ '%9999999999d' % 1 }}",
    "a filter": "{{ 'a' | center(9999999999) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "long output": "{% for a in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_template_that_would_take_the_machine(renderer, attack):
    before = render(renderer, "{{ messages[0].content }}")
    began = time.monotonic()
    with pytest.raises((TemplateLimitError, TemplateError)) as error:
        render(renderer, attack)
    assert isinstance(error.value, TemplateLimitError) or "Error" in repr(error.value)
    if isinstance(error.value, TemplateLimitError):
        assert error.value.exit_code == 2 and error.value.harm and "chat.template" in error.value.hint
        assert "processor time" in error.value.message or "MB of memory" in error.value.message
    assert time.monotonic() - began < 60  # wall time on a busy machine; the limit is of processor time
    assert render(renderer, "{{ messages[0].content }}") == before == "Hi"


def test_the_row_that_set_it_off_is_named(tmp_path, monkeypatch):
    """A bomb that waits for a word: good rows render, and the error names the one with the word."""
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    monkeypatch.setattr(sandbox, "_shared", Renderer())
    text = (
        "{% for m in messages %}{% if 'boom' in m.content %}{% for a in range(99999) %}{% for b in range(99999) %}"
        "{% endfor %}{% endfor %}{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    chat = open_chat(folder(tmp_path, text, tokens=SPELLED, eos="<|im_end|>"))
    good = [talk(*TURNS[:2]) for _ in range(3)]
    bad = talk(Message("user", "boom"), TURNS[1])
    object.__setattr__(bad, "origin", type(bad.origin)("bad.jsonl", 7))
    assert len(chat.render_many(good)) == 3
    with pytest.raises(TemplateLimitError) as error:
        chat.render_many([*good, bad, *good])
    assert error.value.where == "bad.jsonl:7"
    assert len(chat.render_many(good)) == 3
    sandbox.renderer().stop()
    monkeypatch.setattr(rendering, "FEW", 0)  # by several processes
    with pytest.raises(TemplateLimitError) as error:
        list(chat.render_all([good, [*good, bad, *good], good, good], 14))
    assert error.value.where == "bad.jsonl:7"
    assert len([one for batch in chat.render_all([good, good], 6) for one in batch]) == 6


WORDS = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
WORDS += "{% if add_generation_prompt %}<|im_start|>{% endif %}"


def children():
    """Of every thread of this process."""
    tasks = Path("/proc/self/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def test_processes_that_were_killed_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "FEW", 0)
    chat = open_chat(folder(tmp_path, WORDS, tokens=SPELLED, eos="<|im_end|>"))
    before = children()
    made = chat.render_all(([talk(*TURNS[:2])] for _ in range(60)), 60)
    [first] = next(made)
    killed = children() - before
    for child in killed:
        os.kill(child, signal.SIGKILL)
    rest = [next(made) for _ in range(40)]
    others = children() - before - killed
    rest += list(made)
    assert killed and others
    assert len(rest) == 59 and all(list(one.ids) == list(first[0].ids) for [[one]] in rest)
    assert children() <= before | killed


def test_they_end_when_nobody_takes_more(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "FEW", 0)
    slow = "{% for a in range(3000) %}{% for b in range(300) %}{% endfor %}{% endfor %}" + WORDS
    chat = open_chat(folder(tmp_path, slow, tokens=SPELLED, eos="<|im_end|>"))
    before = children()
    given = []
    made = chat.render_all((given.append(1) or [talk(*TURNS[:2])] * 20 for _ in range(1000)), 20_000)
    next(made)
    assert len(given) < 40 and children() - before
    began = time.monotonic()
    made.close()
    assert not children() - before and time.monotonic() - began < 5


def test_a_thread_of_theirs_that_ends_them_does_not_wait_for_itself(tmp_path):
    """As when it collects a generator that nobody closed."""
    with sandbox.Crew(2, "", ()) as crew:
        crew.submit(lambda renderer: crew._end()).result(20)


def test_a_long_row_and_what_a_tokenizer_refuses_are_encoded_by_this_process(tmp_path, monkeypatch):
    """Under the limit on memory it would end the process that renders."""
    chat = open_chat(folder(tmp_path, WORDS, tokens=SPELLED, eos="<|im_end|>"))
    long = talk(Message("user", "word " * 2_000_000), TURNS[1])
    alone = chat.render(long)
    monkeypatch.setattr(rendering, "FEW", 0)
    [[group]] = chat.render_all([[long]], 1)
    assert group == alone
    stripped = WORDS.replace("m.content", "m.content[:5] if m.role == 'assistant' and not loop.last else m.content")
    monkeypatch.setattr(chat.tokenizer, "chat_template", stripped)
    several = talk(TURNS[0], Message("assistant", "word " * 2_000_000), *TURNS[:2])
    [[group]] = chat.render_all([[several]], 1)
    assert group == chat.render(several) and len(group) == 2
    monkeypatch.setattr(chat.tokenizer, "chat_template", WORDS)
    odd = talk(Message("user", "a\ud800b"), TURNS[1])
    with pytest.raises(Exception) as here:
        chat.render(odd)
    with pytest.raises(type(here.value)):
        list(chat.render_all([[odd]], 1))


# ways out


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ (''|attr('__class__')).__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('CANARY', 'w') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': messages}) }}",
    "{{ ['{0.__class__}']|map('format', messages)|list }}",
    "{{ (''|attr('format'))('{0.__class__}', 1) }}",
    "{{ [messages]|map(attribute='__class__')|list }}",
    "{{ messages|groupby('__class__') }}",
    "{{ strftime_now.__func__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ dict.__call__.__globals__ }}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].pop('role') }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_attribute_leads_out(renderer, escape, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        text = render(renderer, escape.replace("CANARY", str(tmp_path / "canary")))
    except TemplateError as error:
        text = error.message if "unsafe" not in error.message and "undefined" not in error.message else ""
    assert "class '" not in text and "root:" not in text and "builtins" not in text and "<function" not in text
    assert list(tmp_path.iterdir()) == []


# the process


def test_one_process_for_all_rows_and_threads(renderer):
    render(renderer, "x")
    process = renderer._process
    errors = []

    def work(number):
        for at in range(100):
            want = f"{number} {at}"
            if render(renderer, "{{ messages[0].content }}", [{"role": "user", "content": want}]) != want:
                errors.append(want)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and renderer._process is process


def test_a_process_that_died_is_replaced_and_no_row_is_lost(renderer):
    asks = [Ask([{"role": "user", "content": str(n)}], (), [(1, True)]) for n in range(2000)]
    renderer.render("x", {}, asks[:1])
    first = renderer._process
    killer = threading.Timer(0.02, lambda: first.send_signal(signal.SIGKILL))
    killer.start()
    found = []
    while killer.is_alive() or renderer._process is first:
        found = renderer.render("{{ messages[0].content }}", {}, asks)
    assert found == [[str(n)] for n in range(2000)]


def test_a_process_that_dies_every_time_is_not_started_for_ever(renderer, monkeypatch, tmp_path):
    program = tmp_path / "worker.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(sandbox, "WORKER", program)
    renderer.stop()
    with pytest.raises(TemplateLimitError, match="died twice"):
        render(renderer, "x")


def test_a_process_that_does_not_answer_is_replaced_and_then_given_up(renderer, monkeypatch, tmp_path):
    render(renderer, "x")
    monkeypatch.setattr(sandbox, "PATIENCE", 1)
    os.kill(renderer._process.pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        program = tmp_path / "worker.py"
        program.write_text("import time; time.sleep(60)")
        patch.setattr(sandbox, "WORKER", program)
        with pytest.raises(TemplateLimitError, match="no answer for 1 s"):
            render(renderer, "x")
    monkeypatch.setattr(sandbox, "PATIENCE", 60)
    render(renderer, "x")
    os.kill(renderer._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(sandbox, "PATIENCE", 3)
    assert render(renderer, "x") == "x"


def test_answers_come_in_bulk_and_not_later_than_a_second(renderer, monkeypatch):
    """A limit names its own conversation although what was answered before it was held back."""
    text = "{% if messages[0].content == '70' %}{{ 'a' * 10 ** 10 }}{% endif %}{{ messages[0].content }}"
    asks = [Ask([{"role": "user", "content": str(n)}], (), [(1, True)]) for n in range(100)]
    with pytest.raises(TemplateLimitError) as error:
        renderer.render(text, {}, asks)
    assert error.value.place == 70
    slow = "{% for a in range(1000) %}{% for b in range(300) %}{% endfor %}{% endfor %}{{ messages[0].content }}"
    render(renderer, slow)  # a new process starts
    began = time.monotonic()
    renderer.render(slow, {}, asks[:20])
    count = int(20 * 4 / (time.monotonic() - began)) + 1
    monkeypatch.setattr(sandbox, "PATIENCE", 2.5)  # the whole batch takes some four
    asks = [Ask([{"role": "user", "content": str(n)}], (), [(1, True)]) for n in range(count)]
    process = renderer._process
    assert renderer.render(slow, {}, asks) == [[str(n)] for n in range(count)] and renderer._process is process


def test_the_process_ends_with_this_one(renderer):
    """Its input closes when this process dies, however that happens."""
    render(renderer, "x")
    process = renderer._process
    process.stdin.close()
    assert process.wait(60) == 0
    renderer.stop()


def test_an_interrupt_leaves_nothing_in_the_pipes(renderer):
    """Ctrl-C between two answers: the next batch gets its own, not what was on its way."""
    asks = [Ask([{"role": "user", "content": f"old {n}"}], (), [(1, True)]) for n in range(3000)]
    renderer.render("x", {}, asks[:1])

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.5)  # again, where one came while Python finalised something
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                renderer.render("{{ messages[0].content }}", {}, asks)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert render(renderer, "{{ messages[0].content }}") == "Hi"
