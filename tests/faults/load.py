"""Loads a running server: `python tests/faults/load.py --url http://127.0.0.1:8000 --requests 1000 --clients 32`.

One of twenty requests is hostile. Prints, as JSON, the numbers of good and hostile requests that were answered as they
must be, the seconds, the 95th percentile of the good ones, and every other outcome.
"""

import argparse
import base64
import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
from image_mutations import bases, png

HOSTILE = ("bomb", "thin", "rubbish", "beams", "url", "json")


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
        `dict`: See the module.
    """
    options = {"trust_env": False, "timeout": 600, "limits": httpx.Limits(max_connections=clients)}
    with httpx.Client(base_url=url, **options) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        questions = ["What colour is it?", "How many are there?", "Where is it?"]
        good = [chat(model, bases()["png"], question, max_tokens=max_tokens) for question in questions]

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
                is_right = answer(good[number % 3]) == expected[number % 3]
            except (httpx.HTTPError, KeyError) as error:
                return f"good: {type(error).__name__}", 0.0
            return ("good, right" if is_right else "good, wrong"), time.monotonic() - start

        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            outcomes = list(pool.map(one, range(requests)))
    times = sorted(seconds for _, seconds in outcomes if seconds)
    outcome = dict(Counter(name for name, _ in outcomes))
    return {"outcomes": outcome, "seconds": time.monotonic() - began, "p95": times[int(len(times) * 0.95)]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=32)
    given = parser.parse_args()
    print(json.dumps(load(given.url, given.requests, given.clients), indent=1))
