"""Vision encoders: which models can be one, and how their configuration and weights are read."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionModel,
)

from .repositories import missing, require_safetensors, split_revision

VISION_MODELS = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
}
"""Classes by model type."""


def read_vision(vision: str, image_size: int | None = None) -> tuple[PreTrainedConfig, Any, int | None]:
    """Read the configuration and the image processor of a vision encoder, without weights.

    Args:
        vision: Repository id, `id@revision` or local folder.
        image_size: Pixels along one side of its images. Default: the image processor's.

    Returns:
        The encoder's configuration, its image processor set to square images of that size, and the size, where it
        differs from the configuration's.

    Raises:
        OSError: It cannot be read.
        TypeError: Its model type cannot be a vision encoder.
    """
    try:
        config = AutoConfig.from_pretrained(**split_revision(vision))
        config = getattr(config, "vision_config", config)
        if config.model_type not in VISION_MODELS:
            kinds = ", ".join(VISION_MODELS)
            raise TypeError(f"{str(vision)!r} is a {config.model_type!r}. The vision encoder can be {kinds}.")
        processor = AutoImageProcessor.from_pretrained(**split_revision(vision))
    except (OSError, ValueError) as error:
        raise missing(vision, "vision encoder", error) from error
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side = image_size or size.get("height") or size["shortest_edge"]
    processor.size = processor.crop_size = {"height": side, "width": side}
    return config, processor, side if side != config.image_size else image_size


def load_vision(vision: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A vision encoder with the published weights.

    Args:
        vision: As for `read_vision`.
        config: Its configuration.
        dtype: Of the weights.

    Raises:
        ValueError: The weights are pickles.
    """
    require_safetensors(vision)
    return VISION_MODELS[config.model_type].from_pretrained(dtype=dtype, **split_revision(vision))
