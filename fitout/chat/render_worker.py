"""The other side of sandbox.py: a process that renders chat templates under limits. Run by its path, never imported.

It imports the standard library and transformers' own rendering (jinja2's immutable sandbox), nothing of Fitout. Frames
on standard input and output: eight bytes of length, then JSON. A request is a batch; each of its conversations gets a
frame of its own as answer. They are sent in bulk, or one by one where that is asked: then the other side knows which
one a limit was for.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys
import time
from typing import Any, BinaryIO

LONGEST = 1.0  # seconds that an answer is held back, at most


def main() -> None:
    seconds, megabytes, characters = map(int, sys.argv[1:])
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not come between the frames
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the other side's; it ends this one
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGUSR1)
    from transformers.utils.chat_template_utils import render_jinja_template

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


def send(file: BinaryIO, value: Any) -> None:
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
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
