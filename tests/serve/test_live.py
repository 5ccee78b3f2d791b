"""A real server on a real socket: clients that leave, clients that crowd, and how it starts and stops."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from fastapi.testclient import TestClient

from fitout.chat.types import Message
from fitout.engine import Completion
from fitout.errors import RequestError
from fitout.serve import ServeSettings
from fitout.serve.app import create_app, serve

ROUTE = "/v1/chat/completions"


class Endless:
    """An engine whose answers go on until somebody stops them, `most` at once; counts what it does."""

    def __init__(self, engine, most=100):
        self.chat = engine.chat
        self.at_once = most
        self.running = 0
        self.pieces = 0
        self.most = 0

    def stream(self, messages, *, cancelled, **_):
        return Said(cancelled)

    def flight(self, most):
        return Fly(self)


class Said:
    """A stream that says a word a step until it is cancelled."""

    prompt_tokens = 3
    error = completion = None

    def __init__(self, cancelled):
        self.cancelled, self.said = cancelled, ""

    def take(self):
        said, self.said = self.said, ""
        return said


class Fly:
    def __init__(self, outer):
        self.outer, self.streams = outer, []

    def add(self, stream):
        self.streams.append(stream)

    def step(self):
        outer = self.outer
        for stream in [stream for stream in self.streams if stream.cancelled()]:
            self.streams.remove(stream)
            stream.completion = Completion("", [], 3, "cancelled")
        outer.running = min(len(self.streams), outer.at_once)
        outer.most = max(outer.most, outer.running)
        for stream in self.streams[: outer.at_once]:
            outer.pieces += 1
            stream.said = "word "
        time.sleep(0.01)


@contextlib.contextmanager
def running(engine, **settings):
    """The app under uvicorn on a free port; gives (port, app)."""
    app = create_app(engine, ServeSettings(**settings), "tiny")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield listener.getsockname()[1], app
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def wait_for(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def post(port: int, *, read: bool = True, **fields):
    """Sends a request; (connection, response), the response not read when `read` is false."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, **fields}
    connection.request("POST", ROUTE, json.dumps(body), {"Content-Type": "application/json"})
    return connection, connection.getresponse() if read else None


def test_a_real_answer_over_a_real_socket(engine):
    with running(engine) as (port, _):
        _, response = post(port)
        whole = json.loads(response.read())["choices"][0]["message"]["content"]
        _, response = post(port, stream=True)
        lines = response.read().decode().split("\n\n")
        texts = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in lines[:-2]]
        assert "".join(texts) == whole and lines[-2] == "data: [DONE]"


@pytest.mark.parametrize("stream", [True, False])
def test_generation_ends_when_the_client_leaves(engine, stream):
    endless = Endless(engine)
    with running(endless) as (port, app):
        connection, response = post(port, read=stream, stream=stream)
        wait_for(lambda: endless.running == 1)
        if stream:
            assert response.read1(10).startswith(b"data: ")
            response.close()
        connection.close()
        wait_for(lambda: endless.running == 0)
        wait_for(lambda: app.state.worker.busy == 0)
        made = endless.pieces
        time.sleep(0.1)
        assert endless.pieces == made


def test_a_client_that_leaves_while_it_waits_is_never_computed(engine):
    endless = Endless(engine, most=1)
    with running(endless) as (port, app):
        first, _ = post(port, read=False, stream=True)
        wait_for(lambda: endless.running == 1)
        second, _ = post(port, read=False, stream=True)
        wait_for(lambda: app.state.worker.busy == 2)
        second.close()
        wait_for(lambda: app.state.worker.busy == 1)  # its place is free while the first is still answered
        assert endless.running == 1
        first.close()
        wait_for(lambda: app.state.worker.busy == 0)
        assert endless.most == 1


def test_a_crowd_is_told_to_come_back(engine):
    endless = Endless(engine)
    with running(endless, max_concurrent=2) as (port, app):
        taken = [post(port, read=False, stream=True)[0] for _ in range(2)]
        wait_for(lambda: app.state.worker.busy == 2)
        _, refused = post(port)
        assert refused.status == 429 and int(refused.headers["Retry-After"]) >= 1
        assert json.loads(refused.read())["error"]["type"] == "rate_limit_error"
        wait_for(lambda: endless.most == 2)  # at once
        health = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        health.request("GET", "/health")
        assert health.getresponse().status == 200
        for connection in taken:
            connection.close()
        wait_for(lambda: app.state.worker.busy == 0)
        again, response = post(port, stream=True)
        assert response.status == 200
        again.close()
        response.close()


