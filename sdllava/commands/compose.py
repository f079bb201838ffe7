"""The commands `compose` and `taps`. Heavy imports happen inside the commands."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import DType, check_finite, check_source


class Fusion(StrEnum):
    """How the features of both encoders become one sequence."""

    cross_attention = "cross_attention"
    concat = "concat"
    concat_tokens = "concat_tokens"
    gated = "gated"


def compose(
    output: Annotated[Path, typer.Argument(help="New folder for the model and its processor.")],
    diffusion: Annotated[
        str | None, typer.Option(help="Diffusion model: repository id, id@revision or folder.")
    ] = None,
    vision: Annotated[
        str | None, typer.Option(help="CLIP, SigLIP or DINOv2: repository id, id@revision or folder.")
    ] = None,
    language_model: Annotated[
        str | None, typer.Option(help="Any causal language model: repository id, id@revision or folder.")
    ] = None,
    llava: Annotated[
        str | None, typer.Option(help="LLaVA-1.5 checkpoint to upgrade, instead of --vision and --language-model.")
    ] = None,
    fusion: Annotated[
        Fusion | None, typer.Option(help="How features are fused. Default: cross_attention with two encoders.")
    ] = None,
    tap: Annotated[list[str] | None, typer.Option(help="Tap of the UNet, see `sdllava taps`. Repeatable.")] = None,
    timestep: Annotated[
        list[int] | None, typer.Option(min=0, max=999, help="Noise level in 0..999, default 50. Repeatable.")
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(help="Guidance scale of the features, default 4. Repeatable.")
    ] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="Any other field, as NAME=JSON, such as grid_size=16. Repeatable.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Type of the weights. The VAE stays in float32.")] = DType.float32,
) -> None:
    """Assemble a model from published parts, or add a diffusion model to a LLaVA-1.5.

    The new fusion and projector then need training.
    """
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists. Name a new folder.")
    if llava and (vision or language_model):
        raise ValueError(
            "--llava has its own vision encoder and language model. Leave out --vision and --language-model."
        )
    check_finite(guidance or (), "--guidance")
    given = {"fusion": fusion and fusion.value, "taps": tap, "timesteps": timestep, "guidance_scales": guidance}
    fields = {name: value for name, value in given.items() if value} | _json_fields(field or [])
    parts = {"diffusion": diffusion, "vision": vision, "language_model": language_model, "llava": llava}
    sources = {name: part for name, part in parts.items() if part}
    for name, source in sources.items():
        check_source(source, f"the part --{name.replace('_', '-')}")

    from .composing import compose_to_folder

    compose_to_folder(output, sources, dtype.value, fields)


def _json_fields(entries: list[str]) -> dict[str, Any]:
    fields = {}
    for entry in entries:
        name, found, value = entry.partition("=")
        if not found:
            raise ValueError(f"--field {entry!r} has no '='. Write NAME=VALUE, such as grid_size=16.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def taps(
    model: Annotated[
        str | None,
        typer.Argument(help="Diffusion model or sdllava checkpoint: repository id or folder. Default: SD 2.1-base."),
    ] = None,
    image_size: Annotated[int | None, typer.Option(min=8, help="Pixels. Default: the model's own.")] = None,
) -> None:
    """List every tap of a UNet, with its size and module."""
    if model is not None:
        check_source(model, "the diffusion model")
    from rich.console import Console
    from rich.table import Table

    import sdllava

    from ..taps import list_taps
    from .composing import tower_config

    sdllava.register()
    config = tower_config(model, image_size)
    table = Table("tap", "height", "width", "channels", "module", box=None)
    for tap in list_taps(config.unet_config or {}, config.latent_size):
        table.add_row(tap.name, str(tap.height), str(tap.width), str(tap.channels), tap.module_path)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
