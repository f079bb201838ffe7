"""What `sdllava compose` and `sdllava taps` do once their arguments are checked."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from ..atomic_files import atomic_path
from ..backbones import read_whole
from ..configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from ..modeling_sdllava import SDLlavaForConditionalGeneration
from ..parts import read_llava_parts, read_parts
from ..processors import SDLlavaProcessor
from ..repositories import as_dtype, missing, split_revision


def compose_to_folder(output: Path, sources: dict[str, str], dtype: str, fields: dict[str, Any]) -> None:
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
    console = Console(stderr=True)
    parts = read_llava_parts(**sources, **fields) if "llava" in sources else read_parts(**sources, **fields)
    console.print(parameter_table(parts.config, as_dtype(dtype)))
    with console.status("Reading the weights"):
        model = SDLlavaForConditionalGeneration.from_parts(parts, dtype)
    with console.status("Writing the model"), atomic_path(output) as folder:
        model.save_pretrained(folder)
        SDLlavaProcessor.from_parts(parts).save_pretrained(folder)
    console.print(f"Wrote {output}. Fusion and projector are new: train them with `sdllava train`.")


def parameter_table(config: SDLlavaConfig, dtype: torch.dtype) -> Table:
    """Parameters and memory of each part, from the meta device."""
    with torch.device("meta"):
        model = SDLlavaForConditionalGeneration(config)
    table = Table("part", "parameters", "memory", box=None)
    total = 0
    for name, module in [*model.model.named_children(), ("lm_head", model.lm_head)]:
        count = sum(p.numel() for p in module.parameters())
        size = sum(p.numel() * _bytes(n, dtype, config.diffusion_config) for n, p in module.named_parameters())
        total += size
        table.add_row(name, f"{count:,}", f"{size / 2**30:.2f} GiB")
    table.add_row("all", "", f"{total / 2**30:.2f} GiB")
    return table


def _bytes(name: str, dtype: torch.dtype, diffusion_config: SDLlavaDiffusionConfig | None) -> int:
    in_fp32 = diffusion_config is not None and diffusion_config.vae_in_fp32 and ".vae." in f".{name}"
    return 4 if in_fp32 else dtype.itemsize


def tower_config(model: str | None, image_size: int | None = None) -> SDLlavaDiffusionConfig:
    """The tower of SD 2.1-base, of a checkpoint of this package, or of a diffusion repository or folder.

    Args:
        model: A repository id or folder. None is SD 2.1-base.
        image_size: Height and width of images, in pixels. Default: the checkpoint's, or 512.

    Raises:
        OSError: It cannot be read.
        ValueError: It has no diffusion tower.
    """
    if model is None:
        return SDLlavaDiffusionConfig(image_size=image_size or 512)
    where = split_revision(model)
    try:
        config = AutoConfig.from_pretrained(**where)
    except (OSError, ValueError):
        config = None  # a diffusion repository has no configuration of its own at the root
    if isinstance(config, SDLlavaConfig | SDLlavaDiffusionConfig):
        tower: Any = config.diffusion_config if isinstance(config, SDLlavaConfig) else config
        if tower is None:
            raise ValueError(f"{model!r} has no diffusion tower, so it has no taps. Give a model that has one.")
        tower.image_size = image_size or tower.image_size
        return tower
    try:
        return read_whole(model, image_size=image_size or 512).config
    except (OSError, HFValidationError) as error:
        raise missing(model, "diffusion model or checkpoint", error) from error
