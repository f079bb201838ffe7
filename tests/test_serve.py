"""`sdllava serve` answers the openai client as `generate` does, and the models have what serving engines require."""

import base64
import io
import json
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.serving.chat import ChatRequest

openai = pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("starlette", reason="the extra serve is not installed")

TOKENS = 12
IMAGE = Image.effect_noise((40, 30), 80).convert("RGB")


@pytest.fixture(scope="module")
def checkpoint(composed, tmp_path_factory) -> Path:
    """A copy that only generates lower-case letters, so that every token is text by itself."""
    folder = Path(shutil.copytree(composed, tmp_path_factory.mktemp("serve") / "model"))
    tokenizer = SDLlavaProcessor.from_pretrained(folder).tokenizer
    others = [i for token, i in tokenizer.get_vocab().items() if not (len(token) == 1 and "a" <= token <= "z")]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "suppress_tokens": others}))
    return folder


@pytest.fixture(scope="module")
def client(checkpoint):
    import httpx

    from sdllava.serving.server import build_server

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = build_server(str(checkpoint), [str(checkpoint)], port=port, device="cpu")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        ends = time.monotonic() + 60
        while not server.started and time.monotonic() < ends:
            time.sleep(0.05)
        assert server.started
        options = {"api_key": "none", "http_client": httpx.Client(trust_env=False)}
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", **options)
    finally:
        server.should_exit = True
        thread.join(30)


def turns(*texts: str, image) -> list[dict]:
    """A conversation about one image: questions and answers in turn."""
    messages = [{"role": "user", "content": [image, {"type": "text", "text": texts[0]}]}]
    for position, text in enumerate(texts[1:], 1):
        role = "assistant" if position % 2 else "user"
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    return messages


def ask(client, checkpoint, *texts: str, stream: bool = False):
    messages = turns(*texts, image={"type": "image_url", "image_url": {"url": data_url("PNG")}})
    reply = client.chat.completions.create(
        model=str(checkpoint), messages=messages, max_tokens=TOKENS, temperature=0, stream=stream
    )
    if not stream:
        return reply.choices[0].message.content
    return [chunk.choices[0].delta.content for chunk in reply if chunk.choices and chunk.choices[0].delta.content]


@pytest.fixture(scope="module")
def generated(checkpoint):
    model = SDLlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = SDLlavaProcessor.from_pretrained(checkpoint)

    def answer(*texts: str, question: str | None = None) -> str:
        inputs = processor.apply_chat_template(
            turns(*texts, image={"type": "image", "image": IMAGE}),
            question=question,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


CONVERSATIONS = [("What is left?",), ("What is left?", "noise", "And what is on the right of it?")]


@pytest.mark.parametrize("texts", CONVERSATIONS)
def test_a_served_answer_equals_generate_streamed_or_not(client, checkpoint, generated, texts):
    expected = generated(*texts)
    assert len(expected) == TOKENS
    assert expected.isalpha()
    assert ask(client, checkpoint, *texts) == expected
    pieces = ask(client, checkpoint, *texts, stream=True)
    assert len(pieces) > 1
    assert "".join(pieces) == expected


def test_the_last_turn_is_the_diffusion_prompt(client, checkpoint, generated):
    texts = CONVERSATIONS[1]
    answers = {question: generated(*texts, question=question) for question in (texts[2], texts[0], "")}
    assert ask(client, checkpoint, *texts) == answers[texts[2]]
    assert len(set(answers.values())) > 1  # otherwise the test could not tell them apart


def test_a_request_for_another_model_returns_404(client):
    with pytest.raises(openai.NotFoundError, match="Model 'other' is not served here"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hello"}])


def test_only_the_served_model_is_listed(client, checkpoint):
    assert [model.id for model in client.models.list()] == [str(checkpoint)]


def test_the_served_model_is_found_by_its_name(client, checkpoint):
    """The client escapes the slashes of a name."""
    assert client.models.retrieve(str(checkpoint)) == client.models.list().data[0]
    with pytest.raises(openai.NotFoundError, match="Model 'me/other' is not served here") as caught:
        client.models.retrieve("me/other")
    assert caught.value.type == "not_found_error"


def data_url(kind: str, length: int | None = None) -> str:
    """The image as a data URL, whole or cut off."""
    buffer = io.BytesIO()
    IMAGE.save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()[:length]).decode()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/etc/hostname", "'/etc/hostname' is neither a URL nor a data URL"),
        ("file:///etc/hostname", "is neither a URL nor a data URL"),
        (data_url("JPEG", 300), "truncated"),
    ],
)
def test_a_path_and_an_invalid_image_return_400_with_a_message(client, checkpoint, url, message):
    image = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model=str(checkpoint), messages=turns("What?", image=image), max_tokens=2)


