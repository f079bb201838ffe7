"""Images of every kind, and the question on every way in."""

import base64
import copy
import functools
import http.server
import io
import logging as python_logging
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoProcessor

from sdllava.chat_templates import chat_template_for
from sdllava.image_loading import load_rgb, pad_to_square
from sdllava.questions import clean_question, questions_in_messages, questions_in_text


@pytest.fixture(scope="module")
def processor(composed):
    return AutoProcessor.from_pretrained(composed)


def user(*content) -> dict:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return {"role": "user", "content": parts}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def red(size=(40, 30)) -> Image.Image:
    return Image.new("RGB", size, (200, 10, 30))


def prompts_of(processor, inputs) -> list[str]:
    """What the diffusion tokenizer was given, without its padding."""
    rows = inputs["diffusion_input_ids"].tolist()
    return [processor.diffusion_tokenizer.decode(row[1 : row.index(tiny.EOS)]).strip() for row in rows]


def with_orientation(image: Image.Image, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    return Image.open(buffer)


def test_exif_orientation_is_applied():
    turned = load_rgb(with_orientation(red((40, 20)), 6))
    assert turned.size == (20, 40)


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.array([[0, 257 * 128], [65535, 257 * 3]], dtype=np.uint16))


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    return image


def cmyk_jpeg() -> Image.Image:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(buffer, "JPEG", quality=100)
    return Image.open(buffer)


@pytest.mark.parametrize(
    ("image", "pixel", "expected"),
    [
        (Image.new("RGBA", (2, 2), (0, 0, 255, 0)), (0, 0), (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 255, 255)), (0, 0), (0, 0, 255)),
        (Image.new("LA", (2, 2), (100, 255)), (0, 0), (100, 100, 100)),
        (Image.new("L", (2, 2), 77), (1, 1), (77, 77, 77)),
        (sixteen_bit(), (1, 0), (128, 128, 128)),
        (sixteen_bit(), (0, 1), (255, 255, 255)),
        (palette_with_transparency(), (1, 0), (200, 100, 50)),
        (palette_with_transparency(), (0, 0), (255, 255, 255)),
        (Image.new("1", (2, 2), 1), (0, 0), (255, 255, 255)),
        (np.full((2, 2, 3), 9, np.uint8), (0, 0), (9, 9, 9)),
        (torch.full((3, 4, 5), 0.2), (0, 0), (51, 51, 51)),
        (torch.full((3, 4, 5), 0.2, dtype=torch.bfloat16, requires_grad=True), (0, 0), (51, 51, 51)),
        (np.ones((2, 2), bool), (0, 0), (255, 255, 255)),
        (np.zeros((2, 2, 4), np.uint8), (0, 0), (255, 255, 255)),
        (Image.fromarray(np.full((2, 2), 0.4, np.float32)), (0, 0), (102, 102, 102)),
        (Image.fromarray(np.full((300, 2), 200, np.int32)), (1, 299), (200, 200, 200)),
        (Image.fromarray(np.array([[257 * 200, 0]], np.int32)), (0, 0), (200, 200, 200)),
    ],
)
def test_every_kind_of_image_becomes_right_rgb(image, pixel, expected):
    rgb = load_rgb(image)
    assert rgb.mode == "RGB"
    assert rgb.getpixel(pixel) == expected


def test_cmyk_becomes_red():
    r, g, b = load_rgb(cmyk_jpeg()).getpixel((4, 4))
    assert r > 240
    assert g < 15
    assert b < 15


def test_paths_base64_bytes_and_data_urls_give_the_same_image(tmp_path):
    red().save(tmp_path / "red.png")
    data = (tmp_path / "red.png").read_bytes()
    text = base64.b64encode(data).decode()
    ways = [tmp_path / "red.png", str(tmp_path / "red.png"), data, text, f"data:image/png;base64,{text}"]
    assert all(np.array_equal(load_rgb(way), red()) for way in ways)


