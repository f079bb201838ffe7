"""Which backbone a configuration or a published repository has: the registry of diffusion families."""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .backbone import DiffusionBackbone, PublishedDiffusion
from .checkpoint_files import FIELD_ERRORS, CheckpointError, part_reported, unexpected_reported
from .deepfloyd_if import DeepFloydIFBackbone
from .diffusion_configuration import SDLlavaDiffusionConfig
from .families import find_family
from .flux import FluxBackbone
from .pixart import PixArtBackbone
from .repositories import read_json
from .sd3 import StableDiffusion3Backbone
from .stable_diffusion import StableDiffusionBackbone, StableDiffusionXLBackbone

BACKBONES: dict[str, type[DiffusionBackbone]] = {
    "stable_diffusion": StableDiffusionBackbone,
    "stable_diffusion_xl": StableDiffusionXLBackbone,
    "deepfloyd_if": DeepFloydIFBackbone,
    "pixart": PixArtBackbone,
    "stable_diffusion_3": StableDiffusion3Backbone,
    "flux": FluxBackbone,
}
"""Backbones by the name of their family in `families.py`."""


_POSITIVE = (
    ("vae_config", "scaling_factor"),
    ("scheduler_config", "num_train_timesteps"),
    ("scheduler_config", "beta_start"),
    ("scheduler_config", "beta_end"),
)


def build_backbone(config: SDLlavaDiffusionConfig) -> DiffusionBackbone:
    """The backbone that a configuration describes, with initial weights."""
    return BACKBONES[config.family.name](config)


def read_published(diffusion: str, **fields: Any) -> PublishedDiffusion:
    """Read and check a published diffusers repository or folder, without weights.

    Args:
        diffusion: Repository id, `id@revision`, or local folder in the diffusers layout.
        fields: Of `SDLlavaDiffusionConfig`.

    Raises:
        OSError: A part cannot be read.
        ValueError: Its family is not supported, its parts do not fit together, or a field does not fit them.
    """
    parts, tokenizers = _read_part_configs(diffusion)
    with unexpected_reported(diffusion, "the diffusion model", FIELD_ERRORS):
        fields = {"image_size": find_family(parts).default_image_size, **fields}
        config = SDLlavaDiffusionConfig(**parts, **fields)
        return PublishedDiffusion(diffusion, config, tokenizers[: len(config.null_prompt_ids)])


def read_whole(diffusion: str, image_size: int | None = None, max_image_size: int | None = None) -> PublishedDiffusion:
    """As `read_published`, for a tower that is not cut and is read at its last attention to the prompt.

    Args:
        diffusion: As for `read_published`.
        image_size: Height and width of images, in pixels. Default: those that the model was trained on.
        max_image_size: The largest default.

    Raises:
        OSError: A part cannot be read.
        ValueError: As `read_published`.
    """
    parts, tokenizers = _read_part_configs(diffusion)
    with unexpected_reported(diffusion, "the diffusion model", FIELD_ERRORS):
        family = find_family(parts)
        native = family.native_image_size(parts)
        size = image_size or min(native, max_image_size or native)
        taps = [tap.name for tap in family.list_taps(parts, size // family.latent_scale(parts))]
        last = [tap for tap in taps if tap.endswith(("Cross-Q", "Joint-Q"))][-1:] or taps[-1:]
        fields = {"use_t5": False} if family.can_leave_out_t5 and len(tokenizers) < len(family.tokenizers) else {}
        config = SDLlavaDiffusionConfig(**parts, **fields, truncate=False, taps=last, image_size=size)
        return PublishedDiffusion(diffusion, config, tokenizers)


def _read_part_configs(diffusion: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
    with part_reported(diffusion, "the diffusion model"):
        parts, tokenizers = _published_family(diffusion).read_part_configs(diffusion)
    for part, name in _POSITIVE:
        value = (parts.get(part) or {}).get(name, 1)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise CheckpointError.of(diffusion, f"{name} of its {part} is {value!r}, not a positive number")
    return parts, tokenizers


def _published_family(diffusion: str) -> type[DiffusionBackbone]:
    files = {f"{part}_config": read_json(diffusion, f"{part}/config.json") for part in ("transformer", "unet")}
    return BACKBONES[find_family(files).name]


def load_backbone(diffusion: str, config: SDLlavaDiffusionConfig, dtype: torch.dtype) -> DiffusionBackbone:
    """A backbone with published weights, cut after its last tap where the configuration says so.

    Args:
        diffusion: Where the configuration was read, see `read_published`.
        config: Its configuration.
        dtype: Of the weights; the VAE stays in float32 where the configuration says so.

    Raises:
        OSError: A part cannot be read.
        ValueError: The weights are pickles.
    """
    with torch.device("meta"):
        backbone = build_backbone(config)
    backbone.load_published(diffusion, dtype)
    if config.truncate:
        backbone.cut(config.resolved_taps())
    freeze(backbone)
    return backbone


def freeze(backbone: nn.Module) -> None:
    """Stop gradients to a backbone's weights and put it in evaluation mode."""
    backbone.requires_grad_(False)
    backbone.eval()
