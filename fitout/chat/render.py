"""Messages -> token ids and which of them are trained, in one walk; the generation prompt; template self-checks.

One rule decides what is supervised: a turn of the assistant is what the template writes *after* the generation prompt
that the model will see at inference, up to and including the token that ends the turn. So nothing needs to be known
about a template, and training and inference cannot drift apart.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..errors import TemplateError, TemplateLimitError
from . import ChatSettings
from .render_worker import Span, as_served, divided, trained
from .sandbox import Ask, Crew, Encoded, Renderer, renderer
from .tokenizer import LoadedTokenizer, load_tokenizer
from .types import Conversation, Message, Origin, Text, Tokens

SWITCH = re.compile(r"\b(\w*think\w*)\s+is\s+(?:not\s+)?defined\b")  # as Qwen's and its relatives' templates spell it
FEW = 5000  # conversations, for which it does not pay to start more processes
MOST = 8  # processes; with more the one that gives them work is the slower
EXTRAS = {"tool calls": "tool_calls", "reasoning": "reasoning_content"}  # of a message, by what people call them
PROBE = "fitoutprobe"
SAMPLE = (Message("user", "Which way is north?"), Message("assistant", "That way."))


@dataclass(frozen=True)
class _Rendered:
    """A rendered string and the character spans [start, end) of its supervised turns."""

    text: str
    spans: tuple[Span, ...]


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
        """Their ids, without what a tokenizer writes for characters that it does not know: that ends no turn."""
        unknown = self.tokenizer.unk_token_id
        ids = set(self.tokenizer.convert_tokens_to_ids(list(self.control)))
        return frozenset(ids if unknown == self.tokenizer.eos_token_id else ids - {unknown})

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

    def render_all(
        self, batches: Iterable[Sequence[Conversation]], count: int
    ) -> Generator[list[list[Tokens] | TemplateError]]:
        """`render` for each of `count` conversations, or why the template refuses it, batch by batch and in order.
        Where they are many, some processes render and encode batches ahead of what is taken."""
        if count < FEW:
            yield from map(self._each, batches)
            return
        processes = min(MOST, len(os.sched_getaffinity(0)))
        with Crew(processes, self.tokenizer.backend_tokenizer.to_str(), self.control_ids) as crew:
            ahead: deque[Future[list[list[Tokens] | TemplateError]]] = deque()
            for batch in batches:
                ahead.append(crew.submit(partial(self._each_by, batch)))
                if len(ahead) > 2 * processes:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _each(self, batch: Sequence[Conversation]) -> list[list[Tokens] | TemplateError]:
        try:
            return [*self.render_many(batch)]
        except TemplateError:
            return [self._one(talk) for talk in batch]

    def _one(self, talk: Conversation) -> list[Tokens] | TemplateError:
        try:
            return self.render(talk)
        except TemplateError as error:
            return error

    def _each_by(self, batch: Sequence[Conversation], by: Renderer) -> list[list[Tokens] | TemplateError]:
        """`_each` by a process that encodes."""
        found: list[list[Tokens] | TemplateError] = []
        for answer, talk in zip(self._of_all(batch, by.encode), batch, strict=True):
            if isinstance(answer, TemplateError):
                found.append(self._refused(answer))
            elif isinstance(answer, Encoded):
                found.append([Tokens(ids, train_on, talk.origin) for ids, train_on in answer])
            else:
                found.append(self._encoded_here(answer, talk))
        return found

    def _encoded_here(self, texts: Sequence[str], talk: Conversation) -> list[Tokens] | TemplateError:
        try:
            [group] = self.encode([talk], [self._divided(texts)])
        except TemplateError as error:
            return error
        return group

    def encode(self, conversations: Sequence[Conversation], rendered: Sequence[list[_Rendered]]) -> list[list[Tokens]]:
        """The samples that conversations give, from what `strings` made of them."""
        flat = [one for group in rendered for one in group]
        encodings = iter(self._encode([one.text for one in flat]))
        return [
            [tokens for one in group for tokens in self._as_served(one, next(encodings), conversation.origin)]
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
        """An answer's text without control tokens. Blanks around it are the template's or the tokenizer's."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def forged(self, messages: Iterable[Message]) -> str | None:
        """The first control token that a message's own text (content, name, tool calls) spells, if any."""
        for message in messages:
            for text in texts_in([message.content, message.extra]):
                for token in self.control:
                    if token in text:
                        return token
        return None

    def unwritten(self, messages: Iterable[Message], tools: Sequence[dict] = ()) -> list[str]:
        """What these have that the template leaves out: tools, tool calls, reasoning."""
        there = {"tools"} if tools else set()
        for message in messages:
            there.update(what for what, key in EXTRAS.items() if message.extra.get(key))
        return [what for what in sorted(there) if not self._writes[what]]

    @cached_property
    def _writes(self) -> dict[str, bool]:
        """Whether the template writes each: it is given a word in that place, and looked whether it comes out."""
        asked, function = Message("user", "Which way is north?"), {"name": PROBE, "description": "", "parameters": {}}
        calls = {"tool_calls": [{"type": "function", "function": {"name": PROBE, "arguments": {}}}]}

        def comes_out(*answer: Message, tools: Sequence[dict] = ()) -> bool:
            try:
                [[text]] = self._render([((asked, *answer), tools, [(1 + len(answer), False)])])
            except TemplateError:
                return False
            return PROBE in text

        return {
            "tools": comes_out(tools=[{"type": "function", "function": function}]),
            "tool calls": comes_out(Message("assistant", "", extra=calls)),
            "reasoning": comes_out(Message("assistant", "That way.", extra={"reasoning_content": PROBE})),
        }

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

    def _ask(self, asks: Sequence[Ask], by: Callable[..., list[Any]] | None = None) -> list[Any]:
        """What the process that renders (see sandbox.py) makes of each, or the TemplateError of what it refuses."""
        own = self.tokenizer
        template = [own.get_chat_template(None, ask.tools or None) for ask in asks]  # some have one for tools
        found: list[Any] = [None] * len(asks)
        for one in dict.fromkeys(template):
            places = [at for at, its in enumerate(template) if its == one]
            try:
                answers = (by or renderer().render)(one, own.special_tokens_map, [asks[at] for at in places])
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
        found = self._ask([Ask([one.as_dict() for one in messages], tools, cuts) for messages, tools, cuts in asked])
        refused = next((answer for answer in found if isinstance(answer, TemplateError)), None)
        if refused:
            raise self._refused(refused)
        return found

    def _of_all(self, conversations: Sequence[Conversation], by: Callable[..., list[Any]] | None = None) -> list[Any]:
        """The whole of each conversation and, for each supervised turn, its prompt and the string up to its end (or
        what `by` makes of them)."""
        asks = []
        for one in conversations:
            turns = [at for at, message in enumerate(one.messages) if message.role == "assistant" and message.train]
            cuts = [(len(one.messages), False), *(cut for at in turns for cut in ((at, True), (at + 1, False)))]
            asks.append(Ask([message.as_dict() for message in one.messages], one.tools, cuts))
        try:
            return self._ask(asks, by)
        except TemplateLimitError as error:
            error.where = str(conversations[error.place].origin)
            raise

    def strings(self, conversations: Sequence[Conversation]) -> list[list[_Rendered]]:
        """The strings to encode of each conversation (`render_worker.divided`)."""
        found = []
        for answer in self._of_all(conversations):
            if isinstance(answer, TemplateError):
                raise self._refused(answer)
            found.append(self._divided(answer))
        return found

    def _divided(self, texts: Sequence[str]) -> list[_Rendered]:
        try:
            return [_Rendered(*one) for one in divided(texts[0], texts[1:])]
        except ValueError:
            raise TemplateError(
                f"the chat template ({self.template_name}) writes a finished turn differently from its own prompt",
                harm="The model would be trained on text that it never sees at inference.",
                hint=f"Try chat.template_kwargs: {{{self._switch()}: true}} (or false), or another template.",
            ) from None

    def _refused(self, error: TemplateError) -> TemplateError:
        return TemplateError(
            f"the chat template ({self.template_name}) does not render: {error.message}",
            harm="These messages cannot be turned into what the model reads.",
            hint="Correct the template or the messages, or set chat.template: plain.",
        )

    def _switch(self) -> str:
        """A variable by which the template asks whether the model thinks aloud."""
        return next(iter(SWITCH.findall(self.tokenizer.chat_template)), "enable_thinking")

    def _sample(self) -> tuple[_Rendered, str]:
        """SAMPLE with its last turn supervised, and its prompt."""
        [[whole, prompt]] = self._render([(SAMPLE, (), [(2, False), (1, True)])])
        [rendered] = self._divided([whole, prompt, whole])
        return rendered, prompt

    def _encode(self, texts: list[str]) -> list[Any]:
        return self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)

    def _as_served(self, rendered: _Rendered, encoding: Any, origin: Origin) -> list[Tokens]:
        own = self.tokenizer.backend_tokenizer
        try:
            found = as_served(rendered.text, rendered.spans, encoding, own, self.control_ids)
        except ValueError:
            raise TemplateError(
                "the tokenizer joins the beginning of an answer with what stands before it",
                where=str(origin),
                harm="The model would be trained on tokens that it never meets when it is served.",
                hint="Leave out the blanks with which the answer begins.",
            ) from None
        return [Tokens(ids, train_on, origin) for ids, train_on in found]

    def _tokens(self, rendered: _Rendered, encoding: Any, origin: Origin) -> Tokens:
        return Tokens(encoding.ids, trained(encoding, rendered.spans, self.control_ids), origin)

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
