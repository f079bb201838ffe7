"""`sdllava compose` and `sdllava taps`. Heavy imports happen inside, so that help is instant."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DType


class Fusion(StrEnum):
    """How both encoders' features become one sequence."""

    cross_attention = "cross_attention"
    concat = "concat"
    concat_tokens = "concat_tokens"
    gated = "gated"


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

    from .composing import compose_to_folder

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

    from ..taps import list_taps
    from .composing import tower_config

    sdllava.register()
    config = tower_config(model, image_size)
    table = Table("tap", "height", "width", "channels", "module", box=None)
    for tap in list_taps(config.unet_config, config.latent_size):
        table.add_row(tap.name, str(tap.height), str(tap.width), str(tap.channels), tap.module_path)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
