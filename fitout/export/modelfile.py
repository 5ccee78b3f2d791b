"""An Ollama Modelfile: the chat template in Go's template language, and where the model stops.

A template is taken apart by what it writes: what stands before and after each role's text, at the very beginning, and
where the assistant begins. The Go text is put together from these pieces, rendered again here, and compared with the
tokenizer's own template on conversations of several shapes; one that is more than such pieces is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..chat.types import Message
from ..errors import TemplateError
from .gguf_vocab import begins_with_bos

if TYPE_CHECKING:
    from ..chat.render import Chat

ROLES = ("system", "user", "assistant")
TEXT = "\u2042"  # a text that no template looks for


@dataclass(frozen=True)
class Pieces:
    """What a template writes around the texts: `around[role]` is (before, after)."""

    default: str  # at the beginning, where no system message is given
    around: dict[str, tuple[str, str]]
    answer: str  # where the assistant begins


def take_apart(chat: Chat) -> Pieces:
    """The pieces of the tokenizer's template, without its beginning-of-text token (Ollama writes that one itself).

    Raises TemplateError when the template is more than pieces around texts.
    """

    def render(*roles: str, ask: bool = False) -> str:
        rows = [{"role": role, "content": TEXT} for role in roles]
        return chat.render_dicts(rows, generation=ask)

    try:
        one, two = render("user"), render("user", "assistant")
        three, four = render("user", "assistant", "user"), render("user", "assistant", "user", "assistant")
        answer = render("user", ask=True).removeprefix(one)
        user, assistant = three.removeprefix(two), four.removeprefix(three)
        start = one.removesuffix(user)
    except TemplateError as error:
        raise _refused(chat, f"it does not render: {error.message}") from error
    try:
        system = render("system", "user").removesuffix(user)
    except TemplateError:
        system = ""  # a template that takes no system message
    common = chat.tokenizer.bos_token if begins_with_bos(chat) else ""
    around = {"user": _split(user), "assistant": _split(assistant)}
    if TEXT in system:
        around["system"] = _split(system.removeprefix(common))
    return Pieces(start.removeprefix(common), around, answer)


def _split(written: str) -> tuple[str, str]:
    before, _, after = written.partition(TEXT)
    return before, after


def go_template(pieces: Pieces) -> str:
    """The pieces as Ollama executes them; no white space is trimmed, so every character counts."""
    parts = ["{{ if not .System }}" + pieces.default + "{{ end }}"] if pieces.default else []
    parts.append("{{ range .Messages }}")
    for i, (role, (before, after)) in enumerate(pieces.around.items()):
        parts.append("{{ " + ("if" if i == 0 else "else if") + f' eq .Role "{role}" ' + "}}")
        parts.append(before + "{{ .Content }}" + after)
    parts.append("{{ end }}{{ end }}" + pieces.answer)
    return "".join(parts)


def translate(chat: Chat) -> str:
    """The tokenizer's template for Ollama, proved on conversations of several shapes. Raises TemplateError."""
    template = _translated(chat)
    for messages in conversations('.Role "system"' in template):
        difference = _difference(chat, template, messages)
        if difference:
            raise _refused(chat, difference)
    return template


def left_out(chat: Chat, template: str) -> list[str]:
    """What the tokenizer's template does and its translation does not, beyond plain conversations."""
    thinking = (Message("user", "Why?"), Message("assistant", "<think>\nHm.\n</think>\n\nSo."), Message("user", "And?"))
    notes = []
    if _difference(chat, template, thinking):
        notes.append("thinking in earlier answers is sent back as it is; the tokenizer's template writes it otherwise")
    if _difference(chat, template, (Message("user", " a "),)):
        notes.append("blanks around a message are sent as they are; the tokenizer's template removes them")
    if '.Role "system"' not in template:
        notes.append("system messages are left out: the tokenizer's template has no place for them")
    if "tools" in (chat.tokenizer.chat_template or ""):
        notes.append("tools are not in the Modelfile")
    return notes


def _translated(chat: Chat) -> str:
    pieces = take_apart(chat)
    written = [pieces.default, pieces.answer, *(x for pair in pieces.around.values() for x in pair)]
    awkward = [x for x in written if "{{" in x or "}}" in x or '"""' in x or TEXT in x]
    if awkward:
        raise _refused(chat, f"it writes {awkward[0]!r}, which a Modelfile cannot hold")
    return go_template(pieces)


