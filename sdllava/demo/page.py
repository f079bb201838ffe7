"""The Gradio page. Each user's image, question and history are kept in their session only."""

import atexit
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ..analysis.attention import QuestionAttention
from ..commands.reporting import UNTRAINED
from ..scenes.language import sample_question
from ..scenes.render import render
from .drawing import heat_html, picture_html
from .engine import EncodedImage, Engine, check_length, open_upload
from .guard import RejectURLFiles

ALL_WORDS = -1
MAX_SCALE = 8.0
NUM_EXAMPLES = 6
UPLOAD_SECONDS = 600
"""How long an uploaded file is kept. Visitors who upload the same image at the same time share one file."""
HISTORY_HEADERS = ["question", "s", "fused", "CLIP only"]
CSS = """
.picture { margin: 0; } .picture img { width: 100%; max-height: 420px; object-fit: contain; display: block; }
.picture .bar { height: 10px; margin-top: 6px; }
.picture .ends { display: flex; justify-content: space-between; font-size: 12px; }
.picture figcaption { font-size: 13px; opacity: .8; }
"""
FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
INTRODUCTION = """# Question-aware diffusion features
`{name}`: ask about an image. The page shows the answer, the attention map of each word, and the effect of the question
on the features."""


def examples() -> list[tuple[Any, str]]:
    """Rendered scenes, each with a question."""
    drawn = [sample_question("test", seed) for seed in range(NUM_EXAMPLES)]
    return [(render(scene), question.text) for scene, question in drawn]


@dataclass
class CurrentQuestion:
    """The question of a session.

    Args:
        text (`str`): The question.
        attention ([`QuestionAttention`]): The attention maps of its words.
    """

    text: str
    attention: QuestionAttention


def _or_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value. Expected errors are displayed as messages on the page."""
    try:
        return function(*arguments)
    except (ValueError, TypeError, OSError) as error:
        raise gr.Error(str(error), title="Error") from error


class Page:
    """The page's events, one method per event.

    The state of a session is its `EncodedImage`, its `CurrentQuestion` and its history.

    Args:
        engine: The loaded model.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.examples = examples()

    def upload(self, data: bytes | None) -> tuple:
        """Open an uploaded image."""
        if data is None:
            return (gr.skip(),) * 9
        return (None, gr.skip(), *self._open(_or_error(open_upload, data, self.engine.limits), "your image"))

    def choose_example(self, event: gr.SelectData) -> tuple:
        """Open an example with its question."""
        image, question = self.examples[event.index]
        return (None, question, *self._open(image, "a rendered scene"))

    def _open(self, image: Any, caption: str) -> tuple:
        """Show a new image, and clear the results of the previous one."""
        encoded = _or_error(self.engine.encode, image)
        picture = picture_html(image, f"{caption}, {image.width} x {image.height}")
        return encoded, None, picture, gr.update(choices=[], value=None), "", "", ""

    def ask(self, encoded: EncodedImage | None, question: str, scale: float) -> tuple:
        """Compute the attention maps of a question and its effect on the features."""
        if encoded is None:
            raise gr.Error("No image is open. Choose an example or upload one.", title="Error")
        question = _or_error(check_length, question, self.engine.limits)
        attention = _or_error(self.engine.attention, encoded, question)
        words = [(word.text, i) for i, word in enumerate(attention.words) if not word.special]
        choices = gr.update(choices=[("all words", ALL_WORDS), *words], value=ALL_WORDS)
        delta = self._delta_html(encoded, question, scale)
        return CurrentQuestion(question, attention), choices, _attention_html(attention, ALL_WORDS), delta

    def answers(
        self, encoded: EncodedImage | None, current: CurrentQuestion | None, scale: float, history: list
    ) -> Iterator[tuple]:
        """Stream both answers, then add them to the history."""
        if encoded is None or current is None:
            yield (gr.skip(),) * 3
            return
        one_scale = scale if self.engine.guidance_scale is not None else None
        fused = vision_only = ""
        yield "…", "", gr.skip()
        for fused in self.engine.answer(encoded, current.text, one_scale):
            yield fused, "", gr.skip()
        if self.engine.has_vision_encoder:
            for vision_only in self.engine.answer_without_diffusion(encoded, current.text):
                yield fused, vision_only, gr.skip()
        yield fused, vision_only, [[current.text, f"{scale:g}", fused, vision_only], *history]

    def choose_word(self, current: CurrentQuestion | None, word: int | None) -> str:
        """Show the attention map of a word."""
        return "" if current is None or word is None else _attention_html(current.attention, word)

    def move_slider(self, encoded: EncodedImage | None, current: CurrentQuestion | None, scale: float) -> str:
        """Show the effect of the question at another guidance scale."""
        return "" if encoded is None or current is None else self._delta_html(encoded, current.text, scale)

    def _delta_html(self, encoded: EncodedImage, question: str, scale: float) -> str:
        """|s (X_c - X_u)|. The range of colours does not depend on s, so that the slider's effect is visible."""
        delta = _or_error(self.engine.delta, encoded, question)
        high = float(delta.heat.max()) * (self.engine.guidance_scale or 1.0)
        caption = f"effect of the question on the features, s = {scale:g}: {delta.tap}, t = {delta.timestep}"
        unit = "|s (X_c - X_u)| relative to the mean |X_u|"
        return heat_html(encoded.image, delta.heat[0] * scale, 0.0, high, caption, unit)


