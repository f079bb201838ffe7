"""`sdllava serve` answers the openai client as `generate` does; what serving engines ask of the model is there."""

import base64
import io
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor

openai = pytest.importorskip("openai", reason="the extra serve is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

TOKENS = 12
IMAGE = Image.effect_noise((40, 30), 80).convert("RGB")


@pytest.fixture(scope="module")
def checkpoint(composed, tmp_path_factory) -> Path:
    """A copy that says lower-case letters only, so that every token is text by itself."""
    folder = Path(shutil.copytree(composed, tmp_path_factory.mktemp("serve") / "model"))
    tokenizer = SDLlavaProcessor.from_pretrained(folder).tokenizer
    others = [i for token, i in tokenizer.get_vocab().items() if not (len(token) == 1 and "a" <= token <= "z")]
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "suppress_tokens": others}))
    return folder


@pytest.fixture(scope="module")
def client(checkpoint):
    import httpx

    from sdllava.serving.server import serve

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = serve(str(checkpoint), port=port, device="cpu", non_blocking=True)
    try:
        options = {"api_key": "none", "max_retries": 8, "http_client": httpx.Client(trust_env=False)}
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", **options)
    finally:
        server.kill_server()


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
def test_a_served_answer_is_generates_streamed_or_not(client, checkpoint, generated, texts):
    expected = generated(*texts)
    assert len(expected) == TOKENS
    assert expected.isalpha()
    assert ask(client, checkpoint, *texts) == expected
    pieces = ask(client, checkpoint, *texts, stream=True)
    assert len(pieces) > 1
    assert "".join(pieces) == expected


def test_the_diffusion_model_is_asked_the_last_turn(client, checkpoint, generated):
    texts = CONVERSATIONS[1]
    answers = {asked: generated(*texts, question=asked) for asked in (texts[2], texts[0], "")}
    assert ask(client, checkpoint, *texts) == answers[texts[2]]
    assert len(set(answers.values())) > 1  # else this model could not tell


def test_another_model_than_the_served_one_is_refused(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "hello"}])
    assert "pinned" in refused.value.response.text


def test_the_served_model_alone_is_listed(client, checkpoint):
    assert [model.id for model in client.models.list()] == [str(checkpoint)]


def data_url(kind: str, length: int | None = None) -> str:
    """The image as a data URL, whole or cut off."""
    buffer = io.BytesIO()
    IMAGE.save(buffer, format=kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()[:length]).decode()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("/etc/hostname", "'/etc/hostname' is no URL"),
        ("file:///etc/hostname", "is no URL"),
        (data_url("JPEG", 300), "truncated"),
    ],
)
def test_a_request_reaches_no_file_and_a_bad_image_is_told(client, checkpoint, url, told):
    image = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(openai.BadRequestError, match=told):
        client.chat.completions.create(model=str(checkpoint), messages=turns("What?", image=image), max_tokens=2)


def test_it_listens_on_loopback_unless_told_otherwise():
    import inspect

    from sdllava.commands import serve as serve_command
    from sdllava.serving import server as serve

    for function in (serve.serve, serve_command.serve):
        assert inspect.signature(function).parameters["host"].default == "127.0.0.1"


def test_another_kind_of_model_is_named(published):
    from sdllava.serving.server import serve

    with pytest.raises(ValueError, match="is a 'llama', which `transformers serve` serves"):
        serve(str(published["llm"]))


def test_a_missing_extra_is_named(monkeypatch):
    from importlib import util

    from sdllava.serving.server import serve

    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "uvicorn" else sys)
    with pytest.raises(ImportError, match=r"serving needs uvicorn: pip install .sdllava\[serve\]"):
        serve("anything")


def test_what_a_serving_engine_asks_of_model_and_processor(checkpoint):
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
        alone = model.get_image_features(**{name: rows[1:2] for name, rows in images.items()}).pooler_output
    assert [len(rows) for rows in features] == counts.num_image_tokens
    torch.testing.assert_close(alone[0], features[1])
    assert model.get_encoder("image") is not None
    assert model.model.language_model is not None
    assert (inputs["input_ids"] == processor.image_token_id).sum() == sum(counts.num_image_tokens)
