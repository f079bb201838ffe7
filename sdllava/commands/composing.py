"""What `sdllava compose` and `sdllava taps` do: plan, show, load, write aside, rename."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from ..components import compose, compose_from_llava, plan, plan_from_llava
from ..configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from ..diffusion_loading import read_diffusion_config
from ..modeling_sdllava import SDLlavaForConditionalGeneration
from ..repositories import missing, split_revision
from ..taps import list_taps


def compose_to_folder(output: Path, parts: dict[str, str], dtype: str, fields: dict[str, Any]) -> None:
    """Put parts together and write model and processor; an interrupted run leaves nothing at `output`.

    Args:
        output: a folder that does not exist.
        parts: `diffusion`, `vision`, `language_model`, or `diffusion` and `llava`.
        dtype: `"float32"`, `"bfloat16"` or `"float16"`.
        fields: of the configurations.
    """
    console = Console(stderr=True)
    planned = plan_from_llava(**parts, **fields) if "llava" in parts else plan(**parts, **fields)
    console.print(parameter_table(planned.config, getattr(torch, dtype)))
    with console.status("reading the weights"):
        build = compose_from_llava if "llava" in parts else compose
        model = build(**parts, **fields, dtype=getattr(torch, dtype))
    aside = output.with_name(f"{output.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with console.status("writing the model"):
            model.save_pretrained(aside)
            planned.processor.save_pretrained(aside)
        os.replace(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    console.print(f"wrote {output}; fusion and projector are new: train them with `sdllava train`")


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
    """The tower of SD 2.1-base, of a checkpoint of ours, or of a diffusion repository or folder."""
    fields = {} if image_size is None else {"image_size": image_size}
    if model is None:
        return SDLlavaDiffusionConfig(**fields)
    where = split_revision(model)
    try:
        config = AutoConfig.from_pretrained(**where)
    except (OSError, ValueError):
        config = None  # a diffusion repository has no configuration of its own at the root
    if isinstance(config, SDLlavaConfig | SDLlavaDiffusionConfig):
        config = getattr(config, "diffusion_config", config)
        if config is None:
            raise ValueError(f"{model!r} has no diffusion tower, so no taps")
        config.image_size = image_size or config.image_size
        return config
    try:
        unet = UNet2DConditionModel.load_config(subfolder="unet", **where)
    except (OSError, HFValidationError) as error:
        raise missing(model, "diffusion model or checkpoint", error) from error
    return read_diffusion_config(model, taps=[list_taps(unet)[0].name], **fields)
