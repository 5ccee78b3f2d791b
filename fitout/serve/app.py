"""The HTTP application: /v1/chat/completions, /v1/models, /health, and the gate before them.

A request passes, in this order: the token (or, without one, the Host header), the content type, the body limit, the
schema, the control tokens, a free place, the prompt limit. Each refusal is an error in OpenAI's form.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ..chat.types import Message
from ..errors import FitoutError, RequestError
from . import ServeSettings, check_settings
from .jobs import Job, Worker
from .wire import ApiError, ChatRequest, Reply, parse_request, usage_of

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ..engine import Completion, Engine, Stream

log = logging.getLogger("fitout.serve")
BODY_SECONDS = 30  # a client that sends its body slower than this is turned away
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def create_app(engine: Engine, settings: ServeSettings, model_name: str) -> FastAPI:
    """The application. Raises RequestError when it would be open to a network without a token."""
    check_settings(settings)
    worker = Worker(engine, settings.max_concurrent)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()

    app = FastAPI(title="fitout", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.worker = worker
    app.add_middleware(_Gate, settings=settings)
    _speak_openai(app)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    model = {"id": model_name, "object": "model", "created": started, "owned_by": "fitout"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        _check_model(name, model_name)
        return model

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = parse_request(await _read_body(request, settings.max_body_bytes))
        _check_model(asked.model, model_name)
        _check_limit(asked, settings)
        job = worker.submit(lambda cancelled: _begin(engine, settings, asked, cancelled))
        reply = Reply(model_name)
        try:
            stream = await _unless_gone(request, job.next())
            if asked.stream:
                return _EventResponse(_events(job, reply, asked, stream), job)
            return JSONResponse(await _unless_gone(request, _whole(job, reply)))
        except BaseException as error:
            job.stop()
            if not isinstance(error, Exception):
                raise
            return _error_response(error)

    return app


def serve(engine: Engine, settings: ServeSettings, *, model_name: str = "fitout") -> None:
    """Serves until interrupted; says where, and how to ask. Raises RequestError when the port cannot be had."""
    import uvicorn

    app = create_app(engine, settings, model_name)
    listener = _listen(settings)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"Serving {model_name} at {url}/v1 (Ctrl-C stops)\n\n{_example(url, model_name, settings)}\n", flush=True)
    config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listener])


def _example(url: str, model_name: str, settings: ServeSettings) -> str:
    body = json.dumps({"model": model_name, "messages": [{"role": "user", "content": "Hello"}]})
    token = ' \\\n  -H "Authorization: Bearer $TOKEN"' if settings.token else ""
    return f"curl {url}/v1/chat/completions{token} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"


def _listen(settings: ServeSettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}",
            hint="Choose another --port (0 takes a free one) or --host.",
        ) from error
    return listener


# who may ask


class _Gate:
    """Turns callers away before anything of their request is read."""

    def __init__(self, app: ASGIApp, settings: ServeSettings):
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                _check_caller(Request(scope), self._settings)
            except ApiError as error:
                return await _error_response(error)(scope, receive, send)
        await self._app(scope, receive, send)


def _check_caller(request: Request, settings: ServeSettings) -> None:
    """With a token, whoever has it. Without one, programs on this machine: a page in a browser that resolves its own
    name to 127.0.0.1 shows that name in Host; one that posts across origins cannot send JSON unasked (no CORS)."""
    if settings.token is not None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode(), settings.token.encode())
        if not (same and scheme.lower() == "bearer"):
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "the token is missing or wrong", code="invalid_api_key", headers=headers)
    elif _host_name(request.headers.get("host", "")) not in LOCAL_NAMES | {settings.host}:
        raise ApiError(403, "the Host header does not name this machine", code="forbidden_host")
    if request.method == "POST":
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "the Content-Type must be application/json")


def _host_name(host: str) -> str:
    """`name` of `name`, `name:port`, `[::1]:port`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()