def test_a_fault_in_the_middle_of_a_stream_is_an_event(engine):
    class Breaks:
        chat = engine.chat

        def stream(self, *_, cancelled, **__):
            return Said(cancelled)

        def flight(self, most):
            class Half(Fly):
                def step(self):
                    if self.streams[0].said is None:
                        raise ZeroDivisionError("inside")
                    self.streams[0].said = "half "
                    self.streams[0].take = lambda: setattr(self.streams[0], "said", None) or "half "

            return Half(None)

    with running(Breaks()) as (port, app):
        _, response = post(port, stream=True)
        blocks = response.read().decode().split("\n\n")
        assert json.loads(blocks[-2][6:])["error"]["type"] == "server_error"
        assert "[DONE]" not in "".join(blocks) and "inside" not in "".join(blocks)
        wait_for(lambda: app.state.worker.busy == 0)


class Panic(BaseException):
    """As a library in Rust raises them."""


def test_a_panic_is_one_requests_own_and_the_server_goes_on(engine):
    class Panics:
        chat = engine.chat
        flights = 0

        def stream(self, messages, **how):
            if messages[0].content == "panic":
                raise Panic("inside")
            return engine.stream(messages, **how)

        def flight(self, most):
            self.flights += 1
            if self.flights == 1:
                raise Panic("inside")
            return engine.flight(most)

    with running(Panics()) as (port, app):
        _, first = post(port)  # the thread that generates
        assert first.status == 500 and b"inside" not in first.read()
        _, second = post(port, messages=[{"role": "user", "content": "panic"}])  # the one that reads
        assert second.status == 500 and b"inside" not in second.read()
        _, third = post(port)
        assert third.status == 200 and json.loads(third.read())["choices"]
        wait_for(lambda: app.state.worker.busy == 0)


def test_reading_a_request_does_not_hold_up_those_that_are_answered(engine):
    started, go_on = threading.Event(), threading.Event()

    class Slow(Endless):
        def stream(self, messages, **how):
            if messages[0].content == "slow":
                started.set()
                go_on.wait(10)
            return super().stream(messages, **how)

    slow = Slow(engine)
    with running(slow) as (port, app):
        first, _ = post(port, read=False, stream=True)
        wait_for(lambda: slow.pieces > 2)
        second, _ = post(port, read=False, stream=True, messages=[{"role": "user", "content": "slow"}])
        assert started.wait(5)
        before = slow.pieces
        wait_for(lambda: slow.pieces > before + 5)
        go_on.set()
        wait_for(lambda: slow.running == 2)
        first.close()
        second.close()
        wait_for(lambda: app.state.worker.busy == 0)


def test_an_app_that_was_closed_can_be_opened_again(engine):
    app = create_app(engine, ServeSettings(), "tiny")
    for _ in range(2):
        with TestClient(app, base_url="http://localhost") as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
            assert client.post(ROUTE, json=body).status_code == 200


def test_requests_are_answered_at_once(engine):
    """A short answer ends while a long one that began before is still made, and both are the engine's."""
    asked = [{"role": "user", "content": "Hello"}]
    long = {"messages": asked, "max_tokens": 600, "stream": True}
    with running(engine, max_new_tokens=1000) as (port, app):
        first, response = post(port, **long)
        assert b"content" in response.readline() + response.readline() + response.readline()
        _, short = post(port, max_tokens=5)
        text = json.loads(short.read())["choices"][0]["message"]["content"]
        assert app.state.worker.busy == 1  # the long one
        rest = response.read().decode()
        first.close()
    assert "[DONE]" in rest
    [want] = engine.generate([[Message("user", "Hello")]], max_new_tokens=5)
    assert text == want.text


def test_a_taken_port_is_told(engine):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RequestError, match="cannot listen"):
        serve(engine, ServeSettings(port=taken.getsockname()[1]))


def test_serve_says_where_it_is_and_ends_on_an_interrupt():
    code = (
        "import fitout.serve.app as a, fitout.serve as s, types;"
        "a.serve(types.SimpleNamespace(chat=None), s.ServeSettings(port=0), model_name='tiny')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=os.environ
    )
    try:
        first = process.stdout.readline()
        assert "http://127.0.0.1:" in first and "tiny" in first
        port = int(first.split("127.0.0.1:")[1].split("/")[0])

        def up():
            with contextlib.suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/v1/models")
                return connection.getresponse().status == 200

        wait_for(up, 20)
        process.send_signal(signal.SIGINT)
        process.wait(10)
        assert "curl" in process.stdout.read()
    finally:
        process.kill()
        process.stdout.close()