def test_it_listens_on_loopback_by_default():
    import inspect

    from sdllava.commands import serve as serve_command
    from sdllava.serving import server

    for function in (server.build_server, serve_command.serve):
        assert inspect.signature(function).parameters["host"].default == "127.0.0.1"


def test_another_type_of_model_raises(published):
    from sdllava.serving.server import build_server

    with pytest.raises(ValueError, match=r"'llm' is a model of type 'llama'.*Use `transformers serve` for others"):
        build_server(str(published["llm"]), ["llm"])


def test_a_missing_extra_is_named(monkeypatch):
    from importlib import util

    from sdllava.serving.server import build_server

    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "uvicorn" else sys)
    with pytest.raises(ImportError, match=r"Serving needs uvicorn\. Run: pip install .sdllava\[serve\]"):
        build_server("anything", ["anything"])


def test_model_and_processor_have_what_serving_engines_require(checkpoint):
    model = SDLlavaForConditionalGeneration.from_pretrained(checkpoint)
    processor = SDLlavaProcessor.from_pretrained(checkpoint)
    texts = [f"{processor.image_token} What?", f"{processor.image_token}{processor.image_token} Which?"]
    inputs = processor(images=[IMAGE] * 3, text=texts, padding=True, return_tensors="pt")
    images = {name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
    assert {name: len(rows) for name, rows in images.items()} == dict.fromkeys(images, 3)
    counts = processor._get_num_multimodal_tokens(image_sizes=[[30, 40]] * 3)
    assert counts.num_image_patches == [1, 1, 1]
    with torch.no_grad():
        features = model.get_image_features(**images).pooler_output
        single = model.get_image_features(**{name: rows[1:2] for name, rows in images.items()}).pooler_output
    assert [len(rows) for rows in features] == counts.num_image_tokens
    torch.testing.assert_close(single[0], features[1])
    assert model.get_encoder("image") is not None
    assert model.model.language_model is not None
    assert (inputs["input_ids"] == processor.image_token_id).sum() == sum(counts.num_image_tokens)


# requests that are answered together


Chat = tuple[ChatRequest, list[Image.Image]]


def chat(question: str, *images: Image.Image, **fields) -> Chat:
    """A request, greedy by default, and its images."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    options = {"max_new_tokens": TOKENS, "temperature": 0.0, **fields}
    return ChatRequest([{"role": "user", "content": content}], ["data:"] * len(images), **options), list(images)


OTHER = Image.effect_noise((30, 30), 50).convert("RGB")
REQUESTS = [
    chat("What is left?", IMAGE),
    chat("Is it red, and is it on the left of the other one?", OTHER, max_new_tokens=5),
    chat("Hello"),
    chat("How do they differ?", OTHER, IMAGE, stream=True),
    chat("What is left?", OTHER, stop=("e",)),
    chat("And now?", IMAGE, max_new_tokens=1),
]


@pytest.fixture(scope="module")
def worker(checkpoint):
    from sdllava.serving.answering import ModelWorker

    model = SDLlavaForConditionalGeneration.from_pretrained(checkpoint)
    return ModelWorker(model, SDLlavaProcessor.from_pretrained(checkpoint), max_batch=len(REQUESTS), batch_seconds=0.3)


@pytest.fixture
def batches(worker, monkeypatch) -> list[int]:
    """The number of prompts of each call of `generate`."""
    sizes, generate = [], worker.model.generate

    def counted(**inputs):
        sizes.append(len(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(worker.model, "generate", counted)
    return sizes


def answers(worker, requests: list[Chat]) -> list[tuple]:
    """The answers to requests that arrive at the same time, each with the text that was sent before its end."""
    jobs, sent = [worker.prepare(request, images, time.monotonic() + 60) for request, images in requests], {}
    for number, job in enumerate(jobs):
        job.send = lambda piece, number=number: sent.setdefault(number, []).append(piece)
    futures = [worker.submit(job) for job in jobs]
    return [(future.result(60), "".join(sent[number])) for number, future in enumerate(futures)]


def test_requests_that_wait_are_answered_together_as_alone(worker, batches):
    single = [answers(worker, [request])[0] for request in REQUESTS]
    assert batches == [1] * len(REQUESTS)
    batches.clear()
    assert answers(worker, REQUESTS) == single
    assert batches == [len(REQUESTS)]
    assert [answer.completion_tokens for answer, _ in single[:4]] == [TOKENS, 5, TOKENS, TOKENS]
    assert [answer.finish_reason for answer, _ in single[:2]] == ["length", "length"]
    assert "e" not in single[4][0].text
    assert all(answer.text == text for answer, text in single)
    assert len({answer.text for answer, _ in single}) > 3


def test_sampling_and_beam_searches_are_answered_one_by_one(worker, batches):
    others = [chat("What is left?", IMAGE, temperature=1.0, seed=3), chat("What is left?", IMAGE, num_beams=2)]
    single = [answers(worker, [request])[0] for request in others]
    batches.clear()
    assert answers(worker, [REQUESTS[0], *others, REQUESTS[1]])[1:3] == single
    assert batches == [2, 1, 1]


def test_the_images_of_a_batch_are_limited(worker, batches, monkeypatch):
    monkeypatch.setattr(worker, "max_batch", 3)
    answers(worker, [REQUESTS[3], REQUESTS[0], REQUESTS[1], chat("Which?", *[IMAGE] * 4)])
    assert batches == [2, 1, 1]


def test_a_batch_that_fails_is_answered_one_by_one(worker, monkeypatch):
    expected = answers(worker, REQUESTS[:3])
    generate = worker.model.generate

    def fails(**inputs):
        if len(inputs["input_ids"]) > 1 or inputs["input_ids"].shape[1] == longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    longest = max(answer.prompt_tokens for answer, _ in expected)
    monkeypatch.setattr(worker.model, "generate", fails)
    jobs = [worker.prepare(request, images, time.monotonic() + 60) for request, images in REQUESTS[:3]]
    futures = [worker.submit(job) for job in jobs]
    assert futures[0].result(60) == expected[0][0]
    with pytest.raises(torch.OutOfMemoryError):
        futures[1].result(60)
    assert futures[2].result(60) == expected[2][0]


def test_requests_whose_time_is_over_do_not_hold_up_the_others(worker, batches):
    from sdllava.serving.limits import RequestError

    expected = answers(worker, REQUESTS[:1])
    ends = [time.monotonic() + 60, time.monotonic() - 1, time.monotonic() + 60]
    jobs = [worker.prepare(REQUESTS[0][0], [IMAGE], end) for end in ends]
    jobs[2].send = lambda piece: jobs[2].cancelled.set()  # the client leaves after the first piece
    jobs[2].request = chat("What is left?", IMAGE, stream=True)[0]
    futures = [worker.submit(job) for job in jobs]
    assert futures[0].result(60) == expected[0][0]
    for future in futures[1:]:
        with pytest.raises(RequestError, match="took too long"):
            future.result(60)
    assert batches == [1, 2]


@pytest.mark.slow
def test_served_model_works_as_a_local_judge(client, checkpoint):
    from sdllava.evaluation.judge import EndpointJudge

    judge = EndpointJudge(str(checkpoint), str(client.base_url), wait=0.0)
    reply = judge("You are a judge.", "Is the dog red?")
    assert reply.isascii()
    assert reply.islower()
    assert judge.temperature == 0.2
