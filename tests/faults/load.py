"""Loads a server: `python tests/faults/load.py --model mini --requests 1000 --clients 32`.

One of twenty requests is hostile. Good answers must equal those that the server gave to each request by itself. Prints,
as JSON, the number of each outcome, the seconds, the 95th percentile of the good requests, and the server's resident
memory in MB before and after.
"""

import argparse
import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
from image_mutations import bases, encoded, png

from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render

HOSTILE = ("bomb", "thin", "rubbish", "beams", "url", "json")
NUM_SCENES = 12
"""Different images of good requests: more than the server keeps encoded."""


@contextmanager
def server(model: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """A process of `sdllava serve`, once it answers, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sdllava", "serve", model, "--port", str(port), "--device", "cpu"]
    running = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{address}/health", trust_env=False)
                break
            except httpx.TransportError:
                assert running.poll() is None
                time.sleep(0.2)
        yield running, address
    finally:
        running.kill()
        running.wait()


def chat(model: str, image: bytes, question: str, **fields) -> dict:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, **fields}


def hostile(kind: str, model: str) -> bytes:
    images = {"bomb": png(30_000, 30_000, b""), "thin": png(1, 20_000, bytes(40_000)), "rubbish": b"rubbish" * 99}
    request = chat(model, images.get(kind, bases()["png"]), "What is it?")
    if kind == "beams":
        request["num_beams"] = 5000
    if kind == "url":
        request["messages"][0]["content"][0]["image_url"]["url"] = "http://127.0.0.1:8000/metrics"
    return b"[" * 100_000 if kind == "json" else json.dumps(request).encode()


def load(url: str, requests: int, clients: int, max_tokens: int = 8) -> dict:
    """Send requests from several clients at once.

    Args:
        url: The server.
        requests: Their number.
        clients: How many wait for an answer at a time.
        max_tokens: Tokens of an answer.

    Returns:
        `dict`: `outcomes`, `seconds` and `p95`; see the module.
    """
    options = {"trust_env": False, "timeout": 600, "limits": httpx.Limits(max_connections=clients)}
    with httpx.Client(base_url=url, **options) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        drawn = [sample_question("test", seed) for seed in range(NUM_SCENES)]
        good = [chat(model, encoded(render(s), "PNG"), q.text, max_tokens=max_tokens) for s, q in drawn]

        def answer(request: dict) -> str:
            response = client.post("/v1/chat/completions", json=request)
            return response.json()["choices"][0]["message"]["content"]

        expected = [answer(request) for request in good]

        def one(number: int) -> tuple[str, float]:
            start = time.monotonic()
            if number % 20 == 7:
                kind = HOSTILE[number // 20 % len(HOSTILE)]
                status = client.post("/v1/chat/completions", content=hostile(kind, model)).status_code
                return ("hostile, 4xx" if 400 <= status < 500 else f"{kind}: {status}"), 0.0
            try:
                is_right = answer(good[number % NUM_SCENES]) == expected[number % NUM_SCENES]
            except (httpx.HTTPError, KeyError) as error:
                return f"good: {type(error).__name__}", 0.0
            return ("good, right" if is_right else "good, wrong"), time.monotonic() - start

        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            outcomes = list(pool.map(one, range(requests)))
    times = sorted(seconds for _, seconds in outcomes if seconds)
    outcome = dict(Counter(name for name, _ in outcomes))
    return {"outcomes": outcome, "seconds": time.monotonic() - began, "p95": times[int(len(times) * 0.95)]}


def load_new_server(model: str, requests: int, clients: int) -> dict:
    """Start a server, load it twice, and compare its memory before and after the second time.

    Returns:
        `dict`: As `load`, with `memory`: the resident memory in MB before and after.
    """
    with server(model) as (running, address):
        load(address, 2 * clients, clients)
        memory = [psutil.Process(running.pid).memory_info().rss]
        result = load(address, requests, clients)
        memory.append(psutil.Process(running.pid).memory_info().rss)
    return {**result, "memory": [round(size / 1e6) for size in memory]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", help="The model of a new server.")
    parser.add_argument("--url", help="Instead of a new server: one that runs. Its memory is not measured.")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    given = parser.parse_args()
    if given.url:
        found = load(given.url, given.requests, given.clients)
    else:
        found = load_new_server(given.model, given.requests, given.clients)
    print(json.dumps(found, indent=1))