def _attention_html(attention: QuestionAttention, word: int) -> str:
    heat = attention.question() if word == ALL_WORDS else attention.word(word)
    low, high = float(heat.grid.min()), float(heat.grid.max())
    return heat_html(heat.image, heat.grid, low, high, f"{heat.label}: {heat.description}", heat.unit)


def build_page(engine: Engine) -> gr.Blocks:
    """The page of a loaded model."""
    page = Page(engine)
    with gr.Blocks(title="sdllava", analytics_enabled=False, delete_cache=(60, UPLOAD_SECONDS)) as blocks:
        gr.Markdown(INTRODUCTION.format(name=engine.name))
        if engine.model.config.is_trained is False:
            gr.Markdown(f"**{UNTRAINED}**", elem_id="untrained")
        with gr.Row():
            with gr.Column(scale=1):
                inputs = _image_components(page)
            with gr.Column(scale=2):
                outputs = _question_components(engine)
        _connect(page, SimpleNamespace(**inputs, **outputs))
    return blocks


def _image_components(page: Page) -> dict[str, Any]:
    return {
        "picture": gr.HTML("Choose an example or upload an image.", elem_id="picture"),
        "upload": gr.File(
            label="Upload an image", file_types=["image"], type="binary", height=130, elem_id="upload"
        ),
        "gallery": gr.Gallery(
            [image for image, _ in page.examples],
            label="Examples", columns=3, height=300, allow_preview=False, interactive=False, buttons=[],
            elem_id="examples",
        ),
    }  # fmt: skip


def _question_components(engine: Engine) -> dict[str, Any]:
    with gr.Row():
        question = gr.Textbox(label="Question", scale=4, max_lines=2, elem_id="question")
        ask = gr.Button("Ask", variant="primary", elem_id="ask")
    with gr.Row():
        fused = gr.Textbox(label="Fused", interactive=False, elem_id="fused")
        vision_only = gr.Textbox(
            label="CLIP only, without the diffusion features",
            interactive=False, visible=engine.has_vision_encoder, elem_id="vision-only",
        )  # fmt: skip
    with gr.Row():
        with gr.Column():
            words = gr.Radio([], label="Click a word for its attention map", elem_id="words")
            heat = gr.HTML(elem_id="heat")
        with gr.Column():
            scale = gr.Slider(
                0, MAX_SCALE, engine.guidance_scale or 1.0, step=0.5, label="Guidance scale s",
                visible=engine.guidance_scale is not None, elem_id="scale",
            )  # fmt: skip
            delta = gr.HTML(elem_id="delta")
    history = gr.Dataframe(
        [], headers=HISTORY_HEADERS, column_count=len(HISTORY_HEADERS), type="array",
        column_widths=["40%", "10%", "25%", "25%"], interactive=False, wrap=True, label="History", elem_id="history",
    )  # fmt: skip
    answers = {"fused": fused, "vision_only": vision_only, "history": history}
    return {"question": question, "ask": ask, "words": words, "heat": heat, "scale": scale, "delta": delta, **answers}


def _connect(page: Page, c: SimpleNamespace) -> None:
    """Connect the components' events to the methods of `page`. Calls of the model run one at a time."""
    encoded, current = (gr.State(None, time_to_live=3600) for _ in range(2))
    model: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    opened = [c.upload, c.question, encoded, current, c.picture, c.words, c.heat, c.delta, c.fused]
    c.upload.upload(page.upload, c.upload, opened, **model)
    c.gallery.select(page.choose_example, None, opened, **model)
    answers = (page.answers, [encoded, current, c.scale, c.history], [c.fused, c.vision_only, c.history])
    for event in (c.ask.click, c.question.submit):
        answered = event(page.ask, [encoded, c.question, c.scale], [current, c.words, c.heat, c.delta], **model)
        answered.success(*answers, **model)
    c.words.input(page.choose_word, [current, c.words], c.heat, api_visibility="private")
    moved = c.scale.release(page.move_slider, [encoded, current, c.scale], c.delta, **model)
    moved.success(*answers, **model)


def launch(engine: Engine, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> gr.Blocks:
    """Serve the page until interrupted.

    Uploads are written to a private folder and deleted after `UPLOAD_SECONDS`. The folder is deleted at exit.

    Args:
        engine: The loaded model.
        host: Address to listen on. Default: connections from this machine only.
        port: Port to listen on.
        block: Whether to wait until the server ends.

    Returns:
        `gr.Blocks`: The running page, which `close()` ends.
    """
    private = tempfile.TemporaryDirectory(prefix="sdllava-demo-")
    atexit.register(private.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = private.name
    blocks = build_page(engine)
    blocks.queue(default_concurrency_limit=8, max_size=engine.limits.max_queue)
    blocks.launch(
        server_name=host,
        server_port=port,
        max_file_size=engine.limits.max_image_bytes,
        app_kwargs={"middleware": [RejectURLFiles.middleware()]},
        theme=gr.themes.Default(**FONTS),
        css=CSS,
        run_history=False,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        quiet=True,
        footer_links=[],
        prevent_thread_lock=not block,
    )
    return blocks
