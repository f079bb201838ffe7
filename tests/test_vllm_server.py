"""`vllm serve` with the OpenAI client: answers, streaming, several clients. `make test-vllm` runs it."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="the extra vllm is not installed")
import httpx
import openai
from test_vllm import NEW_TOKENS, Reference, for_vllm, scenes, user

from sdllava import mini_path

ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
OPTIONS = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "512", "--served-model-name", "mini"]
OPTIONS += ["--trust-request-mm-kwargs"]  # clients may give the question


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(mini_path()), *OPTIONS]
    command += ["--port", str(port)]  # what `vllm serve` runs; the package vllm-cpu lacks that command
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with log.open("wb") as output:
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **ENVIRONMENT}
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_until_ready(server, f"http://127.0.0.1:{port}/health", log)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(server, url, log):
    end = time.monotonic() + 900
    while time.monotonic() < end and server.poll() is None:
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            time.sleep(1)
    pytest.fail(log.read_text()[-5000:])


@pytest.fixture(scope="module")
def expected():
    """The answers of `generate` to twelve questions."""
    reference = Reference(mini_path())
    conversations = [[user(image, question)] for image, question in scenes(12)]
    answers = [reference.tokens(messages)[1] for messages in conversations]
    texts = reference.processor.batch_decode(answers, skip_special_tokens=True)
    return [(for_vllm(messages), text.strip()) for messages, text in zip(conversations, texts, strict=True)]


def create(client, messages, **options):
    return client.chat.completions.create(
        model="mini", messages=messages, temperature=0, max_tokens=NEW_TOKENS, **options
    )


def test_concurrent_clients_get_the_answers_of_generate(client, expected):
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda pair: create(client, pair[0]).choices[0].message.content.strip(), expected))
    assert found == [text for _, text in expected]


def test_a_stream_is_the_answer_in_pieces(client, expected):
    messages, text = expected[0]
    pieces = [chunk.choices[0].delta.content or "" for chunk in create(client, messages, stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces).strip() == text


def test_a_given_question_is_a_field_of_the_request(client, expected):
    (messages, _), question = expected[0], "How many objects are there?"
    completion = create(client, messages, extra_body={"mm_processor_kwargs": {"question": [question]}})
    image, text = next(scenes(1))
    reference = Reference(mini_path())
    answer = reference.tokens([user(image, text)], question=question)[1]
    assert (
        completion.choices[0].message.content.strip()
        == reference.processor.decode(answer, skip_special_tokens=True).strip()
    )


def test_invalid_requests_return_400(client, expected):
    with pytest.raises(openai.BadRequestError, match="question"):
        create(client, expected[0][0], extra_body={"mm_processor_kwargs": {"question": ["a", "b"]}})
