"""The demo page: its engine by value, and the page itself in headless Chromium."""

import shutil
import socket
import tempfile
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("gradio", reason="the demo page needs gradio")

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.analysis.attention import QuestionAttention, Word, question_heatmap
from sdllava.analysis.features import DeltaMap
from sdllava.demo.drawing import VEIL, Answer, answers_html, maps_html, veiled
from sdllava.demo.engine import Engine, check_length, open_uploads
from sdllava.demo.guard import contains_url_file
from sdllava.demo.space import write_space
from sdllava.demo.words import content_words
from sdllava.serving.limits import PAGE_LIMITS


def png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def noise(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(255, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


LIMITS = replace(PAGE_LIMITS, max_new_tokens=12)


@pytest.fixture(scope="module")
def engine(composed) -> Engine:
    return Engine.from_pretrained(str(composed), "cpu", limits=LIMITS)


def generated_answer(engine, images, question, **options) -> str:
    """The answer of the model's `generate`, from pixels."""
    model, processor = engine.model, engine.processor
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("count", [1, 2])
def test_streamed_answers_equal_those_of_generate(engine, count):
    images = [noise(seed=seed) for seed in range(count)]
    encoded = engine.encode(images)
    pieces = list(engine.answer(encoded, "Is it red?"))
    assert len(pieces) > 1
    assert pieces[-1] == generated_answer(engine, images, "Is it red?")
    guided = generated_answer(engine, images, "Is it red?", diffusion_guidance_scales=[0.0])
    assert list(engine.answer(encoded, "Is it red?", 0.0))[-1] == guided
    assert engine.guidance_scale == 4.0


def test_the_answer_without_diffusion_is_that_of_a_fusion_that_adds_nothing(engine, monkeypatch):
    image = noise()
    answer = list(engine.answer_without_diffusion(engine.encode([image]), "Is it red?"))[-1]
    assert (engine.vision_encoder, engine.encoders) == ("CLIP", "diffusion model + CLIP")
    projection = engine.model.model.fusion.out_proj
    for parameter in projection.parameters():
        monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
    assert answer == generated_answer(engine, [image], "Is it red?")


def test_a_client_that_disconnects_does_not_block_others_and_a_failure_is_raised(engine, monkeypatch):
    encoded = engine.encode([noise()])
    abandoned = engine.answer(encoded, "Is it red?")
    next(abandoned)
    whole = list(engine.answer(encoded, "Is it blue?"))[-1]
    monkeypatch.setattr(engine.model.model.multi_modal_projector, "forward", lambda features: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.answer(encoded, "Is it blue?"))
    monkeypatch.undo()
    assert list(engine.answer(encoded, "Is it blue?"))[-1] == whole


def test_attention_and_delta_of_each_image_equal_those_of_the_analysis(engine):
    images = [noise(), noise(seed=1)]
    encoded = engine.encode(images)
    for image, found in zip(images, engine.attention(encoded, "Is it red?"), strict=True):
        heat = question_heatmap(engine.model, engine.processor, image, "Is it red?")
        np.testing.assert_allclose(found.question().grid, heat.grid, atol=2e-6)
    delta = engine.delta(encoded, "Is it red?")
    assert (delta.tap, delta.timestep) == ("U-L1-R1-B0-Cross-Q", 50)
    assert delta.heat.shape == (2, 2, 2)
    assert delta.heat.max() > 0
    np.testing.assert_allclose(engine.delta(engine.encode(images[1:]), "Is it red?").heat[0], delta.heat[1], atol=1e-5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", r"is not an image that Pillow can read\. Give PNG, JPEG or WebP\."),
        (png(noise())[:200], "truncated or unreadable"),
        (b"\0" * (PAGE_LIMITS.max_image_bytes + 1), r"The file has 10\.0 MiB\. Upload an image of at most 10 MiB\."),
        (png(Image.new("1", (9000, 9000))), r"its size is 9000 x 9000\. Give an image of at most 25 million pixels\."),
    ],
)
def test_bad_uploads_raise_errors(data, message):
    with pytest.raises(ValueError, match=message):
        open_uploads([png(noise()), data])


def test_uploads_are_reduced_in_size_and_decoded_as_everywhere():
    large, transparent = open_uploads(
        [png(Image.new("RGB", (3000, 1500))), png(Image.new("RGBA", (8, 8), (255, 0, 0, 0)))]
    )
    assert large.size == (1024, 512)
    assert np.asarray(transparent).min() == 255  # composited on white
    with pytest.raises(ValueError, match=r"^5 images were uploaded\. Upload at most 4 at a time\.$"):
        open_uploads([png(noise())] * 5)


def test_questions_are_limited_in_length():
    assert check_length(" Is it red? ") == "Is it red?"
    with pytest.raises(ValueError, match="is empty"):
        check_length("  ")
    with pytest.raises(ValueError, match=r"The question has 2000 characters\. Use at most 1000\."):
        check_length("x" * 2000)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"data": [{"path": "http://example.com/a.png"}]}, True),
        ({"data": [{"path": "FILE://etc/passwd", "meta": {"_type": "gradio.FileData"}}]}, True),
        ({"data": [{"path": "/tmp/a.png", "url": "http://127.0.0.1/a.png"}, "see http://example.com"]}, False),
    ],
)
def test_files_named_by_a_url_are_found(value, expected):
    assert contains_url_file(value) is expected