# what may be asked


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as more than `limit` bytes have come."""
    too_large = ApiError(413, f"the request is larger than {limit} bytes", code="request_too_large")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except ClientDisconnect:
        raise _gone() from None
    except TimeoutError:
        raise ApiError(408, f"the request did not arrive within {BODY_SECONDS} seconds") from None
    return bytes(body)


def _check_model(name: str, served: str) -> None:
    if name != served:
        raise ApiError(
            404, f"the model {name!r} is not served here; {served!r} is", param="model", code="model_not_found"
        )


def _check_limit(asked: ChatRequest, settings: ServeSettings) -> None:
    if asked.limit is not None and asked.limit > settings.max_new_tokens:
        param = "max_completion_tokens" if asked.max_completion_tokens else "max_tokens"
        raise ApiError(400, f"{param} is {asked.limit}, this server allows {settings.max_new_tokens}", param=param)


def _begin(engine: Engine, settings: ServeSettings, asked: ChatRequest, cancelled: Callable[[], bool]) -> Stream:
    """In the worker: the request as the engine takes it. Raises ApiError or RequestError; nothing is generated yet."""
    if forged := engine.chat.forged([Message("user", text) for text in asked.own_texts()]):
        raise ApiError(400, f"a tool or tool call contains {forged!r}, a control token of this model", param="tools")
    messages = [message.message() for message in asked.messages]
    if lost := engine.chat.unwritten(messages, asked.offered):
        raise ApiError(
            400, f"this model's chat template does not write {' and '.join(lost)}: leave that out", param="tools"
        )
    stream = engine.stream(
        messages,
        max_new_tokens=asked.limit or settings.max_new_tokens,
        temperature=asked.temperature or 0.0,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        stop=asked.stops,
        seed=asked.seed,
        tools=asked.offered,
        cancelled=cancelled,
    )
    if stream.prompt_tokens > settings.max_prompt_tokens:
        raise ApiError(
            400,
            f"the prompt has {stream.prompt_tokens} tokens, this server allows {settings.max_prompt_tokens}",
            param="messages",
            code="context_length_exceeded",
        )
    return stream


# answering


async def _whole(job: Job, reply: Reply) -> dict[str, Any]:
    async for event in job.pieces():
        last: str | Completion = event
    assert not isinstance(last, str)  # pieces() ends with the completion
    return reply.whole(last.text, last.finish_reason, usage_of(last.prompt_tokens, len(last.ids)))


async def _events(job: Job, reply: Reply, asked: ChatRequest, stream: Stream) -> AsyncIterator[str]:
    """The answer as server-sent events: the role, the text, the finish reason, the usage if asked for, [DONE]."""
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage

    def event(chunk: dict[str, Any]) -> str:
        if with_usage:
            chunk.setdefault("usage", None)
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    try:
        yield event(reply.chunk({"role": "assistant", "content": ""}))
        async for piece in job.pieces():
            if isinstance(piece, str):
                yield event(reply.chunk({"content": piece}))
            else:
                yield event(reply.chunk({}, piece.finish_reason))
                if with_usage:
                    yield event(reply.usage_chunk(usage_of(stream.prompt_tokens, len(piece.ids))))
        yield "data: [DONE]\n\n"
    except Exception as error:  # the status line has been sent; the error can only be told as an event
        yield f"data: {json.dumps(_api_error(error).body(), ensure_ascii=False)}\n\n"


class _EventResponse(StreamingResponse):
    """Server-sent events of one job, which is stopped however the response ends (or if it never begins)."""

    def __init__(self, events: AsyncIterator[str], job: Job):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.stop()


def _gone() -> ApiError:
    """The client has left; nobody reads this answer (499, as nginx logs it)."""
    return ApiError(499, "the client has left")


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of `work`; raises _gone() as soon as the client has closed its connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = {asyncio.ensure_future(work): True, asyncio.ensure_future(gone()): False}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if tasks[task]:
                return task.result()
        raise _gone()
    finally:
        for task in tasks:
            task.cancel()


# errors


def _api_error(error: Exception) -> ApiError:
    """Any error in OpenAI's form; a fault of ours is logged here and not described to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, " ".join(error.lines()), param="messages")
    if isinstance(error, FitoutError):
        return ApiError(500, error.message, kind="server_error")
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    log.error("answering failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why", kind="server_error")


def _error_response(error: Exception) -> JSONResponse:
    fault = _api_error(error)
    return JSONResponse(fault.body(), status_code=fault.status, headers=fault.headers)


def _speak_openai(app: FastAPI) -> None:
    async def answer(_: Request, error: Exception) -> JSONResponse:
        return _error_response(error)

    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
