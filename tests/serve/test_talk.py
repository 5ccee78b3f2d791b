"""The terminal chat over a stand-in engine: from a pipe and from a keyboard."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from fitout.cli.talk import talk
from fitout.errors import RequestError


class Echo:
    """Says back the last message and how many there were; remembers what it was asked."""

    def __init__(self):
        self.asked: list[list[tuple[str, str]]] = []

    def stream(self, messages, **_):
        self.asked.append([(m.role, m.content) for m in messages])
        text = messages[-1].content
        if "too long" in text:
            raise RequestError("the prompt has 600 tokens", hint="Shorten the conversation.")
        yield f"[red]{text}[/red] "
        if "interrupt" in text:
            raise KeyboardInterrupt
        yield f":smile: 北京 {len(messages)}"


class Input(io.StringIO):
    def __init__(self, text: str, terminal: bool = False):
        super().__init__(text)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def run(monkeypatch, engine, text: str, *, terminal: bool = False, system: str | None = None) -> tuple[int, str]:
    shown = io.StringIO()
    monkeypatch.setattr(sys, "stdin", Input(text, terminal))
    console = Console(file=shown, force_terminal=terminal, width=20)
    code = talk(engine, system=system, max_new_tokens=9, console=console)
    return code, shown.getvalue()


def test_a_pipe_gets_one_plain_answer_a_line(monkeypatch):
    engine = Echo()
    code, shown = run(monkeypatch, engine, "one is a rather long line\n\ntwo\n", system="Be brief.")
    assert code == 0
    assert shown == "[red]one is a rather long line[/red] :smile: 北京 2\n[red]two[/red] :smile: 北京 4\n"
    assert engine.asked[1] == [
        ("system", "Be brief."),
        ("user", "one is a rather long line"),
        ("assistant", "[red]one is a rather long line[/red] :smile: 北京 2"),
        ("user", "two"),
    ]


def test_commands_in_a_pipe_leave_the_answers_alone(monkeypatch, capsys):
    engine = Echo()
    code, shown = run(monkeypatch, engine, "one\n/reset\ntwo\n/system Sing.\nthree\n/quit\nfour\n")
    assert code == 0 and shown.count("\n") == 3
    assert engine.asked[1] == [("user", "two")]
    assert engine.asked[2] == [("system", "Sing."), ("user", "three")]
    assert len(engine.asked) == 3
    assert "new conversation" in capsys.readouterr().err


def test_a_line_without_an_answer_is_told_and_fails(monkeypatch, capsys):
    engine = Echo()
    code, shown = run(monkeypatch, engine, "too long\n/nothing\nnext\n")
    assert code == 1 and shown.count("\n") == 1
    error = capsys.readouterr().err
    assert "600 tokens" in error and "/reset" in error and "/nothing is not a command" in error
    assert engine.asked[-1] == [("user", "next")]


def test_an_interrupt_stops_an_answer_typed_for_and_ends_a_pipe(monkeypatch):
    engine = Echo()
    code, shown = run(monkeypatch, engine, "interrupt\nthen\n", terminal=True)
    assert code == 0 and "stopped" in shown
    assert engine.asked[1][:2] == [("user", "interrupt"), ("assistant", "[red]interrupt[/red] ")]
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, Echo(), "interrupt\nthen\n")


def test_an_answer_cannot_command_the_terminal(monkeypatch):
    _, shown = run(monkeypatch, Echo(), "a\x1b]0;title\x07b\x9bc\n")
    assert "\x1b" not in shown and "\x07" not in shown and "\x9b" not in shown
    assert "a]0;titlebc" in shown
