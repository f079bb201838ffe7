"""Vision encoders as references for the diffusion features: CLIP, SigLIP and DINOv2."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from ..image_loading import ImageLike, load_rgb, pad_to_square
from ..repositories import missing, require_safetensors, split_revision
from .similarity import PairSimilarity, pair_similarity


class VisionEncoder(nn.Module):
    """The last layer's patch features and the global feature of CLIP, SigLIP or DINOv2.

    Args:
        source: A repository id, `id@revision` or a local folder.

    Raises:
        OSError: The encoder cannot be read.
        ValueError: Its weights are pickles.
    """

    def __init__(self, source: str):
        super().__init__()
        require_safetensors(source)
        try:
            config = AutoConfig.from_pretrained(**split_revision(source))
            self.processor = AutoImageProcessor.from_pretrained(**split_revision(source))
            model = AutoModel.from_pretrained(**split_revision(source), dtype="auto")
        except (OSError, ValueError) as error:
            raise missing(source, "vision encoder", error) from error
        self.model = getattr(model, "vision_model", model).eval()
        vision = getattr(config, "vision_config", config)
        self.name = {"clip_vision_model": "CLIP", "dinov2": "DINOv2"}.get(vision.model_type, vision.model_type)
        size = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else self.processor.size
        side = size.get("height") or size["shortest_edge"]
        self.num_patches = (side // vision.patch_size) ** 2
        self.size = {"height": side, "width": side}

    @torch.no_grad()
    def forward(self, images: Sequence[ImageLike]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode images, padded to squares.

        Returns:
            `tuple`: Patch features `(n, tokens, channels)` and global features `(n, channels)`.
        """
        colour = [int(255 * mean) for mean in self.processor.image_mean]
        squares = [pad_to_square(load_rgb(image), colour) for image in images]
        pixels = self.processor(squares, size=self.size, do_center_crop=False, return_tensors="pt")["pixel_values"]
        parameter = next(self.model.parameters())
        outputs = self.model(pixel_values=pixels.to(parameter.device, parameter.dtype))
        return outputs.last_hidden_state[:, -self.num_patches :], outputs.pooler_output

    def similarity(self, first: Sequence[ImageLike], second: Sequence[ImageLike]) -> PairSimilarity:
        """Cosine similarities of paired images. `pooled` compares the global features."""
        (patches_a, pooled_a), (patches_b, pooled_b) = self(first), self(second)
        pooled = F.cosine_similarity(pooled_a.double(), pooled_b.double(), dim=-1)
        return PairSimilarity(pair_similarity(patches_a, patches_b).positions, pooled.cpu().numpy())
