"""The other side of sandbox.py: a process that renders chat templates under limits, and encodes what they gave where
it was handed a tokenizer. Run by its path.

It imports the standard library, transformers' own rendering (jinja2's immutable sandbox) and tokenizers, nothing of
Fitout; what both sides do with strings and encodings (`divided`, `trained`) stands here. Frames on standard input and
output: eight bytes of length, then JSON, or numbers behind a zero byte. A request is a batch; each of its conversations
gets a frame of its own as answer. They are sent in bulk, or one by one where that is asked: then the other side knows
which one a limit was for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
from array import array
from bisect import bisect_right
from collections.abc import Collection, Sequence
from typing import Any, BinaryIO

Span = tuple[int, int]
ENCODED = 500_000  # characters of a string that is encoded here, under the limit on memory; longer ones are answered
LONGEST = 1.0  # seconds that an answer is held back, at most


def main() -> None:
    seconds, megabytes, characters = map(int, sys.argv[1:])
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not come between the frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the other side's; it ends this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR1)
    from transformers.utils.chat_template_utils import render_jinja_template

    send(answers, {"here": True})  # and reads: what it is handed may be more than a pipe holds
    answers.flush()
    handed = receive(requests)
    if handed is None:
        return
    tokenizer, control = None, frozenset(handed["control"])
    if handed["tokenizer"]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(handed["tokenizer"])
    del handed  # megabytes
    _limit(megabytes)
    send(answers, {"ready": True})
    answers.flush()
    while (request := receive(requests)) is not None:
        sent = time.monotonic()
        for messages, tools, cuts in request["asks"]:
            signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process, inside a call into C as well
            try:
                answer: Any = rendered(
                    render_jinja_template, request["template"], request["variables"], messages, tools, cuts, characters
                )
                signal.setitimer(signal.ITIMER_PROF, 0)
                if request["encode"] and max(len(x) if isinstance(x, str) else x for x in answer) <= ENCODED:
                    answer = encoded(answer, tokenizer, control)
            except MemoryError:
                answer = {"limit": f"more than {megabytes} MB of memory"}
            except Exception as error:  # whatever a template does is a fault of the template
                answer = {"error": f"{error}" or type(error).__name__}
            signal.setitimer(signal.ITIMER_PROF, 0)
            send(answers, answer)
            if request["one_by_one"] or time.monotonic() - sent > LONGEST:
                answers.flush()
                sent = time.monotonic()
        answers.flush()


def _limit(megabytes: int) -> None:
    """So much memory more than now, and no core."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        now = 1 << 30
    for what, limit in ((resource.RLIMIT_AS, now + (megabytes << 20)), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(what, (limit, limit))


def rendered(
    render: Any, template: str, variables: dict, messages: list, tools: list | None, cuts: list, characters: int
) -> list[str | int]:
    """The string of each cut (how many messages, with the generation prompt or without); the length alone where it is
    a beginning of the first one."""
    texts: dict[tuple[int, bool], str] = {}
    for count, generation in map(tuple, cuts):
        if (count, generation) in texts:
            continue
        conversation = [{k: v for k, v in one.items() if v is not None} for one in messages[:count]]
        if not conversation:
            raise ValueError("there is no message to render")
        [text], _ = render(
            conversations=[conversation],
            tools=tools,
            chat_template=template,
            add_generation_prompt=generation,
            **variables,
        )
        if len(text) > characters:
            raise MemoryError
        texts[count, generation] = text
    first, *rest = (texts[count, generation] for count, generation in cuts)
    return [first, *(len(text) if first.startswith(text) else text for text in rest)]


def encoded(texts: list[Any], tokenizer: Any, control: Collection[int]) -> bytes | list[Any]:
    """The samples of a conversation, each its number of ids, the ids and which of them are trained; `texts` itself
    where they cannot be divided or encoded: the other side tries again, and tells what it finds."""
    first, *rest = texts  # strings, or the length of one that is a beginning of the first
    frame = [b"\0"]
    try:
        for text, spans in divided(first, [first[:one] if isinstance(one, int) else one for one in rest]):
            encoding = tokenizer.encode(text, add_special_tokens=False)
            for ids, train_on in as_served(text, spans, encoding, tokenizer, control):
                frame += [len(ids).to_bytes(8, "little"), array("i", ids).tobytes(), train_on]
    except Exception:
        return texts
    return b"".join(frame)


# what both sides do with strings and encodings


def divided(whole: str, rest: Sequence[str]) -> list[tuple[str, tuple[Span, ...]]]:
    """The strings to encode and the character spans [start, end) of their supervised turns, from the whole and for each
    supervised turn its prompt and the string up to its end. One string where every turn's prompt is a beginning of the
    whole; otherwise the template rewrites history, and each supervised turn gets the context it will see at inference.
    Raises ValueError where a finished turn does not begin with its own prompt.
    """
    turns = list(zip(rest[::2], rest[1::2], strict=True))
    if all(whole.startswith(upto) and upto.startswith(prompt) for prompt, upto in turns):
        return [(whole, tuple((len(prompt), len(upto)) for prompt, upto in turns))]
    if not all(upto.startswith(prompt) for prompt, upto in turns):
        raise ValueError("a finished turn is written differently from its own prompt")
    return [(upto, ((len(prompt), len(upto)),)) for prompt, upto in turns]


def as_served(
    text: str, spans: Sequence[Span], encoding: Any, tokenizer: Any, control: Collection[int]
) -> list[tuple[list[int], bytes]]:
    """The samples of a string, each its ids and which of them are trained: one with the string's own encoding, as long
    as every turn begins with a token of its own. Where one token holds the end of a prompt and the beginning of its
    answer (two newlines, say), an engine, which encodes the prompt alone, never meets it: then each turn is a sample,
    of its prompt's ids and its answer's. Raises ValueError where these are no longer the same text.
    """
    if not any(_begins_within(encoding, start) for start, _ in spans):
        return [(encoding.ids, trained(encoding, spans, control))]
    found = []
    for start, end in spans:
        prompt, answer, whole = (
            tokenizer.encode(part, add_special_tokens=False) for part in (text[:start], text[start:end], text[:end])
        )
        ids = prompt.ids + answer.ids
        if tokenizer.decode(ids, skip_special_tokens=False) != tokenizer.decode(whole.ids, skip_special_tokens=False):
            raise ValueError("an answer is spelled otherwise when it stands alone")
        found.append((ids, bytes(len(prompt.ids)) + trained(answer, [(0, end - start)], control)))
    return found


def _begins_within(encoding: Any, character: int) -> bool:
    """Whether a token begins before this character and holds it."""
    token = _token_at(encoding, character, 0, len(encoding.ids))
    return token < len(encoding.ids) and encoding.token_to_chars(token)[0] < character


def trained(encoding: Any, spans: Sequence[Span], control: Collection[int]) -> bytes:
    """For each token 1 where its characters overlap a turn's span, else 0. Where they are is asked of a few tokens
    only: the offsets of all would take as long to hand over as a third of the encoding."""
    ids = encoding.ids
    train_on = bytearray(len(ids))
    at = 0
    for start, end in spans:
        first = _token_at(encoding, start, at, len(ids))
        at = _token_at(encoding, end, first, len(ids))
        while at < len(ids) and encoding.token_to_chars(at)[0] < end:  # it goes over the end
            at += 1
        stop = at  # leave out what the template writes after the end of the turn: no engine generates it
        while stop > first and ids[stop - 1] not in control:
            stop -= 1
        stop = stop if stop > first else at
        train_on[first:stop] = b"\1" * (stop - first)
    return bytes(train_on)


def _token_at(encoding: Any, character: int, low: int, high: int) -> int:
    """The first token from `low` on that ends behind a character; `high`, their number, where there is none."""
    found = encoding.char_to_token(character)
    if found is not None and found >= low:
        return found
    return bisect_right(range(high), character, low, key=lambda place: encoding.token_to_chars(place)[1])


# frames


def send(file: BinaryIO, value: Any) -> None:
    data = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    file.write(len(data).to_bytes(8, "little") + data)


def receive(file: BinaryIO) -> Any:
    """The next frame, None at the end."""
    head = file.read(8)
    if len(head) < 8:
        return None
    return json.loads(file.read(int.from_bytes(head, "little")).decode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    try:
        main()
    except (BrokenPipeError, KeyboardInterrupt):  # the other side is gone
        os._exit(1)
