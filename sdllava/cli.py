"""The `sdllava` command. Nothing heavy is imported before a command runs, so `--help` answers at once."""

import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from sdllava import hub_cli
from sdllava.analysis import cli as analysis_cli
from sdllava.command_line import DType, check_device, default_device, model_path
from sdllava.demo import cli as demo_cli
from sdllava.evaluation import cli as evaluation_cli
from sdllava.miniature import cli as miniature_cli
from sdllava.train import cli as train_cli

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Stable Diffusion as a question-aware second eye for LLaVA-style vision-language models.",
)


class Fusion(StrEnum):
    """How both encoders' features become one sequence."""

    cross_attention = "cross_attention"
    concat = "concat"
    concat_tokens = "concat_tokens"
    gated = "gated"


ModelOption = Annotated[str, typer.Option(help="Folder, repository id, or 'mini', the embedded miniature.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the fastest there is.")]


@app.command()
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
    from sdllava.image_loading import load_rgb
    from sdllava.pipeline import check_question

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
    from sdllava.data.scenes import looks_rendered

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
    from sdllava.analysis.attention import question_heatmap
    from sdllava.analysis.plots import draw_heatmap as draw

    draw(question_heatmap(pipe.model, pipe.processor, picture, question), output)
    typer.echo(f"wrote {output}", err=True)


@app.command()
def compose(
    output: Annotated[Path, typer.Argument(help="New folder for the model and its processor.")],
    diffusion: Annotated[str | None, typer.Option(help="Diffusion model: repository, id@revision or folder.")] = None,
    vision: Annotated[str | None, typer.Option(help="CLIP, SigLIP or DINOv2: likewise.")] = None,
    language_model: Annotated[str | None, typer.Option(help="Any causal language model: likewise.")] = None,
    llava: Annotated[str | None, typer.Option(help="Upgrade this LLaVA-1.5 instead of vision and language.")] = None,
    fusion: Annotated[Fusion | None, typer.Option(help="Default: cross_attention with two encoders.")] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Where the UNet is read; see `sdllava taps`.")] = None,
    timestep: Annotated[list[int] | None, typer.Option(help="0..999; larger is noisier. Default 50.")] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale(s) of the features. Default 4.")] = None,
    field: Annotated[list[str] | None, typer.Option(help="Any other field, as NAME=JSON: grid_size=16.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of the weights; the VAE stays in float32.")] = DType.float32,
) -> None:
    """Put published parts together, or give a LLaVA-1.5 its second eye. Fusion and projector then need training."""
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists: name a new folder")
    if llava and (vision or language_model):
        raise ValueError("--llava brings its own encoder and language model: leave out --vision and --language-model")
    given = {"fusion": fusion and fusion.value, "taps": tap, "timesteps": timestep, "guidance_scales": guidance}
    fields = {name: value for name, value in given.items() if value} | _json_fields(field or [])

    from sdllava.composing import compose_to_folder

    parts = {"diffusion": diffusion, "vision": vision, "language_model": language_model, "llava": llava}
    compose_to_folder(output, {name: part for name, part in parts.items() if part}, dtype.value, fields)


def _json_fields(entries: list[str]) -> dict[str, Any]:
    fields = {}
    for entry in entries:
        name, found, value = entry.partition("=")
        if not found:
            raise ValueError(f"--field {entry!r} has no '=': write NAME=VALUE, such as grid_size=16")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


@app.command()
def taps(
    model: Annotated[
        str | None, typer.Argument(help="Diffusion repository or folder, or a model of ours; default SD 2.1-base.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Pixels; default the model's own.")] = None,
) -> None:
    """List every place where a UNet can be read, with its size and module."""
    from rich.console import Console
    from rich.table import Table

    import sdllava
    from sdllava.composing import tower_config
    from sdllava.taps import list_taps

    sdllava.register()
    config = tower_config(model, image_size)
    table = Table("tap", "height", "width", "channels", "module", box=None)
    for tap in list_taps(config.unet_config, config.latent_size):
        table.add_row(tap.name, str(tap.height), str(tap.width), str(tap.channels), tap.module_path)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


app.command(context_settings=train_cli.TRAIN_CONTEXT)(train_cli.train)
app.command()(train_cli.merge)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(train_cli.cache)
app.command()(evaluation_cli.evaluate)
app.command()(evaluation_cli.match)
app.add_typer(analysis_cli.app, name="inspect")
app.command()(hub_cli.push)
app.command()(hub_cli.serve)
app.command()(demo_cli.demo)
app.add_typer(miniature_cli.app, name="mini")


def main() -> None:
    """Run the command; an expected error is one sentence on standard error and exit status 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.secho(f"sdllava: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
