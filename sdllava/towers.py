"""Loading a diffusion tower without a language model: that of a saved model, or a published diffusion model, whole."""

import copy
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from .backbones import read_whole
from .configuration import SDLlavaConfig
from .diffusion import SDLlavaDiffusionModel
from .parts import diffusion_image_processor
from .processors import SDLlavaProcessor
from .repositories import find_file, missing, split_revision


def is_diffusion_repository(model: str) -> bool:
    """Whether a folder, repository id or `id@revision` has the layout of diffusers (`model_index.json`)."""
    where = split_revision(model)
    return find_file(where["pretrained_model_name_or_path"], "model_index.json", where) is not None


def load_tower(
    model: str, dtype: torch.dtype | str | None = None, max_image_size: int | None = None
) -> tuple[SDLlavaDiffusionModel, SDLlavaProcessor]:
    """Load a diffusion tower and the processor that makes its inputs, on the CPU.

    Args:
        model: A folder or repository of an SDLlava model, of which only the tower is read, up to its last tap where it
            is truncated; or of a published diffusion model, which is read whole.
        dtype: Of the weights. Default: as saved, float32 for a published diffusion model.
        max_image_size: The largest height and width of images that a published diffusion model is read at, in pixels.

    Raises:
        OSError: The model does not exist.
        ValueError: The model does not have a diffusion tower.
    """
    if is_diffusion_repository(model):
        return _load_published(model, dtype, max_image_size)
    return _load_saved(model, split_revision(model), dtype)


def _load_published(
    model: str, dtype: torch.dtype | str | None, max_image_size: int | None
) -> tuple[SDLlavaDiffusionModel, SDLlavaProcessor]:
    published = read_whole(model, max_image_size=max_image_size)
    tower = SDLlavaDiffusionModel.from_published(published, dtype or torch.float32)
    stand_in = copy.deepcopy(published.tokenizers[0])  # a processor needs a language tokenizer; none is used here
    return tower, SDLlavaProcessor(None, stand_in, diffusion_image_processor(tower.config), *published.tokenizers)


def _load_saved(
    model: str, where: dict[str, Any], dtype: torch.dtype | str | None
) -> tuple[SDLlavaDiffusionModel, SDLlavaProcessor]:
    try:
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise missing(model, "model", error) from error
    if not isinstance(config, SDLlavaConfig) or config.diffusion_config is None:
        raise ValueError(
            f"{model!r} is a {config.model_type!r} without a diffusion tower. Give an SDLlava model that has one, or a "
            "published diffusion model."
        )
    if "diffusion" in (config.left_out or {}):  # only the whole model knows where the weights are
        whole: Any = AutoModelForImageTextToText.from_pretrained(
            **where, dtype=dtype or "auto", trust_remote_code=False
        )
        tower = whole.model.diffusion_tower
    else:
        tower = SDLlavaDiffusionModel.from_pretrained(**where, config=config.diffusion_config, dtype=dtype or "auto")
    return tower.eval(), SDLlavaProcessor.from_pretrained(**where)
