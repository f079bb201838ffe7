"""Loading what is looked into: a model's tower without its language model, or a published diffusion model, whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import cached_file

from ..configuration import SDLlavaConfig
from ..diffusion import SDLlavaDiffusionModel
from ..diffusion_loading import load_diffusion, load_diffusion_tokenizers, read_diffusion_config
from ..processors import SDLlavaProcessor, diffusion_image_processor
from ..repositories import missing, split_revision
from ..taps import list_taps
from .reading import read_elsewhere


class _CheckpointTower(SDLlavaDiffusionModel):
    """A tower that is read from a whole model's checkpoint, whose other parts are no mistake."""

    _keys_to_ignore_on_load_unexpected = [r"^(lm_head|model)\."]


@dataclass
class Subject:
    """What is looked into.

    Args:
        name (`str`): for titles.
        tower ([`SDLlavaDiffusionModel`]): reads images.
        processor ([`SDLlavaProcessor`]): makes its inputs.
    """

    name: str
    tower: SDLlavaDiffusionModel
    processor: SDLlavaProcessor

    def latents(self, images: Sequence[Any]) -> torch.Tensor:
        """Images, padded to squares, as latents `(n, 4, h, w)`."""
        pixels = self.processor(images=list(images), return_tensors="pt")["diffusion_pixel_values"]
        return self.tower.encode_latents(pixels)

    def input_ids(self, questions: Sequence[str]) -> list[torch.Tensor]:
        """Questions as token ids `(n, 77)`, one tensor for each tokenizer of the diffusion model."""
        inputs = self.processor.tokenize_questions(questions, "pt")
        return [ids.to(self.tower.text_encoder.device) for ids in inputs.values()]

    def prompts(self, questions: Sequence[str] | None) -> dict[str, torch.Tensor] | None:
        """Questions as conditioning, one each image; None for the empty prompt."""
        return None if questions is None else self.tower.encode_prompts(*self.input_ids(questions))


def load_subject(model: str, dtype: torch.dtype | None = None, device: str | None = None) -> Subject:
    """Load a tower to look into.

    Args:
        model (`str`): folder or repository of an SDLlava model, whose tower alone is read and reaches as far as its
            deepest tap; or of a published diffusion model (`model_index.json`), which is read whole.
        dtype: of the weights; default as saved, for a diffusion model float32.
        device: default CUDA where there is one.

    Raises:
        OSError: there is no such model.
        ValueError: the model has no diffusion tower.
    """
    where = split_revision(model)
    path, revision = where["pretrained_model_name_or_path"], where.get("revision")
    options = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    try:
        is_diffusion = cached_file(path, "model_index.json", **options) is not None
    except OSError as error:
        raise missing(model, "model", error) from error
    subject = _published(model, dtype) if is_diffusion else _checkpoint(model, where, dtype)
    subject.tower.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return subject


def short_name(model: str) -> str:
    """A model's name as titles say it: the repository id, or the folder's own name."""
    return Path(model).name if Path(model).exists() else model


def _published(model: str, dtype: torch.dtype | None) -> Subject:
    config = read_diffusion_config(model)
    image_size = min(config.image_size, config.unet_config["sample_size"] * config.vae_scale_factor)
    tower = load_diffusion(model, truncate=False, dtype=dtype or torch.float32, image_size=image_size)
    tokenizers = load_diffusion_tokenizers(model, tower.config.text_encoder_2_config is not None)
    stand_in = load_diffusion_tokenizers(model, False)[0]  # a processor has a language tokenizer; no text is made
    processor = SDLlavaProcessor(None, stand_in, diffusion_image_processor(tower.config), *tokenizers)
    deepest = [tap.name for tap in list_taps(tower.config.unet_config) if tap.name.endswith("Cross-Q")][-1]
    return Subject(short_name(model), read_elsewhere(tower, taps=[deepest]), processor)


def _checkpoint(model: str, where: dict[str, Any], dtype: torch.dtype | None) -> Subject:
    try:
        config = AutoConfig.from_pretrained(**where)
    except (OSError, ValueError) as error:
        raise missing(model, "model", error) from error
    if not isinstance(config, SDLlavaConfig) or config.diffusion_config is None:
        raise ValueError(f"{model!r} is a {config.model_type!r} without a diffusion tower: nothing to look into")
    tower = _CheckpointTower.from_pretrained(
        **where,
        config=config.diffusion_config,
        key_mapping={r"^model\.diffusion_tower\.": ""},
        dtype=dtype or "auto",
    )
    return Subject(short_name(model), tower.eval(), SDLlavaProcessor.from_pretrained(**where))
