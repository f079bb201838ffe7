"""The Gradio page. It shows what `engine` computes; each user's image and history live in their session alone."""

import atexit
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ..analysis.attention import QuestionAttention
from ..scenes.language import sample_question
from ..scenes.render import render
from .drawing import heat_html, picture_html
from .engine import MAX_BYTES, Engine, Look, check_text, open_upload
from .guard import RefuseAddresses

ALL_WORDS = -1
MAX_SCALE = 8.0
NUM_EXAMPLES = 6
HISTORY_HEADERS = ["question", "s", "fused", "CLIP alone"]
CSS = """
.look { margin: 0; } .look img { width: 100%; max-height: 420px; object-fit: contain; display: block; }
.look .bar { height: 10px; margin-top: 6px; }
.look .ends { display: flex; justify-content: space-between; font-size: 12px; }
.look figcaption { font-size: 13px; opacity: .8; }
"""
FONTS: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def examples() -> list[tuple[Any, str]]:
    """Rendered scenes, each with a question."""
    drawn = [sample_question("test", seed) for seed in range(NUM_EXAMPLES)]
    return [(render(scene), question.text) for scene, question in drawn]


@dataclass
class Asked:
    """The question that a session's page shows, and where its words look."""

    question: str
    attention: QuestionAttention


def _or_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value; an expected error becomes a message on the page."""
    try:
        return function(*arguments)
    except (ValueError, TypeError, OSError) as error:
        raise gr.Error(str(error), title="That did not work") from error


class Page:
    """What happens on the page, one method an event. A session's state is its `Look`, its `Asked` and its history."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.examples = examples()

    def upload(self, path: str | None) -> tuple:
        """An uploaded file is read and deleted at once."""
        if path is None:
            return (gr.skip(),) * 9
        data = Path(path).read_bytes()
        Path(path).unlink()
        return (None, gr.skip(), *self._show(_or_error(open_upload, data), "your image"))

    def choose_example(self, event: gr.SelectData) -> tuple:
        """The example's image and question."""
        image, question = self.examples[event.index]
        return (None, question, *self._show(image, "a rendered scene"))

    def _show(self, image: Any, caption: str) -> tuple:
        """A new image: what was asked about the last one leaves the page."""
        look = _or_error(self.engine.look, image)
        picture = picture_html(image, f"{caption}, {image.width} x {image.height}")
        return look, None, picture, gr.update(choices=[], value=None), "", "", ""

    def ask(self, look: Look | None, question: str, scale: float) -> tuple:
        """Where the question looks, and what it moves."""
        if look is None:
            raise gr.Error("choose an example or upload an image first", title="That did not work")
        question = _or_error(check_text, question)
        found = _or_error(self.engine.attention, look, question)
        words = [(word.text, i) for i, word in enumerate(found.words) if not word.special]
        choices = gr.update(choices=[("all words", ALL_WORDS), *words], value=ALL_WORDS)
        delta = self._delta(look, question, scale)
        return Asked(question, found), choices, _heat(found, ALL_WORDS), delta

    def answers(self, look: Look | None, asked: Asked | None, scale: float, history: list) -> Iterator[tuple]:
        """Both answers as they grow; then they join the history."""
        if look is None or asked is None:
            yield (gr.skip(),) * 3
            return
        one_scale = scale if self.engine.guidance_scale is not None else None
        fused = alone = ""
        yield "…", "", gr.skip()
        for fused in self.engine.answer(look, asked.question, one_scale):
            yield fused, "", gr.skip()
        if self.engine.has_static_encoder:
            for alone in self.engine.answer_without_diffusion(look, asked.question):
                yield fused, alone, gr.skip()
        yield fused, alone, [[asked.question, f"{scale:g}", fused, alone], *history]

    def choose_word(self, asked: Asked | None, word: int | None) -> str:
        """The word's attention."""
        return "" if asked is None or word is None else _heat(asked.attention, word)

    def move_slider(self, look: Look | None, asked: Asked | None, scale: float) -> Any:
        """What the question moves at another scale."""
        return "" if look is None or asked is None else self._delta(look, asked.question, scale)

    def _delta(self, look: Look, question: str, scale: float) -> str:
        """|s (X_c - X_u)|, on colours that are fixed for a question, so that the slider shows."""
        delta = _or_error(self.engine.delta, look, question)
        high = float(delta.heat.max()) * (self.engine.guidance_scale or 1.0)
        caption = f"what the question moves, s = {scale:g}: {delta.tap}, t = {delta.timestep}"
        unit = "|s (X_c - X_u)| by mean |X_u|"
        return heat_html(look.image, delta.heat[0] * scale, 0.0, high, caption, unit)


