"""Loading a diffusion model for analysis: the tower of a saved model, or a published diffusion model, whole."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig

from ..backbones import read_whole
from ..configuration import SDLlavaConfig
from ..diffusion import SDLlavaDiffusionModel
from ..parts import diffusion_image_processor
from ..processors import SDLlavaProcessor
from ..repositories import find_file, missing, split_revision
from .reading import Prompts


@dataclass
class AnalysisModel:
    """A diffusion tower with its processor, without a language model.

    Args:
        name (`str`): For titles.
        tower ([`SDLlavaDiffusionModel`]): Reads images.
        processor ([`SDLlavaProcessor`]): Makes the tower's inputs.
    """

    name: str
    tower: SDLlavaDiffusionModel
    processor: SDLlavaProcessor

    def latents(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Images, padded to squares, as latents `(n, 4, h, w)`."""
        pixels = self.processor(images=list(images), return_tensors="pt")["diffusion_pixel_values"]
        return self.tower.encode_latents(pixels)

    def input_ids(self, questions: Sequence[str]) -> list[torch.Tensor]:
        """Questions as token ids `(n, 77)`, one tensor per tokenizer of the diffusion model."""
        inputs = self.processor.tokenize_questions(questions, "pt")
        return [ids.to(self.tower.text_encoder.device) for ids in inputs.values()]

    def prompts(self, questions: Sequence[str] | None) -> Prompts | None:
        """Questions as conditioning, one per image. None for the empty prompt."""
        return None if questions is None else self.tower.encode_prompts(*self.input_ids(questions))


def load_analysis_model(model: str, dtype: torch.dtype | None = None, device: str | None = None) -> AnalysisModel:
    """Load a diffusion tower and its processor.

    Args:
        model: A folder or repository of an SDLlava model, of which only the tower is read, up to its last tap; or of a
            published diffusion model (`model_index.json`), which is read whole.
        dtype: The dtype of the weights. Default: as saved, float32 for a published diffusion model.
        device: Default: CUDA where available, else the CPU.

    Raises:
        OSError: The model does not exist.
        ValueError: The model does not have a diffusion tower.
    """
    where = split_revision(model)
    is_diffusion = find_file(where["pretrained_model_name_or_path"], "model_index.json", where) is not None
    loaded = _load_published(model, dtype) if is_diffusion else _load_saved(model, where, dtype)
    loaded.tower.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return loaded


def short_name(model: str) -> str:
    """A model's name for titles: the repository id, or the folder's own name."""
    return Path(model).name if Path(model).exists() else model


def _load_published(model: str, dtype: torch.dtype | None) -> AnalysisModel:
    published = read_whole(model, max_image_size=512)
    tower = SDLlavaDiffusionModel.from_published(published, dtype or torch.float32)
    stand_in = copy.deepcopy(published.tokenizers[0])  # a processor needs a language tokenizer; none is used here
    processor = SDLlavaProcessor(None, stand_in, diffusion_image_processor(tower.config), *published.tokenizers)
    return AnalysisModel(short_name(model), tower, processor)


def _load_saved(model: str, where: dict[str, Any], dtype: torch.dtype | None) -> AnalysisModel:
    try:
        config = AutoConfig.from_pretrained(**where)
    except (OSError, ValueError) as error:
        raise missing(model, "model", error) from error
    if not isinstance(config, SDLlavaConfig) or config.diffusion_config is None:
        raise ValueError(
            f"{model!r} is a {config.model_type!r} without a diffusion tower. Give an SDLlava model that has one, or a "
            "published diffusion model."
        )
    tower = SDLlavaDiffusionModel.from_pretrained(**where, config=config.diffusion_config, dtype=dtype or "auto")
    return AnalysisModel(short_name(model), tower.eval(), SDLlavaProcessor.from_pretrained(**where))
