"""The demo page: its engine by value, and the page itself in headless Chromium."""

import base64
import re
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

from sdllava.analysis.attention import question_heatmap
from sdllava.demo.drawing import heat_html
from sdllava.demo.engine import Engine, check_length, open_upload
from sdllava.demo.guard import contains_url_file
from sdllava.demo.space import write_space
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


def generated_answer(engine, image, question, **options) -> str:
    """The answer of the model's `generate`, from pixels."""
    model, processor = engine.model, engine.processor
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_streamed_answers_equal_those_of_generate(engine):
    image = noise()
    encoded = engine.encode(image)
    pieces = list(engine.answer(encoded, "Is it red?"))
    assert len(pieces) > 1
    assert pieces[-1] == generated_answer(engine, image, "Is it red?")
    guided = generated_answer(engine, image, "Is it red?", diffusion_guidance_scales=[0.0])
    assert list(engine.answer(encoded, "Is it red?", 0.0))[-1] == guided
    assert engine.guidance_scale == 4.0


def test_the_answer_without_diffusion_is_that_of_a_fusion_that_adds_nothing(engine, monkeypatch):
    image = noise()
    answer = list(engine.answer_without_diffusion(engine.encode(image), "Is it red?"))[-1]
    assert engine.has_vision_encoder
    projection = engine.model.model.fusion.out_proj
    for parameter in projection.parameters():
        monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
    assert answer == generated_answer(engine, image, "Is it red?")


def test_a_client_that_disconnects_does_not_block_others_and_a_failure_is_raised(engine, monkeypatch):
    encoded = engine.encode(noise())
    abandoned = engine.answer(encoded, "Is it red?")
    next(abandoned)
    whole = list(engine.answer(encoded, "Is it blue?"))[-1]
    monkeypatch.setattr(engine.model.model.multi_modal_projector, "forward", lambda features: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.answer(encoded, "Is it blue?"))
    monkeypatch.undo()
    assert list(engine.answer(encoded, "Is it blue?"))[-1] == whole


def test_attention_and_delta_equal_those_of_the_analysis(engine):
    image = noise()
    encoded = engine.encode(image)
    heat = question_heatmap(engine.model, engine.processor, image, "Is it red?")
    np.testing.assert_allclose(engine.attention(encoded, "Is it red?").question().grid, heat.grid, atol=2e-6)
    delta = engine.delta(encoded, "Is it red?")
    pixels = engine.processor(images=image, question="Is it red?", return_tensors="pt")
    with torch.no_grad():
        output = engine.model.model.diffusion_tower(pixels["diffusion_pixel_values"], pixels["diffusion_input_ids"])
    assert (delta.tap, delta.timestep) == ("U-L1-R1-B0-Cross-Q", 50)
    assert delta.heat.shape == (1, 2, 2)
    assert delta.heat.max() > 0
    assert output.conditional_features is not None


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
        open_upload(data)


def test_uploads_are_reduced_in_size_and_decoded_as_everywhere():
    assert open_upload(png(Image.new("RGB", (3000, 1500)))).size == (1024, 512)
    transparent = open_upload(png(Image.new("RGBA", (8, 8), (255, 0, 0, 0))))
    assert np.asarray(transparent).min() == 255  # composited on white


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


def test_a_map_on_the_page_is_bright_where_its_numbers_are_large():
    grid = np.zeros((8, 8), np.float32)
    grid[3, 6] = 1  # of the padded square: y 10..20 and x 60..70 of an image of 80 x 40
    html = heat_html(Image.new("RGB", (80, 40)), grid, 0.0, 1.0, "<b>word</b>", "share")
    assert "&lt;b&gt;word" in html
    assert "<b>" not in html
    with Image.open(BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1]))) as opened:
        pixels = np.asarray(opened).astype(int)
    row, column = np.unravel_index((pixels[..., 0] - pixels[..., 2]).argmax(), pixels.shape[:2])
    assert (row / pixels.shape[0], column / pixels.shape[1]) == pytest.approx((15 / 40, 65 / 80), abs=0.02)


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


