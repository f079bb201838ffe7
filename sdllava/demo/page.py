"""The Gradio page: its components, how they are connected, and its server."""

import atexit
import os
import tempfile
from types import SimpleNamespace
from typing import Any

import gradio as gr

from ..commands.reporting import UNTRAINED
from .engine import Engine
from .events import WHOLE, Opening, Page
from .guard import RejectURLFiles
from .style import CSS, FONTS

MAX_SCALE = 8.0
UPLOAD_SECONDS = 600
"""How long an uploaded file is kept. Visitors who upload the same image at the same time share one file."""
INTRODUCTION = """# Ask about an image
A diffusion model reads the image with your question as its prompt. {models}"""


def build_page(*engines: Engine) -> gr.Blocks:
    """The page of one loaded model, or of several that are compared.

    Raises:
        ValueError: The first model has no diffusion tower that reads the question.
    """
    page = Page(engines)
    with gr.Blocks(title="sdllava", analytics_enabled=False, delete_cache=(60, UPLOAD_SECONDS)) as blocks:
        names = " and ".join(f"`{engine.name}`" for engine in engines)
        models = f"The model is {names}." if len(engines) == 1 else f"{names} are compared."
        gr.Markdown(INTRODUCTION.format(models=models), elem_id="introduction")
        for engine in engines:
            if engine.model.config.is_trained is False:
                which = f"`{engine.name}`: " if len(engines) > 1 else ""
                gr.Markdown(f"{which}**{UNTRAINED}**", elem_id="untrained")
        opening = page.open_first()
        components = _main_components(page, opening) | _further_components(page, opening)
        _connect(page, SimpleNamespace(**components))
    return blocks


def _main_components(page: Page, opening: Opening) -> dict[str, Any]:
    """Pictures, question and answers."""
    main = page.engines[0]
    of = f" of {main.name}" if len(page.engines) > 1 else ""
    images, current = (gr.State(value, time_to_live=3600) for value in (opening.images, opening.current))
    with gr.Row(elem_id="main"):
        with gr.Column(min_width=280):
            picture = gr.HTML(opening.picture, elem_id="picture")
            image_problem = gr.HTML(elem_id="image-problem")
            with gr.Row(elem_id="ask-row"):
                question = gr.Textbox(
                    opening.current.text, label="Question", scale=4, min_width=160, max_lines=3, elem_id="question"
                )
                ask = gr.Button("Ask", variant="primary", scale=1, min_width=72, elem_id="ask")
            question_problem = gr.HTML(elem_id="question-problem")
            answers = gr.HTML(opening.answers, elem_id="answers")
        with gr.Column(min_width=280):
            attention = gr.HTML(opening.attention, elem_id="attention")
            offered = list(opening.current.words())
            words = gr.Radio(offered, value=WHOLE, label="Show where it reads for", elem_id="words")
            shown = gr.Radio(
                [(engine.name, i) for i, engine in enumerate(page.engines) if engine.has_maps],
                value=0, label="Maps of", visible=sum(engine.has_maps for engine in page.engines) > 1, elem_id="shown",
            )  # fmt: skip
        with gr.Column(min_width=280):
            effect = gr.HTML(opening.effect, elem_id="effect")
            scale = gr.Slider(
                0, MAX_SCALE, main.guidance_scale or 1.0, step=0.5,
                label=f"Guidance scale{of}: how strongly the question changes the features",
                visible=main.guidance_scale is not None, elem_id="scale",
            )  # fmt: skip
    return {
        "images": images, "current": current, "picture": picture, "image_problem": image_problem,
        "question": question, "ask": ask, "question_problem": question_problem, "answers": answers,
        "attention": attention, "words": words, "shown": shown, "effect": effect, "scale": scale,
    }  # fmt: skip


def _further_components(page: Page, opening: Opening) -> dict[str, Any]:
    """Examples, uploads and the history."""
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            gallery = gr.Gallery(
                [(example.image, example.question) for example in page.examples],
                label="Examples", columns=6, height=150, allow_preview=False, interactive=False, buttons=[],
                elem_id="examples",
            )  # fmt: skip
        with gr.Column(scale=1, min_width=280):
            upload = gr.File(
                label=f"Your images (at most {page.engines[0].limits.max_images})", file_types=["image"],
                file_count="multiple", type="binary", height=140, elem_id="upload",
            )  # fmt: skip
            upload_problem = gr.HTML(elem_id="upload-problem")
    history = gr.Dataframe(
        opening.history, headers=page.headers, column_count=len(page.headers), type="array", interactive=False,
        wrap=True, label="History", elem_id="history",
    )  # fmt: skip
    return {"gallery": gallery, "upload": upload, "upload_problem": upload_problem, "history": history}


def _connect(page: Page, c: SimpleNamespace) -> None:
    """Connect the components' events to the methods of `page`. Calls of the model run one at a time."""
    model: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
    opened = [
        c.images, c.question, c.picture, c.current, c.words, c.attention, c.effect, c.answers, c.upload,
        c.upload_problem, c.image_problem,
    ]  # fmt: skip
    outputs = [c.current, c.words, c.attention, c.effect, c.question, c.question_problem, c.image_problem]
    answered = [c.answers, c.history, c.effect]
    streamed = {**model, "show_progress_on": [c.answers, c.history]}  # the effect is complete before the answers
    ask = (page.ask, [c.images, c.question, c.scale, c.shown], outputs)
    answers = (page.answers, [c.images, c.current, c.scale, c.history], answered)

    c.upload.upload(page.upload, c.upload, opened, **model)
    chosen = c.gallery.select(page.choose_example, None, opened, **model)
    for event in (chosen.success, c.ask.click, c.question.submit):
        event(*ask, **model).success(*answers, **streamed)
    c.shown.input(*ask, **model)
    c.words.input(page.choose_word, [c.current, c.words], c.attention, api_visibility="private")
    moved = c.scale.input(
        page.move_slider, [c.current, c.scale], c.effect, trigger_mode="always_last", api_visibility="private"
    )
    moved.success(*answers, trigger_mode="always_last", **streamed)


def launch(*engines: Engine, host: str = "127.0.0.1", port: int = 7860, block: bool = True) -> gr.Blocks:
    """Serve the page until interrupted.

    Uploads are written to a private folder and deleted after `UPLOAD_SECONDS`. The folder is deleted at exit.

    Args:
        engines: The loaded models. The answers of the second and of further ones are compared with the first one's.
        host: Address to listen on. Default: connections from this machine only.
        port: Port to listen on.
        block: Whether to wait until the server ends.

    Returns:
        `gr.Blocks`: The running page, which `close()` ends.

    Raises:
        ValueError: The first model has no diffusion tower that reads the question.
    """
    private = tempfile.TemporaryDirectory(prefix="sdllava-demo-")
    atexit.register(private.cleanup)
    os.environ["GRADIO_TEMP_DIR"] = private.name
    blocks = build_page(*engines)
    blocks.queue(default_concurrency_limit=8, max_size=engines[0].limits.max_queue)
    blocks.launch(
        server_name=host,
        server_port=port,
        max_file_size=engines[0].limits.max_image_bytes,
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
