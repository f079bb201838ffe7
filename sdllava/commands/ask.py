"""The command `ask`. Heavy imports happen inside the command."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DeviceOption,
    DType,
    ModelOption,
    check_device,
    check_finite,
    check_outputs,
    default_device,
    model_path,
)
from .reporting import PHOTOGRAPH, warn_if_untrained

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL_MODEL = 100_000_000
"""Parameters below which the operations of one question are too small to share between threads of a CPU."""


def ask(
    image: Annotated[str, typer.Argument(help="Path, URL, or base64 of an image.")],
    questions: Annotated[list[str], typer.Argument(help="One or more questions about the image.")],
    model: ModelOption = "mini",
    guidance: Annotated[
        list[float] | None, typer.Option(help="Guidance scale of the features, instead of the model's. Repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")] = 128,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per question, with its score.")
    ] = False,
    heatmap: Annotated[
        Path | None, typer.Option(help="Also draw the first question's attention map: a .png or .svg file.")
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[DType | None, typer.Option(help="Default: float32 on a CPU, bfloat16 elsewhere.")] = None,
) -> None:
    """Answer questions about an image. A follow-up question costs one pass of the diffusion model."""
    check_finite(guidance or (), "--guidance")
    check_outputs([heatmap] if heatmap else [], "--heatmap", (".png", ".svg"))
    _check_questions(questions)
    path = model_path(model)
    from ..image_loading import load_rgb

    picture = load_rgb(image)
    if model in ("mini", "smol"):
        _warn_of_photograph(picture)
    pipe = _load_pipeline(path, device, dtype)
    warn_if_untrained(pipe.model.config)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if guidance:
        options["guidance_scales"] = guidance
    answers = []
    for question in questions:
        if not as_json:
            from transformers import TextStreamer

            if len(questions) > 1:
                typer.secho(question, bold=True)
            options["streamer"] = TextStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        (answer,) = pipe(image=picture, question=question, **options)
        answers.append(answer["answer"].strip())
        if as_json:
            typer.echo(json.dumps({"image": image, "question": question, **answer}))
    if heatmap is not None:
        _draw_heatmap(pipe, picture, questions[0], answers[0], heatmap)


def _check_questions(questions: list[str]) -> None:
    from ..names import check_question

    for question in questions:
        if os.path.isfile(check_question(question)):
            raise ValueError(f"The question {question!r} is a file. Give one image, then the questions about it.")


def _warn_of_photograph(picture: "Image") -> None:
    """Warn that the miniature does not support an image that is not a rendered scene."""
    from ..scenes.render import looks_rendered

    if not looks_rendered(picture):
        typer.secho(f"Warning: {PHOTOGRAPH}", fg="yellow", err=True)


def _load_pipeline(path: str, device: str | None, dtype: DType | None) -> Any:
    """A visual question answering pipeline."""
    import torch

    import sdllava

    from ..checkpoint_files import damage_reported
    from ..repositories import split_revision

    sdllava.register()
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
        pipeline,
    )

    device = check_device(device) if device else default_device()
    weights = dtype.value if dtype else "float32" if device == "cpu" else "bfloat16"
    where = split_revision(path)
    with damage_reported(path, "the configuration"):
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(
            f"{path!r} is a model of type {config.model_type!r}, which does not answer questions about images. Use a "
            "checkpoint of this package, or another vision-language model."
        )
    where["trust_remote_code"] = False
    processor = AutoProcessor.from_pretrained(**where)
    model = AutoModelForImageTextToText.from_pretrained(config=config, dtype=weights, **where)
    pipe = pipeline("visual-question-answering", model=model, processor=processor, device=device)
    if device == "cpu" and pipe.model.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(1)
    return pipe


def _draw_heatmap(pipe: Any, picture: "Image", question: str, answer: str, output: Path) -> None:
    from ..analysis.attention import question_heatmap
    from ..analysis.plots import draw_heatmap

    heat = question_heatmap(pipe.model, pipe.processor, picture, question)
    draw_heatmap(heat, output, f"{question} {answer}\n{heat.description}")
    typer.echo(f"wrote {output}", err=True)