def test_the_events_of_a_session(engine):
    import gradio as gr

    from sdllava.demo.page import Page

    page = Page(engine)
    with pytest.raises(gr.Error, match=r"No image is open\. Choose an example or upload one\."):
        page.ask(None, "Is it red?", 4.0)
    with pytest.raises(gr.Error, match=r"is not an image that Pillow can read\. Give PNG, JPEG or WebP\."):
        page.upload(b"this is not a picture")
    _, _, encoded, current, picture, *_ = page.upload(png(noise(64, 40)))
    assert current is None
    assert "your image, 64 x 40" in picture

    current, choices, heat, delta = page.ask(encoded, "Is it red?", 4.0)
    assert [label for label, _ in choices["choices"]] == ["all words", "is", "it", "red", "?"]
    assert "the question&#x27;s words" in heat
    assert "“red”" in page.choose_word(current, dict(choices["choices"])["red"])
    assert "s = 4:" in delta
    moved = page.move_slider(encoded, current, 4.5)
    assert "s = 4.5:" in moved
    assert moved != delta
    *_, (fused, vision_only, history) = page.answers(encoded, current, 4.0, [["earlier"]])
    assert fused == list(engine.answer(encoded, "Is it red?", 4.0))[-1]
    assert vision_only == list(engine.answer_without_diffusion(encoded, "Is it red?"))[-1]
    assert history == [["Is it red?", "4", fused, vision_only], ["earlier"]]

    example = page.choose_example(gr.SelectData(None, {"index": 1, "value": None}))
    assert example[1] == page.examples[1][1]
    assert example[2].image == page.examples[1][0]


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
        wait(opened[-1], lambda: find(opened[-1], "#examples .thumbnail-item"))
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


def picture(driver, part: str) -> str | None:
    images = find(driver, f"#{part} img")
    return images[0].get_attribute("src") if images else None


def ask(driver, question: str) -> None:
    box = find(driver, "#question textarea")[0]
    box.clear()
    box.send_keys(question)
    find(driver, "#ask")[0].click()


def rows(driver) -> list[str]:
    return [row.text for row in find(driver, "#history [role=row]:has([role=gridcell])") if row.text.strip()]


@pytest.mark.slow
def test_upload_ask_click_a_word_and_move_the_slider(open_browser, engine, tmp_path):
    from selenium.webdriver.common.keys import Keys

    (tmp_path / "mine.png").write_bytes(png(noise(64, 40)))
    driver = open_browser()
    find(driver, "#upload input[type=file]")[0].send_keys(str(tmp_path / "mine.png"))
    wait(driver, lambda: "your image, 64 x 40" in find(driver, "#picture")[0].text)

    ask(driver, "Is it red?")
    wait(driver, lambda: len(rows(driver)) == 1)
    fused = find(driver, "#fused textarea")[0].get_attribute("value")
    assert fused == list(engine.answer(engine.encode(noise(64, 40)), "Is it red?", 4.0))[-1]
    labels = [label.text for label in find(driver, "#words label")]
    assert labels == ["all words", "is", "it", "red", "?"]

    whole = picture(driver, "heat")
    find(driver, "#words label")[3].click()
    wait(driver, lambda: picture(driver, "heat") not in (None, whole))
    assert "“red”" in find(driver, "#heat")[0].text

    moved = picture(driver, "delta")
    slider = find(driver, "#scale input[type=range]")[0]
    slider.send_keys(Keys.ARROW_RIGHT)
    driver.execute_script("arguments[0].dispatchEvent(new Event('pointerup', {bubbles: true}))", slider)
    wait(driver, lambda: "s = 4.5" in find(driver, "#delta")[0].text and picture(driver, "delta") != moved)
    wait(driver, lambda: len(rows(driver)) == 2)
    assert "4.5" in rows(driver)[0]


@pytest.mark.slow
def test_a_bad_file_and_a_missing_image_give_messages(open_browser, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"this is not a picture")
    driver = open_browser()
    ask(driver, "Is it red?")
    wait(driver, lambda: "No image is open. Choose an example or upload one." in driver.page_source)
    find(driver, "#upload input[type=file]")[0].send_keys(str(tmp_path / "bad.png"))
    wait(driver, lambda: "image that Pillow can read" in driver.page_source)
    assert "Traceback" not in driver.page_source


@pytest.mark.slow
def test_two_users_have_separate_sessions(open_browser):
    first, second = open_browser(), open_browser()
    for driver, number in ((first, 0), (second, 1)):
        find(driver, "#examples .thumbnail-item")[number].click()
        wait(driver, lambda driver=driver: picture(driver, "picture"))
    assert picture(first, "picture") != picture(second, "picture")
    ask(first, "Is it red?")
    ask(second, "Is it blue?")
    for driver, word in ((first, "red"), (second, "blue")):
        wait(driver, lambda driver=driver: len(rows(driver)) == 1)
        assert f"Is it {word}?" in rows(driver)[0]
        assert word in [label.text for label in find(driver, "#words label")]
    assert picture(first, "heat") != picture(second, "heat")


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
