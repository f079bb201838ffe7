"""Loading a diffusion model for analysis: the tower of a saved model, or a published diffusion model, whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..diffusion import SDLlavaDiffusionModel
from ..processors import SDLlavaProcessor
from ..towers import load_tower
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
        return [ids.to(self.tower.backbone.prompt_weight.device) for ids in inputs.values()]

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
    tower, processor = load_tower(model, dtype, max_image_size=512)
    tower.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return AnalysisModel(short_name(model), tower, processor)


def short_name(model: str) -> str:
    """A model's name for titles: the repository id, or the folder's own name."""
    return Path(model).name if Path(model).exists() else model
