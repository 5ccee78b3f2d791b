"""Requests that are answered at once beside the same requests answered one after the other, over HTTP on this machine.

    python -m benchmarks.serving --out benchmarks/results/serving.json

A random Llama of the shape 30m (`work.py`), in fp32, is served by `fitout.serve.app`; N clients ask at the same time,
each its own prompts in turn. The two ways run in turn in one process, on the same requests; all answers must be the
same in both.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from .against_trl import machine

CLIENTS = (1, 2, 4, 8, 16)
EACH = 2  # requests of a client
NEW = 64  # tokens of an answer
WORDS = ["time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fitout-serving-") as folder:
        engine = _engine(Path(folder))
        rows = [_compare(engine, clients, asked.rounds) for clients in asked.clients]
    result = {"kind": "serving", "quick": False, "shape": "30m", "new_tokens": NEW, "machine": machine(), "rows": rows}
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


def _engine(folder: Path) -> Any:
    from fitout.engine import Engine

    from .work import _make_base

    _make_base(folder / "base", "30m", 1024)
    return Engine.open(str(folder / "base"), precision="fp32")


def _compare(engine: Any, clients: int, rounds: int) -> dict[str, Any]:
    """Tokens a second and the median time to a whole answer, both ways in turn."""
    rng = random.Random(clients)
    prompts = [[" ".join(rng.choices(WORDS, k=rng.randint(5, 120))) for _ in range(EACH)] for _ in range(clients)]
    told: dict[str, list[dict[str, float]]] = {"at once": [], "one after the other": []}
    texts = []
    for number in range(rounds + 1):
        for way in list(told) if number % 2 else list(told)[::-1]:
            figures, answers = _ask(engine, prompts, 1 if way != "at once" else None)
            texts.append(answers)
            if number:  # the first round warms up
                told[way].append(figures)
    assert all(answers == texts[0] for answers in texts), "the answers differ"
    medians = {
        way: {key: round(median(one[key] for one in figures), 2) for key in figures[0]} for way, figures in told.items()
    }
    ratios = [
        one["tokens_per_second"] / other["tokens_per_second"]
        for one, other in zip(told["at once"], told["one after the other"], strict=True)
    ]
    spread = [round(value, 2) for value in (median(ratios), min(ratios), max(ratios))]
    print(clients, medians, spread, flush=True)
    return {"clients": clients, **medians, "ratio": spread, "rounds": told}


def _ask(engine: Any, prompts: list[list[str]], most: int | None) -> tuple[dict[str, float], list[list[str]]]:
    import uvicorn

    from fitout.serve import ServeSettings
    from fitout.serve.app import create_app

    class Limited:
        """The engine, as many at once as `most`."""

        def __getattr__(self, name: str) -> Any:
            return getattr(engine, name)

        def flight(self, places: int) -> Any:
            return engine.flight(most or places)

    app = create_app(Limited(), ServeSettings(max_concurrent=64), "benchmark")  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/chat/completions"
    seconds: list[float] = []

    def client(own: list[str]) -> list[str]:
        answers = []
        for prompt in own:
            start = time.perf_counter()
            answers.append(_post(url, prompt))
            seconds.append(time.perf_counter() - start)
        return answers

    start = time.perf_counter()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(client, prompts))
    whole = time.perf_counter() - start
    server.should_exit = True
    thread.join()
    tokens = sum(count for own in answers for _, count in own)
    figures = {"tokens_per_second": tokens / whole, "seconds_an_answer": median(seconds)}
    return figures, [[text for text, _ in own] for own in answers]


def _post(url: str, prompt: str) -> tuple[str, int]:
    body = {"model": "benchmark", "messages": [{"role": "user", "content": prompt}], "max_tokens": NEW}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        told = json.loads(response.read())
    return told["choices"][0]["message"]["content"], told["usage"]["completion_tokens"]


if __name__ == "__main__":
    main()