def _difference(chat: Chat, template: str, messages: Sequence[Message]) -> str | None:
    """Where the two templates part on a conversation, in words."""
    want = chat.prompt_text(messages).removeprefix((chat.tokenizer.bos_token or "") * begins_with_bos(chat))
    got = render_go(template, messages)
    if got == want:
        return None
    at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
    return f"it writes {want[at : at + 40]!r} where pieces give {got[at : at + 40]!r}"


def conversations(with_system: bool) -> Iterator[tuple[Message, ...]]:
    """Conversations that end where the assistant is to answer."""
    texts = (
        "How far is it?",
        "2.5 km.\nAbout\n\n30 minutes on foot.",
        "那么坐车呢？",
        "5 分钟。",
        'Thanks {you}, "bye"',
    )
    turns = [Message(ROLES[1 + i % 2], text) for i, text in enumerate(texts)]
    system = Message("system", "You know the way.\nBe brief.")
    for count in (1, 3, 5):
        yield tuple(turns[:count])
        if with_system:
            yield (system, *turns[:count])


# the part of Go's text/template that is written above, executed

_ACTION = re.compile(r"\{\{ (.*?) \}\}")


def render_go(template: str, messages: Sequence[Message]) -> str:
    """Executes a template of `go_template`'s form as Ollama does. Raises ValueError for any other."""
    parts = _ACTION.split(template)
    nodes, end = _parse(parts, 0)
    if end != len(parts):
        raise ValueError("the template closes more than it opens")
    return _run(nodes, messages, None)


def _parse(parts: list[str], at: int) -> tuple[list[tuple], int]:
    """Nodes from `at` (even places hold text, odd ones actions) to the `else` or `end` that closes them."""
    nodes: list[tuple] = []
    while at < len(parts):
        words = parts[at]
        if at % 2 == 0:
            nodes.append(("text", words))
        elif words == "end" or words.startswith("else"):
            return nodes, at
        elif words == ".Content":
            nodes.append(("content",))
        elif words == "range .Messages":
            body, at = _parse(parts, at + 1)
            nodes.append(("range", body))
        elif words.startswith("if "):
            branches = []
            while parts[at] != "end":
                condition = parts[at].removeprefix("else ")
                body, at = _parse(parts, at + 1)
                branches.append((condition.removeprefix("if "), body))
            nodes.append(("if", branches))
        else:
            raise ValueError(f"not an action of this form: {words}")
        at += 1
    return nodes, at


def _run(nodes: list[tuple], messages: Sequence[Message], dot: Message | None) -> str:
    out = []
    for kind, *rest in nodes:
        if kind == "text":
            out.append(rest[0])
        elif kind == "content" and dot is not None:
            out.append(dot.content)
        elif kind == "range":
            out += [_run(rest[0], messages, message) for message in messages]
        elif kind == "if":
            out += [_run(body, messages, dot) for c, body in rest[0] if _holds(c, messages, dot)][:1]
    return "".join(out)


def _holds(condition: str, messages: Sequence[Message], dot: Message | None) -> bool:
    if condition == "not .System":  # Ollama joins the system messages; an empty one counts as none
        return not any(message.role == "system" and message.content for message in messages)
    role = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    if role is None:
        raise ValueError(f"not a condition of this form: {condition}")
    return dot is not None and dot.role == role.group(1)


# the file


def modelfile(chat: Chat, weights: Path) -> str:
    """The Modelfile for a GGUF file beside it: template, stop strings, and greedy answers as in the evaluation."""
    lines = [f"FROM ./{weights.name}", f'TEMPLATE """{translate(chat)}"""']
    lines += [f"PARAMETER stop {_quoted(text)}" for text in stop_strings(chat)]
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    return "\n".join(lines) + "\n"


def stop_strings(chat: Chat) -> list[str]:
    """The texts of the ids that end a turn."""
    return [chat.tokenizer.decode([i], skip_special_tokens=False) for i in chat.stop_ids]


def _quoted(text: str) -> str:
    if '"' in text or "\n" in text:
        return f'"""{text}"""'
    return f'"{text}"'


def _refused(chat: Chat, why: str) -> TemplateError:
    return TemplateError(
        f"the chat template ({chat.template_name}) cannot be said in Ollama's language: {why}",
        harm="Ollama would send the model other prompts than it was trained on.",
        hint="Use --for llamacpp (llama.cpp reads the template itself), or train with chat.template: chatml.",
    )
