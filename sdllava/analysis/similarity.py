"""How alike features are: cosine similarity of image pairs, and linear CKA (S3, Figures 2c, 5c and 9)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel

from ..image_loading import load_rgb, pad_to_square
from ..repositories import missing, split_revision


@dataclass(frozen=True)
class PairSimilarity:
    """Cosine similarities of pairs of images.

    Args:
        positions (`np.ndarray` of shape `(pairs,)`, float64): mean over positions of the similarity of the two vectors
            found there.
        pooled (`np.ndarray` of shape `(pairs,)`, float64): similarity of the two means over positions; for a static
            encoder, of its global image features.
    """

    positions: np.ndarray
    pooled: np.ndarray


def pair_similarity(first: torch.Tensor, second: torch.Tensor) -> PairSimilarity:
    """Compare feature maps of paired images.

    Args:
        first, second (`torch.Tensor` of shape `(pairs, height, width, channels)` or `(pairs, tokens, channels)`).
    """
    a, b = (x.double().flatten(1, -2) for x in (first, second))
    positions = F.cosine_similarity(a, b, dim=-1).mean(dim=1)
    pooled = F.cosine_similarity(a.mean(dim=1), b.mean(dim=1), dim=-1)
    return PairSimilarity(positions.cpu().numpy(), pooled.cpu().numpy())


def unbiased_hsic(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Song et al.'s unbiased estimate of the Hilbert-Schmidt independence criterion (their equation 5).

    Args:
        first, second (`torch.Tensor` of shape `(n, n)`): Gram matrices of the same n >= 4 examples.

    Returns:
        `torch.Tensor` of shape `()`.
    """
    n = len(first)
    if n < 4:
        raise ValueError(f"the unbiased estimate needs at least 4 examples at once, not {n}: use a larger batch")
    k, l = (gram - torch.diag(torch.diag(gram)) for gram in (first, second))  # noqa: E741
    trace = (k * l).sum()
    totals = k.sum() * l.sum() / ((n - 1) * (n - 2))
    rows = k.sum(dim=0) @ l.sum(dim=0) * 2 / (n - 2)
    return (trace + totals - rows) / (n * (n - 3))


class MinibatchCKA:
    """Linear CKA of every pair of named representations, in minibatches of any size from 4 (Nguyen et al., 2021).

    The unbiased estimates of the batches are averaged, so the expectation does not depend on the batch size. Of a batch
    only Gram matrices are held, in float64.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.sums = np.zeros((len(names), len(names)))
        self.batches = 0

    def update(self, features: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add a batch: for every name a tensor `(n, ...)` of which each example is one long vector, one at a time."""
        pairs = features.items() if isinstance(features, Mapping) else features
        by_name = {name: _gram(values) for name, values in pairs}
        grams = [by_name[name] for name in self.names]
        for i, first in enumerate(grams):
            for j, second in enumerate(grams[i:], start=i):
                self.sums[i, j] += float(unbiased_hsic(first, second))
                self.sums[j, i] = self.sums[i, j]
        self.batches += 1

    def matrix(self) -> np.ndarray:
        """`np.ndarray` of shape `(names, names)`, float64: 1 for equal representations, about 0 for independent ones.

        An unbiased estimate can be a little below 0; where a representation does not vary at all it is nan.
        """
        if not self.batches:
            raise ValueError("no batch was given yet")
        own = self.sums.diagonal()
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt(np.where(own > 0, own, np.nan))
            return self.sums / np.outer(scale, scale)


def _gram(values: torch.Tensor) -> torch.Tensor:
    vectors = values.flatten(1).double()
    vectors = vectors - vectors.mean(dim=0)  # changes no estimate; keeps its sums from cancelling
    return vectors @ vectors.T


class StaticEncoder(nn.Module):
    """CLIP, SigLIP or DINOv2 as something to compare with; its last layer's patches and global feature."""

    def __init__(self, source: str):
        super().__init__()
        try:
            config = AutoConfig.from_pretrained(**split_revision(source))
            self.processor = AutoImageProcessor.from_pretrained(**split_revision(source))
            model = AutoModel.from_pretrained(**split_revision(source), dtype="auto")
        except (OSError, ValueError) as error:
            raise missing(source, "static encoder", error) from error
        self.model = getattr(model, "vision_model", model).eval()
        vision = getattr(config, "vision_config", config)
        self.name = {"clip_vision_model": "CLIP", "dinov2": "DINOv2"}.get(vision.model_type, vision.model_type)
        side = vision.image_size // vision.patch_size
        size = self.processor.crop_size if getattr(self.processor, "do_center_crop", False) else self.processor.size
        size = size.get("height") or size["shortest_edge"]
        self.num_patches = (size // vision.patch_size) ** 2 if vision.patch_size else side**2
        self.size = {"height": size, "width": size}

    @torch.no_grad()
    def forward(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images, padded to squares, as patch features `(n, tokens, channels)` and global features `(n, channels)`."""
        colour = [int(255 * mean) for mean in self.processor.image_mean]
        squares = [pad_to_square(load_rgb(image), colour) for image in images]
        pixels = self.processor(squares, size=self.size, do_center_crop=False, return_tensors="pt")["pixel_values"]
        parameter = next(self.model.parameters())
        outputs = self.model(pixel_values=pixels.to(parameter.device, parameter.dtype))
        return outputs.last_hidden_state[:, -self.num_patches :], outputs.pooler_output

    def similarity(self, first: Sequence[Any], second: Sequence[Any]) -> PairSimilarity:
        """Of pairs of images."""
        (patches_a, pooled_a), (patches_b, pooled_b) = self(first), self(second)
        pooled = F.cosine_similarity(pooled_a.double(), pooled_b.double(), dim=-1)
        return PairSimilarity(pair_similarity(patches_a, patches_b).positions, pooled.cpu().numpy())
