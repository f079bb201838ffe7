"""A real server process under load, and stopped while it answers."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from image_mutations import bases
from load import chat, load

pytest.importorskip("starlette", reason="the extra serve is not installed")


@pytest.fixture
def process(composed):
    """A server process of the tiny model, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sdllava", "serve", str(composed), "--port", str(port), "--device", "cpu"]
    running = subprocess.Popen(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=subprocess.PIPE, text=True)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            httpx.get(f"{address}/health", trust_env=False)
            break
        except httpx.TransportError:
            assert running.poll() is None
            time.sleep(0.2)
    yield running, address
    running.kill()


@pytest.mark.slow
def test_32_clients_with_hostile_requests_get_right_answers_and_memory_stays(process):
    running, address = process
    load(address, requests=60, clients=32)
    before = psutil.Process(running.pid).memory_info().rss
    outcomes = load(address, requests=200, clients=32)["outcomes"]
    assert outcomes == {"good, right": 190, "hostile, 4xx": 10}
    assert psutil.Process(running.pid).memory_info().rss < 1.1 * before


@pytest.mark.slow
def test_sigterm_finishes_running_requests(process):
    running, address = process
    with httpx.Client(base_url=address, trust_env=False, timeout=120) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        assert model == "composed"
        request = chat(model, bases()["png"], "What is it?", max_tokens=200)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(client.post, "/v1/chat/completions", json=request) for _ in range(2)]
            while "sdllava_requests_in_flight 2" not in client.get("/metrics").text:
                time.sleep(0.02)
            running.send_signal(signal.SIGTERM)
            assert [answer.result().status_code for answer in answers] == [200, 200]
    _, log = running.communicate(timeout=60)
    assert running.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in log


def test_hostile_requests_are_what_they_claim():
    request = chat("model", bases()["png"], "What?")
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == bases()["png"]