def test_a_map_is_a_veil_that_is_clear_where_its_numbers_are_large():
    grid = np.zeros((8, 8), np.float32)
    grid[3, 6] = 1  # of the padded square: y 10..20 and x 60..70 of an image of 80 x 40
    drawn = np.asarray(veiled(Image.new("RGB", (80, 40), (200, 40, 40)), grid, 1.0)).astype(int)
    height, width = drawn.shape[:2]
    assert np.abs(drawn[int(height * 15 / 40), int(width * 65 / 80)] - (200, 40, 40)).max() < 12  # the image's colour
    far = 0.75 * np.array(VEIL) + 0.25 * np.array((200, 40, 40))
    assert np.abs(drawn[-1, 0] - far).max() <= 1
    half = np.asarray(veiled(Image.new("RGB", (80, 40), (200, 40, 40)), grid, 2.0)).astype(int)
    assert half.max() < drawn.max()  # one scale: the same numbers are darker next to larger ones


def test_text_on_the_page_is_escaped():
    html = answers_html([Answer("<i>model</i>", "<b>red</b>", True), Answer("CLIP only", "blue", False)], "red")
    assert "<b>" not in html
    assert "<i>" not in html
    assert html.index(">right<") < html.index(">wrong<")
    assert "Correct answer: red" in html
    assert "right" not in answers_html([Answer("CLIP only", "blue")])
    assert "<b>" not in maps_html([noise()], [np.zeros((2, 2))], 0.0, "<b>word</b>", "<b>", "<b>")


def test_stop_words_and_punctuation_have_no_map_and_the_words_of_two_text_encoders_have_one():
    texts = ["<begin>", "what", "colour", "is", "the", "circle", "?", "<end>"]
    texts += ["What", "colour", "is", "the", "circle?", "<end>"]  # T5's
    words = [Word(text, (i,), text.startswith("<")) for i, text in enumerate(texts)]
    assert content_words(words) == {"colour": [2, 9], "circle": [5, 12]}


def test_the_space_folder_runs_the_same_page(tmp_path, composed, monkeypatch):
    write_space(tmp_path / "space", "someone/model")
    files = {path.name: path.read_text() for path in (tmp_path / "space").iterdir()}
    assert set(files) == {"app.py", "README.md", "requirements.txt"}
    assert 'demo(model="someone/model", host="0.0.0.0", port=7860)' in files["app.py"]
    started = []
    monkeypatch.setattr("sdllava.commands.demo.demo", lambda **options: started.append(options))
    exec(files["app.py"], {"__name__": "__main__"})
    assert started == [{"model": "someone/model", "host": "0.0.0.0", "port": 7860}]
    assert files["README.md"].startswith("---\ntitle: model\n")
    assert "sdk: gradio" in files["README.md"]
    assert files["requirements.txt"].startswith("sdllava[demo]==")
    with pytest.raises(ValueError, match="owner/name"):
        write_space(tmp_path / "other", str(composed))
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def page(engine):
    from sdllava.demo.events import Page

    return Page([engine])


