"""The wire format: OpenAI's chat completions, as pydantic models, and the objects sent back.

A field that is not understood, or that asks for what this server does not do, is refused. Fields that exist in the
protocol but have one possible meaning here are accepted with that meaning only (`n: 1`, `logprobs: false`, ...).
Reference: the OpenAI API, POST /v1/chat/completions.
"""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..chat.render import texts_in
from ..chat.types import Message
from ..data.formats.turns import read_calls, read_tools


class ApiError(Exception):
    """An error in OpenAI's form: {"error": {"message", "type", "param", "code"}} with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class WireMessage(_Strict):
    """One message of a request; which fields it may have depends on its role."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> WireMessage:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError("tool_calls and reasoning_content belong to the assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id belongs to the role tool")
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        read_calls(self.tool_calls, 1)
        return self

    def message(self) -> Message:
        """The message as the chat template gets it, tool calls as in training data (their arguments as an object).

        `developer` is OpenAI's newer name for `system`.
        """
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        extra: dict[str, Any] = {
            key: getattr(self, key)
            for key in ("name", "tool_call_id", "reasoning_content")
            if getattr(self, key) is not None
        }
        if self.tool_calls:
            extra["tool_calls"] = read_calls(self.tool_calls, 1)
        return Message("system" if self.role == "developer" else self.role, content or "", extra=extra)


class StreamOptions(_Strict):
    include_usage: bool = False


class TextFormat(_Strict):
    type: Literal["text"]


def _usable_stops(stop: str | list[str] | None) -> str | list[str] | None:
    if stop == "" or (isinstance(stop, list) and "" in stop):
        raise ValueError("a stop string must not be empty")
    return stop


Zero = Annotated[float, Field(ge=0, le=0)]


class ChatRequest(_Strict):
    """The body of POST /v1/chat/completions. `temperature` left out means 0: greedy, as evaluation measures."""

    model: str
    messages: list[WireMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[str | Annotated[list[str], Field(max_length=4)] | None, AfterValidator(_usable_stops)] = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[dict[str, Any]] | None = None
    user: str | None = None  # names the end user to the operator; it has no effect on the answer

    # one possible meaning here
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    response_format: TextFormat | None = None
    tool_choice: Literal["auto"] | None = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise ValueError("max_tokens and max_completion_tokens differ")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        read_tools(self.tools)
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def offered(self) -> tuple[dict, ...]:
        """The tools as the chat template gets them, in training and here."""
        return read_tools(self.tools)

    def own_texts(self) -> list[str]:
        """Every string of the request that a template may write out, beside the contents of the messages."""
        extras = [message.message().extra for message in self.messages]
        return list(texts_in([extras, *self.offered]))


def parse_request(body: bytes) -> ChatRequest:
    """Raises ApiError (400) that names the first field at fault and lists every fault."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        faults = [(".".join(str(part) for part in fault["loc"]), _say(fault)) for fault in error.errors()]
        lines = list(dict.fromkeys(f"{where}: {what}" if where else what for where, what in faults))
        raise ApiError(400, "; ".join(lines[:10]), param=faults[0][0] or None) from None
    except RecursionError:
        raise ApiError(400, "the request is nested too deeply") from None


def _say(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return "this server does not know this field; leave it out"
    return str(fault["msg"]).removeprefix("Value error, ")


class Reply:
    """Builds the objects of one answer, which share an id and a time."""

    def __init__(self, model: str):
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, text: str, finish_reason: str, usage: dict[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage}


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
