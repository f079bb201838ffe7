"""Image-text matching with CLIP-style models: those of transformers (CLIP, SigLIP, MetaCLIP, ...) and open_clip's."""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModel, AutoProcessor

from ..image_loading import ImageLike, load_rgb
from ..repositories import require_safetensors
from .processes import default_device


class ClipMatcher:
    """A two-tower model of transformers, scored by its image-text logit.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.
        device: None uses this process's accelerator, or the CPU.

    Raises:
        ValueError: The model has no `logits_per_text`, or its weights are pickles.
    """

    timesteps: tuple[int, ...] = ()

    def __init__(self, name: str, revision: str | None = None, device: str | torch.device | None = None):
        require_safetensors(f"{name}@{revision}" if revision else name)
        self.model = AutoModel.from_pretrained(name, revision=revision).to(device or default_device()).eval()
        self.processor = AutoProcessor.from_pretrained(name, revision=revision)
        # SigLIP was trained on texts padded to their full length
        self.padding = "max_length" if "siglip" in self.model.config.model_type else True
        if not hasattr(self.model, "logit_scale"):
            raise ValueError(
                f"{name!r} ({type(self.model).__name__}) is not a two-tower image-text model. Use one such as CLIP or "
                "SigLIP."
            )

    @torch.inference_mode()
    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Logits `(1, 1, texts, images)`: one trial, no timesteps."""
        inputs = self.processor(
            text=list(texts),
            images=[load_rgb(image) for image in images],
            padding=self.padding,
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device)
        return self.model(**inputs).logits_per_text.double().cpu().numpy()[None, None]


class OpenClipMatcher:
    """A model of open_clip, scored by cosine similarity.

    Args:
        name: `open_clip:ARCHITECTURE/PRETRAINED`, for example `open_clip:ViT-H-14/laion2b_s32b_b79k`.
        device: None uses this process's accelerator, or the CPU.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: The architecture does not exist, or the name has no pretrained tag.
    """

    timesteps: tuple[int, ...] = ()

    def __init__(self, name: str, device: str | torch.device | None = None):
        try:
            import open_clip
        except ImportError:
            raise ImportError('open_clip is not installed. Run `pip install "sdllava[open_clip]"`.') from None
        architecture, _, pretrained = name.removeprefix("open_clip:").partition("/")
        if architecture not in open_clip.list_models() or not pretrained:
            raise ValueError(f"Unknown open_clip model {name!r}. Use the form open_clip:ARCHITECTURE/PRETRAINED.")
        self.device = device or default_device()
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            architecture, pretrained=pretrained, device=self.device
        )
        self.model.eval()
        self.tokenizer = open_clip.get_tokenizer(architecture)

    @torch.inference_mode()
    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Cosine similarities `(1, 1, texts, images)`: one trial, no timesteps."""
        pixels = torch.stack([self.preprocess(load_rgb(image)) for image in images]).to(self.device)
        image_features = self.model.encode_image(pixels, normalize=True)
        text_features = self.model.encode_text(self.tokenizer(list(texts)).to(self.device), normalize=True)
        return (text_features @ image_features.T).double().cpu().numpy()[None, None]