def test_the_events_of_a_session(page, engine):
    import gradio as gr

    opened, _, picture, current, *cleared = page.upload([png(noise(64, 40)), png(noise(48, 48))])
    assert (current, cleared[1:]) == (None, ["", "", "", None, "", ""])
    assert "Your images, 64 x 40, 48 x 48" in picture
    assert picture.count("<img") == 2

    current, words, heat, effect, *_ = page.ask(opened, "Is it red or blue?", 4.0, 0)
    assert words["choices"] == ["whole question", "red", "blue"]
    assert "Where the diffusion model reads for the question" in heat
    chosen = page.choose_word(current, "red")
    assert "“red”" in chosen
    assert chosen.count("<img") == 2
    scales = {html.split('<span class="bar"')[1].split("</span>")[1] for html in (heat, chosen)}
    assert scales == {f"<span>{current.brightest():.1f} times the average"}  # one scale per question
    assert "guidance scale 4:" in effect
    moved = page.move_slider(current, 2.0)
    assert "guidance scale 2:" in moved
    assert moved.split("</span>")[-1] != effect.split("</span>")[-1]
    first, *_, (html, history, _) = page.answers(opened, current, 2.0, [["earlier"]])
    assert first == (gr.skip(), gr.skip(), moved)  # the slider may have moved since `ask`
    fused = list(engine.answer(opened.encoded[0], "Is it red or blue?", 2.0))[-1]
    vision_only = list(engine.answer_without_diffusion(opened.encoded[0], "Is it red or blue?"))[-1]
    assert history == [["Is it red or blue?", "2", fused, vision_only], ["earlier"]]
    assert [*page.answers(opened, current, 2.0, [])] == [(gr.skip(),) * 3]  # it has these answers
    assert html.index("Diffusion model + CLIP") < html.index("CLIP only")

    example = page.choose_example(gr.SelectData(None, {"index": 1, "value": None}))
    assert example[1] == page.examples[1].question
    assert example[0].encoded[0].images == [page.examples[1].image]


def test_the_padding_of_an_image_does_not_count(page):
    from sdllava.demo.events import WHOLE, CurrentQuestion

    grid = np.ones((8, 8), np.float32)
    grid[:, 4:] = 3
    grid[[0, -1]] = 100  # the padding of an image that is twice as wide as high
    delta = DeltaMap("U-L0-R0-B0-Out", 50, np.zeros((1, 8, 8, 3), np.float32), grid[None] / 100)
    attention = QuestionAttention([Word("red", (0,), False)], grid[None] / 1000, noise(64, 32), "a place")
    current = CurrentQuestion("red", 0, [attention], delta)
    assert current.brightest() == pytest.approx(1.5)
    html = page.choose_word(current, WHOLE)
    assert "up to 1.5 times its average" in html
    assert "(0.2% here)" in html
    assert "by up to 12% of their length" in page.move_slider(current, 4.0)
    current.attention[0].image = noise(64, 64)
    assert current.brightest() == pytest.approx(100 / grid.mean())


def test_a_missing_image_or_question_is_marked_at_its_field(page):
    import gradio as gr

    current, _, heat, effect, field, question, image = page.ask(None, "  ", 4.0, 0)
    assert current == heat == effect == gr.skip()  # what the page shows stays
    assert field["elem_classes"] == ["invalid"]
    assert "Type a question." in question
    assert "Open an image first" in image
    opened = page.upload([png(noise())])[0]
    *_, field, question, image = page.ask(opened, "x" * 2000, 4.0, 0)
    assert field["elem_classes"] == ["invalid"]
    assert "Use at most 1000." in question
    assert image == ""
    *_, field, question, image = page.ask(opened, "Is it red?", 4.0, 0)
    assert (field["elem_classes"], question, image) == ([], "", "")
    *kept, problem, _ = page.upload([b"this is not a picture"])
    assert kept[-1] is None  # the field is empty again
    assert "is not an image that Pillow can read. Give PNG, JPEG or WebP." in problem


