"""Messages -> token ids and which of them are trained, in one walk; the generation prompt; template self-checks.

One rule decides what is supervised: a turn of the assistant is what the template writes *after* the generation prompt
that the model will see at inference, up to and including the token that ends the turn. So nothing needs to be known
about a template, and training and inference cannot drift apart.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import TemplateError, TemplateLimitError
from . import ChatSettings
from .sandbox import Ask, renderer
from .tokenizer import LoadedTokenizer, load_tokenizer
from .types import Conversation, Message, Origin, Text, Tokens

SWITCH = re.compile(r"\b(\w*think\w*)\s+is\s+(?:not\s+)?defined\b")  # as Qwen's and its relatives' templates spell it
SAMPLE = (Message("user", "Which way is north?"), Message("assistant", "That way."))


@dataclass(frozen=True)
class _Rendered:
    """A rendered string and the character spans [start, end) of its supervised turns."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Chat:
    """A tokenizer and its template, ready to render. Make one with `open_chat`."""

    def __init__(self, loaded: LoadedTokenizer):
        self.tokenizer: Any = loaded.tokenizer
        self.template_name = loaded.template
        self.grown = loaded.grown
        self.notes = loaded.notes

    # what the tokenizer knows

    @cached_property
    def control(self) -> tuple[str, ...]:
        """The strings that the tokenizer reads as control tokens."""
        added = self.tokenizer.added_tokens_decoder.values()
        return tuple(
            sorted({token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens))
        )

    @cached_property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer.convert_tokens_to_ids(list(self.control)))

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an assistant's turn: the one the template writes, and the tokenizer's end-of-text."""
        ids = {self._end_of_turn(self._sample()[0])}
        ids.add(self.tokenizer.eos_token_id)
        return tuple(sorted(i for i in ids if i is not None))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that decides which ids a conversation becomes."""
        return {
            "template": self.tokenizer.chat_template,
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
        }

    # messages -> ids

    def render(self, conversation: Conversation) -> list[Tokens]:
        """The samples this conversation gives: one, or one a supervised turn where the template rewrites history."""
        return self.render_many([conversation])[0]

    def render_many(self, conversations: Sequence[Conversation]) -> list[list[Tokens]]:
        """`render` for many at once (the tokenizer then uses every core)."""
        return self.encode(conversations, self.strings(conversations))

    def encode(self, conversations: Sequence[Conversation], rendered: Sequence[list[_Rendered]]) -> list[list[Tokens]]:
        """The samples that conversations give, from what `strings` made of them."""
        flat = [one for group in rendered for one in group]
        encodings = iter(self._encode([one.text for one in flat]))
        return [
            [self._tokens(one, next(encodings), conversation.origin) for one in group]
            for group, conversation in zip(rendered, conversations, strict=True)
        ]

    def prompt_text(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> str:
        """What stands before an assistant's turn."""
        [[text]] = self._render([(messages, tools, [(len(messages), True)])])
        return text

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict] = ()) -> list[int]:
        """The ids up to where the assistant begins. Raises TemplateError when a text spells a control token."""
        forged = self.forged(messages)
        if forged:
            raise TemplateError(
                f"the text contains {forged!r}, a control token of this model",
                harm="It could end the turn or speak in another role.",
                hint="Remove it, or break it up with a space.",
            )
        return self._encode([self.prompt_text(messages, tools)])[0].ids

    def text_ids(self, texts: Sequence[Text]) -> list[Tokens]:
        """Plain texts for pretraining: every token trained, an end-of-text token after each where there is one."""
        bos = self.tokenizer.bos_token if self._adds_bos else ""
        strings = [bos + text.text + (self.tokenizer.eos_token or "") for text in texts]
        return [
            Tokens(encoding.ids, b"\1" * len(encoding.ids), text.origin)
            for encoding, text in zip(self._encode(strings), texts, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text: control tokens and surrounding blanks removed."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def forged(self, messages: Iterable[Message]) -> str | None:
        """The first control token that a message's own text (content, name, tool calls) spells, if any."""
        for message in messages:
            for text in texts_in([message.content, message.extra]):
                for token in self.control:
                    if token in text:
                        return token
        return None

    # the walk

    @cached_property
    def _adds_bos(self) -> bool:
        ids = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return self.tokenizer.bos_token_id is not None and ids[:1] == [self.tokenizer.bos_token_id]

    def render_dicts(self, messages: Sequence[dict[str, Any]], *, generation: bool = False) -> str:
        """What the template makes of plain messages. Raises TemplateError when it does not render them."""
        [found] = self._ask([Ask(messages, (), [(len(messages), generation)])])
        if isinstance(found, TemplateError):
            raise found
        return found[0]

    def _ask(self, asks: Sequence[Ask]) -> list[list[str] | TemplateError]:
        """Strings by template, rendered elsewhere (see sandbox.py)."""
        own = self.tokenizer
        template = [own.get_chat_template(None, ask.tools or None) for ask in asks]  # some have one for tools
        found: list[Any] = [None] * len(asks)
        for one in dict.fromkeys(template):
            places = [at for at, its in enumerate(template) if its == one]
            try:
                answers = renderer().render(one, own.special_tokens_map, [asks[at] for at in places])
            except TemplateLimitError as error:
                error.place = places[error.place]
                raise
            for at, answer in zip(places, answers, strict=True):
                found[at] = answer
        return found

    def _render(
        self, asked: Sequence[tuple[Sequence[Message], Sequence[dict], Sequence[tuple[int, bool]]]]
    ) -> list[list[str]]:
        """Strings of (messages, tools, cuts), as `Ask` has them."""
        asks = [Ask([message.as_dict() for message in messages], tools, cuts) for messages, tools, cuts in asked]
        found = []
        for answer in self._ask(asks):
            if isinstance(answer, TemplateError):
                raise TemplateError(
                    f"the chat template ({self.template_name}) does not render: {answer.message}",
                    harm="These messages cannot be turned into what the model reads.",
                    hint="Correct the template or the messages, or set chat.template: plain.",
                )
            found.append(answer)
        return found

    def strings(self, conversations: Sequence[Conversation]) -> list[list[_Rendered]]:
        """The strings to encode of each conversation. Where every turn's prompt is a beginning of the whole, that is
        one string; otherwise the template rewrites history, and each supervised turn gets the context it will see at
        inference."""
        supervised = [
            [i for i, m in enumerate(one.messages) if m.role == "assistant" and m.train] for one in conversations
        ]
        asked = []
        for one, turns in zip(conversations, supervised, strict=True):
            cuts = [(len(one.messages), False), *(cut for turn in turns for cut in ((turn, True), (turn + 1, False)))]
            asked.append((one.messages, one.tools, cuts))
        try:
            strings = self._render(asked)
        except TemplateLimitError as error:
            error.where = str(conversations[error.place].origin)
            raise
        return [self._divide(whole, rest) for whole, *rest in strings]

    def _divide(self, whole: str, rest: Sequence[str]) -> list[_Rendered]:
        """What is encoded, from the whole and for each supervised turn its prompt and the string up to its end."""
        turns = list(zip(rest[::2], rest[1::2], strict=True))
        if all(whole.startswith(upto) and upto.startswith(prompt) for prompt, upto in turns):
            return [_Rendered(whole, tuple((len(prompt), len(upto)) for prompt, upto in turns))]
        return [self._last_turn(prompt, upto) for prompt, upto in turns]

    def _last_turn(self, prompt: str, whole: str) -> _Rendered:
        """A conversation of which only the last turn is supervised."""
        if not whole.startswith(prompt):
            raise TemplateError(
                f"the chat template ({self.template_name}) writes a finished turn differently from its own prompt",
                harm="The model would be trained on text that it never sees at inference.",
                hint=f"Try chat.template_kwargs: {{{self._switch()}: true}} (or false), or another template.",
            )
        return _Rendered(whole, ((len(prompt), len(whole)),))

    def _switch(self) -> str:
        """A variable by which the template asks whether the model thinks aloud."""
        return next(iter(SWITCH.findall(self.tokenizer.chat_template)), "enable_thinking")

    def _sample(self) -> tuple[_Rendered, str]:
        """SAMPLE with its last turn supervised, and its prompt."""
        [[whole, prompt]] = self._render([(SAMPLE, (), [(2, False), (1, True)])])
        return self._last_turn(prompt, whole), prompt

    def _encode(self, texts: list[str]) -> list[Any]:
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    def _tokens(self, rendered: _Rendered, encoding: Any, origin: Origin) -> Tokens:
        """A token is of a turn when its characters overlap the turn's. Where they are is asked of a few tokens only:
        the offsets of all would take as long to hand over as a third of the encoding."""
        ids = encoding.ids
        train_on = bytearray(len(ids))
        at = 0
        for start, end in rendered.spans:
            first = _token_at(encoding, start, at, len(ids))
            at = _token_at(encoding, end, first, len(ids))
            while at < len(ids) and encoding.token_to_chars(at)[0] < end:  # it goes over the end
                at += 1
            stop = at  # leave out what the template writes after the end of the turn: no engine generates it
            while stop > first and ids[stop - 1] not in self.control_ids:
                stop -= 1
            stop = stop if stop > first else at
            train_on[first:stop] = b"\1" * (stop - first)
        return Tokens(ids, train_on, origin)

    def _end_of_turn(self, rendered: _Rendered) -> int | None:
        """The control token that ends the supervised turn, if the template writes one."""
        tokens = self._tokens(rendered, self._encode([rendered.text])[0], Origin("", 0))
        trained = [i for i, on in zip(tokens.ids, tokens.train_on, strict=True) if on]
        return trained[-1] if trained and trained[-1] in self.control_ids else None

    # self-checks

    def check(self) -> None:
        """Refuses a template that would train the wrong thing; run before every training. Raises TemplateError."""
        rendered, prompt = self._sample()
        encoding, prompt_ids = self._encode([rendered.text])[0], self._encode([prompt])[0].ids
        ids = encoding.ids
        if SAMPLE[1].content not in rendered.text[len(prompt) :]:
            raise TemplateError(
                f"the chat template ({self.template_name}) leaves the assistant's text out",
                harm="The model would be trained on nothing.",
                hint="Correct the template, or set chat.template: plain.",
            )
        tokens = self._tokens(rendered, encoding, Origin("", 0))
        trained = self.tokenizer.decode([i for i, on in zip(tokens.ids, tokens.train_on, strict=True) if on])
        if self._end_of_turn(rendered) is None or SAMPLE[1].content not in trained:
            raise TemplateError(
                f"the chat template ({self.template_name}) ends the assistant's turn without an end-of-turn token",
                harm="The model would never learn to stop.",
                hint="Write {{ eos_token }} after the assistant's content, or set chat.template: plain"
                + ("" if self.tokenizer.eos_token else " and give the tokenizer an eos_token (chat.add_tokens)")
                + ".",
            )
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            raise TemplateError(
                "every sample begins with two beginning-of-text tokens",
                harm="Other engines write one; the model would be served what it was not trained on.",
                hint="Remove the literal token or {{ bos_token }} from the template.",
            )
        if ids[: len(prompt_ids)] != prompt_ids:
            raise TemplateError(
                "the tokenizer merges the end of the prompt with the beginning of the answer",
                harm="At inference the prompt is encoded alone: the model would meet ids it was not trained on.",
                hint="End the template's generation prompt with a newline or a control token.",
            )


def _token_at(encoding: Any, character: int, low: int, high: int) -> int:
    """The first token from `low` on that ends behind a character; `high`, their number, where there is none."""
    found = encoding.char_to_token(character)
    if found is not None and found >= low:
        return found
    return bisect_right(range(high), character, low, key=lambda place: encoding.token_to_chars(place)[1])


def texts_in(value: Any) -> Iterator[str]:
    """Every string in a nested value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from texts_in(key)
            yield from texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_in(inner)


def open_chat(
    base: str | Path,
    settings: ChatSettings | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Chat:
    """The tokenizer and template of a model folder or hub id; `check` is run before training, not here."""
    renderer().start()  # unless it was when torch began to be imported; it will be ready when the tokenizer is
    loaded = load_tokenizer(
        str(base), settings or ChatSettings(), revision=revision, trust_remote_code=trust_remote_code
    )
    return Chat(loaded)
