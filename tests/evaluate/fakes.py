"""An engine that answers from a dictionary, and conversations to ask it."""

from dataclasses import dataclass

from fitout.chat.types import Conversation, Message, Origin


@dataclass
class Said:
    text: str
    finish_reason: str = "stop"
    error: str | None = None


class FakeEngine:
    """Answers the last message by `says` (texts or Said), likes labels by `likes`, completes and reads by `plain`."""

    def __init__(self, says=(), *, likes=(), plain=()):
        self.says, self.likes, self.plain = dict(says), dict(likes), dict(plain)
        self.calls = []

    def generate(self, conversations, *, max_new_tokens, temperature=0.0, batch_size=16, tools=(), progress=None):
        self.calls.append(("generate", [list(messages) for messages in conversations], tools, temperature))
        if progress:
            progress(len(conversations), len(conversations))
        answers = [self.says.get(messages[-1].content, "") for messages in conversations]
        return [Said(answer) if isinstance(answer, str) else answer for answer in answers]

    def complete(self, prompts, *, max_new_tokens, batch_size=16, progress=None):
        self.calls.append(("complete", list(prompts), max_new_tokens))
        return [Said(self.plain.get(prompt, "")) for prompt in prompts]

    def choose(self, conversations, choices, *, mean=False, tools=()):
        self.calls.append(("choose", [messages[-1].content for messages in conversations], choices))
        return [
            [self.likes.get((messages[-1].content, label), -9.0) for label in row]
            for messages, row in zip(conversations, choices, strict=True)
        ]

    def token_log_probs(self, texts, max_length, *, batch_size=16):
        self.calls.append(("read", list(texts)))
        return [[self.plain["log_prob"]] * (len(text) - 1) for text in texts]


def asked(question, answer, *, line=1, before=(), train=True, tools=(), **meta):
    messages = (*before, Message("user", question), Message("assistant", answer, train=train))
    return Conversation(messages, Origin("data.jsonl", line), tools=tools, meta=meta)