@pytest.fixture
def server(tmp_path):
    """A web server on this machine that serves one image."""
    red().save(tmp_path / "red.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_urls_are_fetched_and_bounded(server, monkeypatch):
    assert np.array_equal(load_rgb(f"{server}/red.png"), red())
    with pytest.raises(ValueError, match=r"missing\.png' cannot be fetched \(.*404"):
        load_rgb(f"{server}/missing.png")
    monkeypatch.setattr("sdllava.image_loading.MAX_DOWNLOAD", 10)
    with pytest.raises(ValueError, match=r"is larger than 0 MiB\. Download it yourself"):
        load_rgb(f"{server}/red.png")


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[:900]


def bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20000, 20000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (truncated_jpeg(), ValueError, "is truncated or unreadable"),
        (b"this is not an image at all", ValueError, "not an image that Pillow can read"),
        ("missing.jpg", FileNotFoundError, "'missing.jpg' is not an existing file"),
        (bomb(), ValueError, "may be a decompression bomb"),
        (Image.new("RGB", (0, 5)), ValueError, "has no pixels: its size is 0 x 5"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "has no pixels"),
        (np.zeros((5, 5, 7), np.uint8), ValueError, r"shape \(5, 5, 7\) is not an image"),
        (np.full((4, 4, 3), 7.0), ValueError, r"has values in \[7, 7\]. Scale it to \[0, 1\]"),
        (42, TypeError, "42 is not an image"),
    ],
)
def test_bad_images_raise(image, error, message):
    with pytest.raises(error, match=message):
        load_rgb(image)


def test_padding_centres_on_the_mean_colour():
    square = pad_to_square(red((40, 20)), (122, 116, 104))
    assert square.size == (40, 40)
    assert square.getpixel((0, 9)) == (122, 116, 104)
    assert square.getpixel((0, 10)) == (200, 10, 30)


def test_both_encoders_see_the_same_square(processor):
    """A wide image: its padding lies at the same share of height for both."""
    inputs = processor(images=red((60, 20)), text="<image>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert inputs["diffusion_pixel_values"].shape == (1, 3, 64, 64)
    mean, std = (torch.tensor(x) for x in (processor.image_processor.image_mean, processor.image_processor.image_std))
    vision_red = inputs["pixel_values"][0, 0] * std[0] + mean[0]
    diffusion_red = (inputs["diffusion_pixel_values"][0, 0] + 1) / 2
    assert inputs["diffusion_pixel_values"].abs().max() <= 1
    assert vision_red[2, 16] == pytest.approx(122 / 255, abs=0.01) == diffusion_red[4, 32].item()
    assert vision_red[16, 16] == pytest.approx(200 / 255, abs=0.01)
    assert diffusion_red[32, 32] == pytest.approx(200 / 255, abs=0.01)


CONVERSATIONS = [
    ([user("I", "What is this?")], ["What is this?"]),
    ([user("What is this?", "I")], ["What is this?"]),
    ([user("I", "What?"), assistant("A dog."), user("Where?")], ["Where?"]),
    ([user("I", "What?"), assistant("A dog."), user("I", "And this?")], ["What?", "And this?"]),
    ([user("I", "I", "Which differs?")], ["Which differs?", "Which differs?"]),
    ([{"role": "user", "content": "Hello"}, assistant("Hi."), user("I", "What?")], ["What?"]),
    (
        [user("I", "First?"), assistant("a"), user("Second?"), assistant("b"), user("I", "Third?")],
        ["Second?", "Third?"],
    ),
    ([user("I")], [""]),
]


@pytest.mark.parametrize(("conversation", "questions"), CONVERSATIONS)
def test_the_question_is_the_last_user_turn_after_the_image(processor, conversation, questions):
    """From messages, and from the text that the chat template makes of them."""
    for message in conversation:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part.get("text") == "I":
                    part.clear()
                    part.update(type="image", image=red())
    assert questions_in_messages(conversation) == questions
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(conversation, **options)
    lower = [question.lower().replace("?", " ?") for question in questions]
    assert prompts_of(processor, inputs) == lower
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    from_text = processor(images=[red()] * len(questions), text=text, return_tensors="pt")
    assert prompts_of(processor, from_text) == lower
    assert torch.equal(inputs["input_ids"], from_text["input_ids"])


def test_precedence_explicit_then_conversation_then_text(processor):
    conversation = [user(red(), "What is this?")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    explicit = processor.apply_chat_template(conversation, question="Is it red?", **options)
    nested = processor.apply_chat_template(conversation, processor_kwargs={"question": "Is it red?"}, **options)
    assert prompts_of(processor, explicit) == prompts_of(processor, nested) == ["is it red ?"]
    plain = processor(images=red(), text="Look: <image>\nIs it blue?", return_tensors="pt")
    assert prompts_of(processor, plain) == ["look : is it blue ?"]
    override = processor(images=[red(), red()], text="<image><image>Blue?", question=["one", ""], return_tensors="pt")
    assert prompts_of(processor, override) == ["one", ""]
    assert override["diffusion_input_ids"][1].tolist() == tiny.NULL_IDS


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What?\nAnswer the question using a single word or phrase.", "What?"),
        ("Where? (a) left (b) right\nAnswer with the option's letter from the given choices directly.",
         "Where? (a) left (b) right"),
        ("<image>\nWhat?", "What?"),
    ],
)  # fmt: skip
def test_format_instructions_are_stripped_and_options_stay(question, expected):
    assert clean_question(question) == expected


