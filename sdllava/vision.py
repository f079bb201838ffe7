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

from .checkpoint_files import CheckpointError, part_reported, unexpected_reported
from .image_loading import MAX_SIDE
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
    where = {**split_revision(vision), "trust_remote_code": False}
    with part_reported(vision, "the vision encoder", "vision_config"):
        try:
            config = AutoConfig.from_pretrained(**where)
            config = getattr(config, "vision_config", config)
            is_known = config.model_type in VISION_MODELS
            processor: Any = AutoImageProcessor.from_pretrained(**where) if is_known else None
        except (OSError, ValueError) as error:
            raise missing(vision, "vision encoder", error) from error
    if not is_known:
        kinds = ", ".join(VISION_MODELS)
        raise TypeError(f"{str(vision)!r} is a {config.model_type!r}. The vision encoder can be {kinds}.")
    with unexpected_reported(vision, "the image size"):
        size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        side = image_size or size.get("height") or size["shortest_edge"]
        if not isinstance(side, int) or not 0 < side <= MAX_SIDE:
            raise CheckpointError.of(vision, f"its image processor makes images of {side!r} pixels")
        for name in ("image_mean", "image_std"):
            value = getattr(processor, name)
            if len(value) != 3 or not all(isinstance(channel, int | float) for channel in value):
                raise CheckpointError.of(vision, f"{name} of its image processor is {value!r}, not three numbers")
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
    with part_reported(vision, "the vision encoder's weights", "vision_config"):
        try:
            return VISION_MODELS[config.model_type].from_pretrained(
                dtype=dtype, use_safetensors=True, **split_revision(vision)
            )
        except OSError as error:
            raise missing(vision, "vision encoder's weights", error) from error
