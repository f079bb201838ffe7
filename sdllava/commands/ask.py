"""`sdllava ask`. Heavy imports happen inside, so that help is instant."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DType, check_device, default_device, model_path

ModelOption = Annotated[str, typer.Option(help="Folder, repository id, or 'mini', the embedded miniature.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest there is.")]


def ask(
    image: Annotated[str, typer.Argument(help="Path, URL, or base64 of an image.")],
    questions: Annotated[list[str], typer.Argument(help="One or more questions about it.")],
    model: ModelOption = "mini",
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale(s) instead of the model's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a question, with its score.")] = False,
    heatmap: Annotated[Path | None, typer.Option(help="Also draw where the question looked: a PNG or SVG.")] = None,
    device: DeviceOption = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, bfloat16 elsewhere.")] = None,
) -> None:
    """Ask about an image. Every further question costs one pass of the diffusion model."""
    from ..image_loading import load_rgb
    from ..pipeline import check_question

    picture = load_rgb(image)
    for question in questions:
        if os.path.isfile(check_question(question)):
            raise ValueError(f"the question {question!r} is a file: one image is asked about at a time")
    if model == "mini":
        say_if_photograph(picture)
    pipe = load_pipeline(model, device, dtype)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if guidance:
        options["guidance_scales"] = guidance
    for question in questions:
        if not as_json:
            from transformers import TextStreamer

            if len(questions) > 1:
                typer.secho(question, bold=True)
            options["streamer"] = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = pipe(image=picture, question=question, **options)
        if as_json:
            typer.echo(json.dumps({"image": image, "question": question, **answer}))
    if heatmap is not None:
        draw_heatmap(pipe, picture, questions[0], heatmap)


def say_if_photograph(picture) -> None:
    """Say beside the miniature's answer that it is not to be believed, where the picture is none that it knows."""
    from ..scenes.render import looks_rendered

    if not looks_rendered(picture):
        message = "This looks like no rendered scene, and the miniature knows nothing else: do not believe its answer."
        typer.secho(message, fg="yellow", err=True)


def load_pipeline(model: str, device: str | None, dtype: DType | None):
    """A visual question answering pipeline, quietly loaded."""
    import sdllava

    sdllava.register()
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = model_path(model)
    device = check_device(device or default_device())
    weights = dtype.value if dtype else "float32" if device == "cpu" else "bfloat16"
    return pipeline("visual-question-answering", model=path, device=device, dtype=weights)


def draw_heatmap(pipe, picture, question: str, output: Path) -> None:
    """Draw where a question looked, and say where the picture is."""
    from ..analysis.attention import question_heatmap
    from ..analysis.plots import draw_heatmap as draw

    draw(question_heatmap(pipe.model, pipe.processor, picture, question), output)
    typer.echo(f"wrote {output}", err=True)