def test_the_page_opens_with_an_example_that_only_the_fused_model_answers(page, engine, monkeypatch):
    right = [example.answer for example in page.examples]
    questions = [example.question for example in page.examples]
    monkeypatch.setattr(engine.model.config, "is_trained", True)
    monkeypatch.setattr(engine, "answer", lambda images, question, scale=None: iter([right[questions.index(question)]]))
    of_clip = {questions[0]: right[0]}  # CLIP answers the first example as well
    monkeypatch.setattr(engine, "answer_without_diffusion", lambda images, question: iter([of_clip.get(question, "?")]))
    opening = page.open_first()
    assert opening.images.example == page.examples[1]
    assert opening.current.text == questions[1]
    assert "A rendered scene" in opening.picture
    assert "<img" in opening.attention
    assert "<img" in opening.effect
    assert opening.answers.index(">right<") < opening.answers.index(">wrong<")
    assert opening.history == [[questions[1], "4", right[1], "?"]]


def test_photographs_and_several_images_have_a_warning(page, engine, monkeypatch):
    assert "warning" not in page.upload([png(noise())])[2]
    assert "unless the model was trained on several" in page.upload([png(noise())] * 2)[2]
    monkeypatch.setattr(engine, "scenes_only", True)
    assert "looks like a photograph" in page.upload([png(noise())])[2]
    assert "warning" not in page.upload([png(page.examples[0].image)])[2]


def test_two_checkpoints_are_compared(engine, published):
    from sdllava.demo.events import Page

    parts = {"diffusion": None, "vision": published["clip"], "language_model": published["llm"]}
    model = SDLlavaForConditionalGeneration.from_component_pretrained(**parts)
    other = Engine(model, SDLlavaProcessor.from_component_pretrained(**parts), "baseline", LIMITS)
    page = Page([engine, other])
    names = [f"{engine.name}: diffusion model + CLIP", f"{engine.name}: CLIP only", "baseline: CLIP"]
    assert page.headers == ["question", "s", *names]
    opened = page.upload([png(noise())])[0]
    current = page.ask(opened, "Is it red?", 4.0, 0)[0]
    *_, (html, ((_, _, *said),), _) = page.answers(opened, current, 4.0, [])
    assert said[0] == generated_answer(engine, [noise()], "Is it red?")
    assert said[2] == generated_answer(other, [noise()], "Is it red?")
    assert html.index(names[0]) < html.index(names[1]) < html.index(names[2])
    with pytest.raises(ValueError, match="'baseline' has no diffusion tower that reads the question"):
        Page([other, engine])


# the page in a browser


@pytest.fixture(scope="module")
def address(engine):
    from sdllava.demo.page import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    blocks = launch(engine, port=port, block=False)
    yield blocks.local_url
    blocks.close()


@pytest.fixture
def open_browser(address):
    webdriver = pytest.importorskip("selenium.webdriver", reason="the browser tests need selenium")
    from selenium.webdriver.chrome.service import Service

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("the browser tests need Debian's packages chromium and chromium-driver")
    opened, folders = [], []

    def open_one():
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        folders.append(tempfile.mkdtemp())
        for flag in (
            "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
            "disable-component-update", "disable-sync", "window-size=1360,1200", f"user-data-dir={folders[-1]}",
        ):  # fmt: skip
            options.add_argument(f"--{flag}")
        opened.append(webdriver.Chrome(options=options, service=Service(driver)))
        opened[-1].get(address)
        wait(opened[-1], lambda: find(opened[-1], "#answers dd") and find(opened[-1], "#examples .thumbnail-item"))
        return opened[-1]

    yield open_one
    for driver in opened:
        driver.quit()
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def wait(driver, condition):
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(driver, 60, ignored_exceptions=[StaleElementReferenceException])
    return waiting.until(lambda _: condition())


def find(driver, selector: str) -> list:
    return driver.find_elements("css selector", selector)


def ask(driver, question: str) -> None:
    from selenium.webdriver.common.keys import Keys

    box = find(driver, "#question textarea")[0]
    box.send_keys(Keys.CONTROL + "a")
    box.send_keys(question + Keys.ENTER)


def picture(driver, part: str) -> str | None:
    images = find(driver, f"#{part} img")
    return images[0].get_attribute("src") if images else None


