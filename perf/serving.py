"""Requests per second of `sdllava serve` and of vLLM with this package's plugin, one after the other.

Requests are about rendered scenes, at temperature 0. Both servers run with the same number of threads. Needs the
environment of `make test-vllm`; `perf/composed.py` writes a model whose language model costs most of an answer.

    .venv-vllm/bin/python perf/serving.py                                               # the miniature
    .venv-vllm/bin/python perf/serving.py build/composed --requests 32 --questions-per-image 8 --max-tokens 32
"""

import base64
import io
import json
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

NUM_FOLLOW_UPS = 3
"""Images with two questions each, with which the time to the first token is measured."""


def servers(model: Path, threads: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The module and the arguments that start each server, and its environment.

    Args:
        model (`Path`): The checkpoint.
        threads (`int`): Of each server's model.
    """
    length = json.loads((model / "config.json").read_text())["text_config"]["max_position_embeddings"]
    common = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    return {
        "sdllava serve": (["sdllava", "serve", str(model), "--device", "cpu", "--request-seconds", "3600"], common),
        "vLLM": (
            [
                "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "float32", "--enforce-eager",
                "--max-model-len", str(min(length, 1024)), "--block-size", "32",
            ],
            {**common, **vllm},
        ),
    }  # fmt: skip


@contextmanager
def running(
    arguments: Sequence[str], environment: dict[str, str], start_seconds: float
) -> Iterator[tuple[str, psutil.Process]]:
    """A server's address and process, once it answers.

    Raises:
        SystemExit: It ends, or does not answer in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *arguments, "--port", str(port)]
    server = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
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


def request(image: int, question: int, model: str, max_tokens: int) -> dict[str, Any]:
    """A chat completion about a scene.

    Args:
        image (`int`): Number of the scene.
        question (`int`): Number of the question.
        model (`str`): The server's name of the model.
        max_tokens (`int`): Tokens of the answer.
    """
    buffer = io.BytesIO()
    render(sample_question("test", image)[0]).save(buffer, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    text = sample_question("test", question)[1].text
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
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


def first_tokens(address: str, model: str) -> dict[str, float]:
    """Median seconds to the first token of an answer, of first and of follow-up questions, one at a time."""
    seconds: dict[str, list[float]] = {"first_question_seconds": [], "follow_up_seconds": []}
    for image in range(10**6, 10**6 + NUM_FOLLOW_UPS):  # other images than those of `measure`
        for name, question in zip(seconds, (2 * image, 2 * image + 1), strict=True):
            seconds[name] += load(address, [request(image, question, model, 1)], 1)[1]
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(
    address: str, server: psutil.Process, requests: int, clients: int, rounds: int, per_image: int, max_tokens: int
) -> tuple[dict[str, Any], list[str]]:
    """A server's figures and its answers. See `main` for the arguments."""
    model = httpx.get(f"{address}/v1/models", trust_env=False).json()["data"][0]["id"]
    first = first_tokens(address, model)  # the warm-up too
    bodies = [request(i // per_image, i, model, max_tokens) for i in range(rounds * requests)]
    before = cpu_seconds(server)
    measured = [load(address, bodies[i * requests :][:requests], clients) for i in range(rounds)]
    used = cpu_seconds(server) - before
    latencies = sorted(latency for _, some, _ in measured for latency in some)
    figures = {
        "requests_per_second": statistics.median(requests / seconds for seconds, _, _ in measured),
        "rounds": [requests / seconds for seconds, _, _ in measured],
        "cpu_seconds_per_request": used / (rounds * requests),
        "median_seconds": statistics.median(latencies),
        "p95_seconds": latencies[int(0.95 * len(latencies))],
        **first,
    }
    return figures, [text for _, _, texts in measured for text in texts]


def main(
    model: Annotated[Path | None, typer.Argument(help="A checkpoint's folder; default the miniature.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests per round.")] = 200,
    clients: Annotated[int, typer.Option(min=1, help="Clients that wait for an answer at a time.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per server, each with other scenes.")] = 3,
    questions_per_image: Annotated[int, typer.Option(min=1, help="Consecutive questions about one image.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each server's model.")] = os.cpu_count() or 1,
    start_seconds: Annotated[float, typer.Option(help="How long a server may take to start.")] = 900,
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path(__file__).parent / "results" / "serving.json",
) -> None:
    """Measures both servers and compares their answers."""
    rows: dict[str, dict[str, Any]] = {}
    answers: dict[str, list[str]] = {}
    for name, (arguments, environment) in servers(model or mini_path(), threads).items():
        with running(arguments, environment, start_seconds) as (address, server):
            counts = (requests, clients, rounds, questions_per_image, max_tokens)
            rows[name], answers[name] = measure(address, server, *counts)
    first, second = rows.values()
    ratio = second["requests_per_second"] / first["requests_per_second"]
    equal = statistics.mean(a == b for a, b in zip(*answers.values(), strict=True))
    headings = ("requests/s", "CPU s per request", "median s", "p95 s", "first token s", "follow-up's first token s")
    table = Table(f"{clients} clients", *headings, box=None)
    for name, row in rows.items():
        table.add_row(name, *(f"{x:.3g}" for x in row.values() if isinstance(x, float)))
    console = Console()
    console.width = max(console.width, 120)
    console.print(table)
    load_average = os.getloadavg()[0]
    print(
        f"vLLM serves {ratio:.2f} times as many. {equal:.1%} of the answers are equal. Load average {load_average:.1f}."
    )
    settings = {
        "model": str(model or "mini"), "requests": requests, "clients": clients, "max_tokens": max_tokens,
        "rounds": rounds, "questions_per_image": questions_per_image, "threads": threads,
    }  # fmt: skip
    results = {"settings": settings, "rows": rows, "ratio": ratio, "equal_answers": equal, "load_average": load_average}
    output.parent.mkdir(exist_ok=True)
    write_json(output, results)


if __name__ == "__main__":
    typer.run(main)
