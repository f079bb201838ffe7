"""A real server process under load, and stopped while it answers."""

import base64
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from image_mutations import bases
from load import chat, load_new_server, server

pytest.importorskip("starlette", reason="the extra serve is not installed")


@pytest.mark.slow
def test_32_clients_with_hostile_requests_get_right_answers_and_memory_stays(composed):
    result = load_new_server(str(composed), requests=100, clients=32)
    assert result["outcomes"] == {"good, right": 95, "hostile, 4xx": 5}
    before, after = result["memory"]
    assert after < 1.1 * before


@pytest.mark.slow
def test_sigterm_finishes_running_requests(composed):
    with server(str(composed)) as (running, address), httpx.Client(base_url=address, trust_env=False) as client:
        model = client.get("/v1/models").json()["data"][0]["id"]
        assert model == "composed"
        request = chat(model, bases()["png"], "What is it?", max_tokens=200)
        with ThreadPoolExecutor(2) as pool:
            post = [pool.submit(client.post, "/v1/chat/completions", json=request, timeout=120) for _ in range(2)]
            while "sdllava_requests_in_flight 2" not in client.get("/metrics").text:
                time.sleep(0.02)
            running.send_signal(signal.SIGTERM)
            assert [answer.result().status_code for answer in post] == [200, 200]
        _, log = running.communicate(timeout=60)
    assert running.returncode in (0, -signal.SIGTERM)
    assert "Traceback" not in log


def test_hostile_requests_are_what_they_claim():
    request = chat("model", bases()["png"], "What?")
    url = request["messages"][0]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == bases()["png"]