def rows(driver) -> list[str]:
    return [row.text for row in find(driver, "#history [role=row]:has([role=gridcell])") if row.text.strip()]


@pytest.mark.slow
def test_upload_ask_choose_a_word_and_move_the_slider_with_the_keyboard(open_browser, engine, tmp_path):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "mine.png").write_bytes(png(noise(64, 40)))
    driver = open_browser()
    assert len(rows(driver)) == 1  # the page opens with an answered example
    find(driver, "#upload input[type=file]")[0].send_keys(str(tmp_path / "mine.png"))
    wait(driver, lambda: "Your image, 64 x 40" in find(driver, "#picture")[0].text)
    assert find(driver, "#answers dd") == []
    ask(driver, "Is it red?")
    wait(driver, lambda: len(rows(driver)) == 2)
    fused = find(driver, "#answers dd")[0].text
    assert fused == list(engine.answer(engine.encode([noise(64, 40)]), "Is it red?", 4.0))[-1]
    assert [label.text for label in find(driver, "#words label")] == ["whole question", "red"]

    whole = picture(driver, "attention")
    find(driver, "#words input")[1].send_keys(Keys.SPACE)
    wait(driver, lambda: picture(driver, "attention") not in (None, whole))
    assert "“red”" in find(driver, "#attention")[0].text

    moved = picture(driver, "effect")
    slider = find(driver, "#scale input[type=range]")[0]
    slider.send_keys(Keys.ARROW_LEFT)
    wait(driver, lambda: "scale 3.5" in find(driver, "#effect")[0].text and picture(driver, "effect") != moved)
    wait(driver, lambda: len(rows(driver)) == 3)
    assert "3.5" in rows(driver)[0]

    (tmp_path / "bad.png").write_bytes(b"this is not a picture")
    find(driver, "#upload input[type=file]")[0].send_keys(str(tmp_path / "bad.png"))
    wait(driver, lambda: "image that Pillow can read" in find(driver, "#upload-problem")[0].text)
    ask(driver, " ")
    wait(driver, lambda: "Type a question." in find(driver, "#question-problem")[0].text)
    assert find(driver, "#question.invalid")
    assert "Traceback" not in driver.page_source


@pytest.mark.slow
def test_users_have_separate_sessions_and_a_phone_shows_the_answer_first(open_browser):
    first, second = open_browser(), open_browser()
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    second.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for driver, number in ((first, 0), (second, 1)):
        find(driver, "#examples .thumbnail-item")[number].click()
        wait(driver, lambda driver=driver: len(rows(driver)) == 2)
    assert picture(first, "picture") != picture(second, "picture")
    ask(first, "Is it red?")
    ask(second, "Is it blue?")
    for driver, word in ((first, "red"), (second, "blue")):
        wait(driver, lambda driver=driver: len(rows(driver)) == 3)
        assert f"Is it {word}?" in rows(driver)[0]
        assert word in [label.text for label in find(driver, "#words label")]
    assert picture(first, "attention") != picture(second, "attention")
    places = [find(second, f"#{part}")[0].rect for part in ("picture", "question", "answers", "attention", "examples")]
    assert [place["y"] for place in places] == sorted(place["y"] for place in places)
    assert places[2]["y"] + 60 < 844  # without scrolling
    assert all(place["x"] >= 0 and place["x"] + place["width"] <= 390 for place in places)


def test_a_request_that_names_a_file_by_its_url_is_rejected(address):
    import httpx

    data = {"data": [{"path": "http://127.0.0.1:9/a.png", "meta": {"_type": "gradio.FileData"}}], "fn_index": 0}
    response = httpx.post(f"{address}gradio_api/queue/join", json={**data, "session_hash": "x"})
    assert response.status_code == 400
    assert "Files are not fetched from URLs. Upload the file." in response.text
    assert httpx.post(f"{address}gradio_api/queue/join", content=b"x" * 2**21).status_code == 413
    too_large = {"files": ("a.png", b"\0" * (PAGE_LIMITS.max_image_bytes + 1000))}
    assert httpx.post(f"{address}gradio_api/upload", files=too_large).status_code == 413
    assert address.startswith("http://127.0.0.1:")
