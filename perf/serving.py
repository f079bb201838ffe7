"""Requests per second of `sdllava serve` and of vLLM with this package's plugin, one after the other.

Every request has another rendered scene and question; the miniature answers. Both servers run with the same number of
threads. Needs the environment of `make test-vllm`.

    .venv-vllm/bin/python perf/serving.py
"""

import base64
import io
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import psutil
import typer
from rich.console import Console
from rich.table import Table

from sdllava import mini_path
from sdllava.atomic_files import write_json
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render

SERVERS = {
    "sdllava serve": ["sdllava", "serve", str(mini_path()), "--device", "cpu"],
    "vLLM": [
        "vllm.entrypoints.openai.api_server", "--model", str(mini_path()), "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "256",
    ],
}  # fmt: skip
"""The module and the arguments that start each server."""


@contextmanager
def running(arguments: Sequence[str], start_seconds: float) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process, once it answers.

    Raises:
        SystemExit: It ends, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + start_seconds
    try:
        while True:
            try:
                httpx.get(f"{address}/health", trust_env=False)
                break
            except httpx.TransportError:
                if server.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"{' '.join(command)!r} did not start. Run it by itself to see why.") from None
                time.sleep(0.5)
        yield address, psutil.Process(server.pid)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def cpu_seconds(server: psutil.Process) -> float:
    """CPU time of a server and of the processes that it started."""
    times = [process.cpu_times() for process in (server, *server.children(recursive=True))]
    return sum(time.user + time.system for time in times)


def request(seed: int, model: str, max_tokens: int) -> dict[str, Any]:
    """A chat completion about a scene."""
    scene, question = sample_question("test", seed)
    buffer = io.BytesIO()
    render(scene).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}


def load(address: str, requests: Sequence[dict[str, Any]], clients: int) -> tuple[float, list[float], list[str]]:
    """Send requests from several clients at once.

    Returns:
        The seconds in all, the seconds of each request, and the answers.
    """
    with httpx.Client(trust_env=False, timeout=600, limits=httpx.Limits(max_connections=clients)) as client:

        def send(body: dict[str, Any]) -> tuple[float, str]:
            start = time.perf_counter()
            answer = client.post(f"{address}/v1/chat/completions", json=body).raise_for_status().json()
            return time.perf_counter() - start, answer["choices"][0]["message"]["content"].strip()

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(send, requests))
        seconds = time.perf_counter() - start
    return seconds, [latency for latency, _ in found], [text for _, text in found]


def main(
    requests: Annotated[int, typer.Option(min=20, help="Requests per round.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Clients that wait for an answer at a time.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per server, each with other scenes.")] = 3,
    start_seconds: Annotated[float, typer.Option(help="How long a server may take to start.")] = 900,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path(__file__).parent / "results" / "serving.json",
) -> None:
    """Measures both servers and compares their answers."""
    rows: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for name, arguments in SERVERS.items():
        with running(arguments, start_seconds) as (address, server):
            model = httpx.get(f"{address}/v1/models", trust_env=False).json()["data"][0]["id"]
            bodies = [request(seed, model, max_tokens) for seed in range((rounds + 1) * requests)]
            load(address, bodies[:clients], clients)  # warm-up
            before = cpu_seconds(server)
            measured = [load(address, bodies[i * requests :][:requests], clients) for i in range(1, rounds + 1)]
            used = cpu_seconds(server) - before
        latencies = sorted(latency for _, some, _ in measured for latency in some)
        rows[name] = {
            "requests_per_second": statistics.median(requests / seconds for seconds, _, _ in measured),
            "rounds": [requests / seconds for seconds, _, _ in measured],
            "cpu_seconds_per_request": used / (rounds * requests),
            "median_seconds": statistics.median(latencies),
            "p95_seconds": latencies[int(0.95 * len(latencies))],
        }
        answers[name] = [text for _, _, texts in measured for text in texts]
    first, second = rows.values()
    ratio = second["requests_per_second"] / first["requests_per_second"]
    equal = statistics.mean(a == b for a, b in zip(*answers.values(), strict=True))
    table = Table(f"{clients} clients", "requests/s", "CPU s per request", "median s", "p95 s", box=None)
    for name, row in rows.items():
        keys = ("requests_per_second", "cpu_seconds_per_request", "median_seconds", "p95_seconds")
        numbers = (row[key] for key in keys)
        table.add_row(name, *(f"{x:.3g}" for x in numbers))
    Console().print(table)
    load_average = os.getloadavg()[0]
    print(
        f"vLLM serves {ratio:.2f} times as many. {equal:.1%} of the answers are equal. Load average {load_average:.1f}."
    )
    settings = {"requests": requests, "clients": clients, "max_tokens": max_tokens, "rounds": rounds}
    results = {"settings": settings, "rows": rows, "ratio": ratio, "equal_answers": equal, "load_average": load_average}
    output.parent.mkdir(exist_ok=True)
    write_json(output, results)


if __name__ == "__main__":
    typer.run(main)