def test_text_without_a_template_is_the_question():
    assert questions_in_text("<image>\nTwo  words", "<image>", None) == ["Two words"]


def test_long_questions_are_cut_with_one_warning(processor, caplog):
    python_logging.getLogger("transformers").propagate = True
    for _ in range(2):
        inputs = processor(images=red(), text="<image>", question="long " * 60, return_tensors="pt")
    python_logging.getLogger("transformers").propagate = False
    assert inputs["diffusion_input_ids"].shape == (1, 77)
    assert inputs["diffusion_input_ids"][0, -1] == tiny.EOS
    assert sum("more than the diffusion model's 77 tokens" in r.message for r in caplog.records) == 1


def test_placeholders_masks_and_round_trip(processor, tmp_path):
    conversation = [user(red(), "What?"), assistant("A dog."), user("Where?"), assistant("Left.")]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    inputs = processor.apply_chat_template(conversation, **options)
    ids, mask = inputs["input_ids"][0], inputs["assistant_masks"][0]
    supervised = processor.tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert supervised == " A dog.</s> Left.</s>"
    assert ids.count(processor.image_token_id) == processor.num_image_tokens == 16
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(conversation, **options)
    assert again["input_ids"] == inputs["input_ids"]


def test_batches_are_padded_on_the_left(processor):
    texts = ["<image>\nWhat is this?", "Hello"]
    inputs = processor(images=[[red()], []], text=texts, padding=True, return_tensors="pt")
    assert inputs["attention_mask"][1, 0] == 0
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    assert inputs["pixel_values"].shape[0] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": [red()], "text": "no token"}, ValueError, r"0 <image> token\(s\) but 1 image\(s\) were given"),
        ({"images": [red()], "text": "<image><image>"}, ValueError, r"2 <image> token\(s\) but 1 image"),
        (
            {"images": [[red()], [red(), red()]], "text": ["<image><image> a", "<image> b"]},
            ValueError,
            r"Text 0 has 2 <image> token\(s\) but 1 image",
        ),
        ({"text": "<image>"}, ValueError, r"1 <image> token\(s\) but 0 image"),
        ({"images": red(), "text": "<image>", "question": 7}, TypeError, "Question 7 is not a string"),
        ({"images": red(), "text": "<image>", "question": [None]}, TypeError, "Question None is not a string"),
        ({"images": red(), "text": "<image>", "question": ["a", "b"]}, ValueError, r"2 question\(s\) for 1 image"),
        ({"images": red(), "text": [3]}, TypeError, "Text 3 is not a string"),
        ({}, ValueError, "Give images, text, or both"),
        ({"text": []}, ValueError, "text is an empty list"),
        ({"text": "\ud800"}, ValueError, "Text .* has a surrogate"),
        ({"images": red(), "text": "<image>", "question": "\ud800"}, ValueError, "Question .* has a surrogate"),
    ],
)
def test_bad_input_raises(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(return_tensors="pt", **arguments)


@pytest.mark.parametrize(
    "conversation", [None, "x", [], [{}], [[]], [{"content": "x"}], [{"role": "user", "content": ["x"]}], [[["x"]]]]
)
def test_what_is_not_a_conversation_raises(processor, conversation):
    with pytest.raises(ValueError, match=r"is not a (conversation|message)\. Give a"):
        processor.apply_chat_template(conversation, tokenize=True, return_dict=True)


TEXT = {"type": "text", "text": "What?"}


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"text": "What?"}, "type"),
        ({"type": None}, "type"),
        ({"type": "text", "text": 5}, "text"),
        ({"type": "text"}, "text"),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("tokenize", [True, False])
