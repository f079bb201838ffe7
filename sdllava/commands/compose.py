"""The commands `compose` and `taps`. Heavy imports happen inside the commands."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..presets import PRESETS, find_preset
from .options import DType, check_finite, check_source, model_path

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from ..configuration import SDLlavaDiffusionConfig
    from ..modeling_sdllava import SDLlavaForConditionalGeneration


class Fusion(StrEnum):
    """How the features of both encoders become one sequence."""

    cross_attention = "cross_attention"
    concat = "concat"
    concat_tokens = "concat_tokens"
    gated = "gated"
    attention_over_maps = "attention_over_maps"
    multi_level = "multi_level"


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
    tap: Annotated[list[str] | None, typer.Option(help="Tap of the denoiser, see `sdllava taps`. Repeatable.")] = None,
    timestep: Annotated[
        list[int] | None, typer.Option(min=0, max=999, help="Noise level in 0..999, default 50. Repeatable.")
    ] = None,
    guidance: Annotated[
        list[float] | None, typer.Option(help="Guidance scale of the features, default 4. Repeatable.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Tap and timestep of a published model, see `sdllava taps --presets`.")
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
    if preset is not None:
        chosen = find_preset(preset)
        diffusion, fields = diffusion or chosen.diffusion, {**chosen.values, **fields}
    parts = {"diffusion": diffusion, "vision": vision, "language_model": language_model, "llava": llava}
    sources = {name: part for name, part in parts.items() if part}
    for name, source in sources.items():
        check_source(source, f"the part --{name.replace('_', '-')}")
    if not llava and not language_model:
        raise ValueError("The model needs a language model. Give --language-model or --llava.")
    _compose_to_folder(output, sources, dtype.value, fields)


def _json_fields(entries: list[str]) -> dict[str, Any]:
    fields = {}
    for entry in entries:
        name, found, value = entry.partition("=")
        if not found or not name:
            raise ValueError(
                f"--field {entry!r} has no {'name' if found else repr('=')}. Write NAME=VALUE, such as grid_size=16."
            )
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def _compose_to_folder(output: Path, sources: dict[str, str], dtype: str, fields: dict[str, Any]) -> None:
    """Put parts together and write model and processor. An interrupted run leaves nothing at `output`.

    Args:
        output: A folder that does not exist.
        sources: `diffusion`, `vision`, `language_model`, or `diffusion` and `llava`: repositories or folders.
        dtype: "float32", "bfloat16" or "float16".
        fields: Of the configurations.

    Raises:
        OSError: A part cannot be read.
        TypeError: A field does not exist.
        ValueError: The parts do not fit together, or their weights are pickles.
    """
    from rich.console import Console

    from ..atomic_files import atomic_path
    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..parts import read_llava_parts, read_parts
    from ..processors import SDLlavaProcessor
    from ..repositories import as_dtype

    console = Console(stderr=True)
    parts = read_llava_parts(**sources, **fields) if "llava" in sources else read_parts(**sources, **fields)
    model = SDLlavaForConditionalGeneration.build(parts)
    console.print(_parameter_table(model, as_dtype(dtype)))
    with console.status("Reading the weights"):
        model.load_parts(parts, as_dtype(dtype))
    with console.status("Writing the model"), atomic_path(output) as folder:
        model.save_pretrained(folder)
        SDLlavaProcessor.from_parts(parts).save_pretrained(folder)
    console.print(f"Wrote {output}. Fusion and projector are new: train them with `sdllava train`.")


def _parameter_table(model: "SDLlavaForConditionalGeneration", dtype: "torch.dtype") -> "Table":
    """Parameters and memory of each part."""
    from rich.table import Table

    table = Table("part", "parameters", "memory", box=None)
    total = 0
    for name, module in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        count = sum(p.numel() for p in module.parameters())
        size = sum(p.numel() * _bytes(n, dtype, model.config.diffusion_config) for n, p in module.named_parameters())
        total += size
        table.add_row(name, f"{count:,}", f"{size / 2**30:.2f} GiB")
    table.add_row("all", "", f"{total / 2**30:.2f} GiB")
    return table


def _bytes(name: str, dtype: "torch.dtype", diffusion_config: "SDLlavaDiffusionConfig | None") -> int:
    in_fp32 = diffusion_config is not None and diffusion_config.vae_in_fp32 and ".vae." in f".{name}"
    return 4 if in_fp32 else dtype.itemsize


def taps(
    model: Annotated[
        str | None,
        typer.Argument(help="Diffusion model or sdllava checkpoint: repository id or folder. Default: SD 2.1-base."),
    ] = None,
    presets: Annotated[bool, typer.Option("--presets", help="List recommended taps with their sources.")] = False,
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Pixels. Default: the model's own, at most 512.")
    ] = None,
) -> None:
    """List every tap of a denoiser, with its size and module."""
    if presets:
        _print_presets()
        return
    if model is not None:
        check_source(model, "the diffusion model")
    from rich.console import Console
    from rich.table import Table

    import sdllava

    sdllava.register()
    table = Table("tap", "height", "width", "channels", "module", box=None)
    for tap in _tower_config(model and model_path(model), image_size).all_taps():
        table.add_row(tap.name, str(tap.height), str(tap.width), str(tap.channels), tap.module_path)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _print_presets() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("preset", "repository", "taps", "timesteps", "source", box=None)
    for name, found in PRESETS.items():
        fields = "".join(f", {key}={value}" for key, value in found.fields.items())
        timesteps = ", ".join(map(str, found.timesteps))
        table.add_row(name, found.diffusion, ", ".join(found.taps), f"{timesteps}{fields}", found.source)
    Console(width=None if sys.stdout.isatty() else 240).print(table)
    print("None of these was tested here with real weights.")


def _tower_config(model: str | None, image_size: int | None = None) -> "SDLlavaDiffusionConfig":
    """The tower of SD 2.1-base, of a checkpoint of this package, or of a diffusion repository or folder.

    Args:
        model: A repository id or folder. None is SD 2.1-base.
        image_size: Height and width of images, in pixels. Default: the checkpoint's, or 512.

    Raises:
        OSError: It cannot be read.
        ValueError: It has no diffusion tower.
    """
    from huggingface_hub.errors import HFValidationError
    from transformers import AutoConfig

    from ..backbones import read_whole
    from ..configuration import SDLlavaConfig, SDLlavaDiffusionConfig
    from ..repositories import missing, split_revision

    if model is None:
        return SDLlavaDiffusionConfig(image_size=image_size or 512)
    where = split_revision(model)
    try:
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    except (OSError, ValueError):
        config = None  # a diffusion repository has no configuration of its own at the root
    if isinstance(config, SDLlavaConfig | SDLlavaDiffusionConfig):
        tower: Any = config.diffusion_config if isinstance(config, SDLlavaConfig) else config
        if tower is None:
            raise ValueError(f"{model!r} has no diffusion tower, so it has no taps. Give a model that has one.")
        tower.image_size = image_size or tower.image_size
        return tower
    try:
        return read_whole(model, image_size, max_image_size=512).config
    except (OSError, HFValidationError) as error:
        raise missing(model, "diffusion model or checkpoint", error) from error