def _heat(found: QuestionAttention, word: int) -> str:
    heat = found.question() if word == ALL_WORDS else found.word(word)
    low, high = float(heat.grid.min()), float(heat.grid.max())
    return heat_html(heat.image, heat.grid, low, high, f"{heat.label}: {heat.place}", heat.unit)


def build_page(engine: Engine) -> gr.Blocks:
    """The page of a loaded model."""
    page = Page(engine)
    with gr.Blocks(title="sdllava", analytics_enabled=False, delete_cache=(60, 600)) as blocks:
        gr.Markdown(f"# What the question sees\n`{engine.name}`: ask, and see where each word looks.")
        look, asked = (gr.State(None, time_to_live=3600) for _ in range(2))
        with gr.Row():
            with gr.Column(scale=1):
                shown = gr.HTML("Choose an example or upload an image.", elem_id="shown")
                upload = gr.File(label="Upload an image", file_types=["image"], height=130, elem_id="upload")
                gallery = gr.Gallery(
                    [image for image, _ in page.examples],
                    label="Examples", columns=3, height=300, allow_preview=False, interactive=False, buttons=[],
                    elem_id="examples",
                )  # fmt: skip
            with gr.Column(scale=2):
                with gr.Row():
                    question = gr.Textbox(label="Question", scale=4, max_lines=2, elem_id="question")
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                with gr.Row():
                    fused = gr.Textbox(label="Fused", interactive=False, elem_id="fused")
                    alone = gr.Textbox(
                        label="CLIP alone: without the diffusion features",
                        interactive=False, visible=engine.has_static_encoder, elem_id="alone",
                    )  # fmt: skip
                with gr.Row():
                    with gr.Column():
                        words = gr.Radio([], label="Click a word to see where it looks", elem_id="words")
                        heat = gr.HTML(elem_id="heat")
                    with gr.Column():
                        scale = gr.Slider(
                            0, MAX_SCALE, engine.guidance_scale or 1.0, step=0.5, label="Guidance scale s",
                            visible=engine.guidance_scale is not None, elem_id="scale",
                        )  # fmt: skip
                        delta = gr.HTML(elem_id="delta")
                history = gr.Dataframe(
                    [], headers=HISTORY_HEADERS, column_count=len(HISTORY_HEADERS), type="array",
                    column_widths=["40%", "10%", "25%", "25%"], interactive=False, wrap=True, label="History",
                    elem_id="history",
                )  # fmt: skip

        model: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        picture = [upload, question, look, asked, shown, words, heat, delta, fused]
        upload.upload(page.upload, upload, picture, **model)
        gallery.select(page.choose_example, None, picture, **model)
        answers = (page.answers, [look, asked, scale, history], [fused, alone, history])
        for event in (ask.click, question.submit):
            event(page.ask, [look, question, scale], [asked, words, heat, delta], **model).success(*answers, **model)
        words.input(page.choose_word, [asked, words], heat, api_visibility="private")
        scale.release(page.move_slider, [look, asked, scale], delta, **model).success(*answers, **model)
    return blocks


def launch(engine: Engine, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> Any:
    """Serve the page until interrupted.

    Uploads go through a private folder, which each file leaves as soon as it is read and which is removed at the end.

    Args:
        host: the default is this machine alone.
        block: False returns the running `gr.Blocks`, which `close()` ends.
    """
    private = tempfile.TemporaryDirectory(prefix="sdllava-demo-")
    atexit.register(private.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = private.name
    blocks = build_page(engine)
    blocks.queue(default_concurrency_limit=8, max_size=64)
    blocks.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_BYTES,
        app_kwargs={"middleware": [RefuseAddresses.middleware()]},
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