def test_a_content_block_without_type_or_text_raises_and_is_named(processor, role, block, field, tokenize):
    conversation = [user("What?"), {"role": role, "content": [TEXT, block]}]
    for given in (conversation, [[user("What?")], conversation]):
        with pytest.raises(
            ValueError, match=f"The {field} of the content block {re.escape(repr(block))} is missing or"
        ):
            processor.apply_chat_template(given, tokenize=tokenize, return_dict=tokenize)


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, {"commit_message": "Upload processor"}),
        (
            {"max_shard_size": "5MB", "tags": None, "commit_message": None, "private": True},
            {"commit_message": "Upload processor", "private": True},
        ),
        ({"tags": [], "commit_message": "First"}, {"commit_message": "First"}),
    ],
)
def test_a_push_takes_the_options_of_transformers(processor, monkeypatch, options, sent):
    pushed = []

    def push(folder, repo_id, **given):
        assert (Path(folder) / "processor_config.json").is_file()
        pushed.append((repo_id, given))

    monkeypatch.setattr(type(processor), "push_files", staticmethod(push))
    processor.push_to_hub("me/x", **options)
    assert pushed == [("me/x", sent)]
    with pytest.raises(ValueError, match=r"for the tags \['trial'\]\. Give them to the model's `push_to_hub`"):
        processor.push_to_hub("me/x", tags=["trial"])
    assert len(pushed) == 1


def test_one_processor_in_8_threads_gives_what_it_gives_alone(processor):
    words = ["What?", "Where is the dog? " * 9, "Which colour has the roof of the house on the left? " * 3]
    calls = [{"images": [red()] * (i % 3 + 1), "text": ["<image> " + words[(i + j) % 3] for j in range(i % 3 + 1)]}
             for i in range(6)]  # fmt: skip
    calls = [{**call, "padding": True, "return_tensors": "pt"} for call in calls]
    alone = [processor(**call) for call in calls]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns often
    try:
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda number: processor(**calls[number % 6]), range(48)))
    finally:
        sys.setswitchinterval(interval)
    for number, found in enumerate(together):
        assert all(torch.equal(found[name], tensor) for name, tensor in alone[number % 6].items())


def test_serving_engines_get_one_row_per_image(processor):
    data = processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [30, 40]])
    assert (data.num_image_tokens, data.num_image_patches) == ([16, 16], [1, 1])


def test_the_question_is_found_in_another_models_template(processor):
    """Qwen's frame, with a system message and several turns, by messages and by rendered text."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    other = copy.deepcopy(processor)
    other.chat_template = chat_template_for(template, "<image>", {}, "other")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    conversation = [system, user(red(), "What is this?"), assistant("A dog."), user("Where is it?")]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert prompts_of(processor, other.apply_chat_template(conversation, **options)) == ["where is it ?"]
    text = other.apply_chat_template(conversation, add_generation_prompt=True)
    assert prompts_of(processor, other(images=red(), text=text, return_tensors="pt")) == ["where is it ?"]
