"""Similarity of features: cosine similarity of image pairs, and linear CKA between taps (S3, Figures 2c, 5c and 9)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from .reading import FeatureKey
from .sweep import ComputedFeatures, Sweep


@dataclass(frozen=True)
class PairSimilarity:
    """Cosine similarities of pairs of images.

    Args:
        positions (`np.ndarray` of shape `(pairs,)`, float64): Similarity of the two vectors at each position, averaged
            over positions.
        pooled (`np.ndarray` of shape `(pairs,)`, float64): Similarity of the two means over positions; for a vision
            encoder, of its global features.
    """

    positions: np.ndarray
    pooled: np.ndarray


def pair_similarity(first: torch.Tensor, second: torch.Tensor) -> PairSimilarity:
    """Compare the feature maps of paired images.

    Args:
        first: Features of shape `(pairs, height, width, channels)` or `(pairs, tokens, channels)`.
        second: Features of the same shape.
    """
    a, b = (x.double().flatten(1, -2) for x in (first, second))
    positions = F.cosine_similarity(a, b, dim=-1).mean(dim=1)
    pooled = F.cosine_similarity(a.mean(dim=1), b.mean(dim=1), dim=-1)
    return PairSimilarity(positions.cpu().numpy(), pooled.cpu().numpy())


@dataclass
class SimilarityGrid:
    """Mean cosine similarity of paired images by tap, timestep and guidance scale (S3, Figure 2c).

    Args:
        taps (`list[str]`): First axis.
        timesteps (`list[int]`): Second axis.
        guidance_scales (`list[float]`): Third axis.
        positions, pooled (`np.ndarray` of shape `(taps, timesteps, scales)`, float64): [`PairSimilarity`], averaged
            over pairs.
        num_pairs (`int`): Number of pairs.
    """

    taps: list[str]
    timesteps: list[int]
    guidance_scales: list[float]
    positions: np.ndarray
    pooled: np.ndarray
    num_pairs: int


def similarity_grid(source: ComputedFeatures | Sweep, batch_size: int = 8) -> SimilarityGrid:
    """Compare images 0 and 1, 2 and 3, and so on, at every tap, timestep and guidance scale.

    Args:
        source: Features of an even number of images.
        batch_size: Images per batch, rounded down to whole pairs.

    Raises:
        ValueError: The number of images is odd or 0.
    """
    if len(source) < 2 or len(source) % 2:
        raise ValueError(
            f"{len(source)} images do not form pairs. Give an even number of images in the order first, second."
        )
    selection = source.selection
    shape = (len(selection.taps), len(selection.timesteps), len(selection.guidance_scales))
    positions, pooled = np.zeros(shape), np.zeros(shape)
    step = max(2, batch_size // 2 * 2)
    for start in range(0, len(source), step):
        for feature in source.batch(range(start, min(start + step, len(source)))):
            index = (
                selection.taps.index(feature.tap),
                selection.timesteps.index(feature.timestep),
                selection.guidance_scales.index(feature.guidance_scale),
            )
            found = pair_similarity(feature.values[0::2], feature.values[1::2])
            positions[index] += found.positions.sum()
            pooled[index] += found.pooled.sum()
    pairs = len(source) // 2
    axes = (selection.taps, selection.timesteps, selection.guidance_scales)
    return SimilarityGrid(*axes, positions / pairs, pooled / pairs, pairs)


def unbiased_hsic(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al., 2012, equation 5).

    Args:
        first: Gram matrix `(n, n)` of n >= 4 examples.
        second: Gram matrix `(n, n)` of the same examples.

    Returns:
        `torch.Tensor` of shape `()`.

    Raises:
        ValueError: There are fewer than 4 examples.
    """
    n = len(first)
    if n < 4:
        raise ValueError(f"The unbiased estimate needs at least 4 examples per batch, not {n}. Use a larger batch.")
    a, b = (gram - torch.diag(torch.diag(gram)) for gram in (first, second))
    trace = (a * b).sum()
    totals = a.sum() * b.sum() / ((n - 1) * (n - 2))
    rows = a.sum(dim=0) @ b.sum(dim=0) * 2 / (n - 2)
    return (trace + totals - rows) / (n * (n - 3))


class MinibatchCKA:
    """Linear CKA of every pair of named representations, in minibatches of at least 4 (Nguyen et al., 2021).

    The unbiased estimates of the batches are averaged, so the expectation does not depend on the batch size. Only Gram
    matrices of one batch are held in memory, in float64.

    Args:
        names: Names of the representations, in the order of the matrix.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self.sums = np.zeros((len(names), len(names)))
        self.batches = 0

    def update(self, features: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add a batch.

        Args:
            features: For every name a tensor `(n, ...)`; each example is read as one long vector. An iterable gives
                the representations one at a time.
        """
        pairs = features.items() if isinstance(features, Mapping) else features
        by_name = {name: _gram(values) for name, values in pairs}
        grams = [by_name[name] for name in self.names]
        for i, first in enumerate(grams):
            for j, second in enumerate(grams[i:], start=i):
                self.sums[i, j] += float(unbiased_hsic(first, second))
                self.sums[j, i] = self.sums[i, j]
        self.batches += 1

    def matrix(self) -> np.ndarray:
        """The CKA of every pair.

        Returns:
            `np.ndarray` of shape `(names, names)`, float64: 1 for equal representations, about 0 for independent ones.
            The unbiased estimate can be a little below 0. It is nan where a representation does not vary.

        Raises:
            ValueError: `update` was not called.
        """
        if not self.batches:
            raise ValueError("CKA of 0 batches is undefined. Call `update` first.")
        return _normalised(self.sums)


class FullBatchCKA:
    """Linear CKA of every pair of named representations over all examples at once (Kornblith et al., 2019).

    CKA(X, Y) = |Y'X|^2 / (|X'X| |Y'Y|) with columns that are centred over all examples. It is biased upwards where
    there are fewer examples than features. All features are held in memory, in float32.

    Args:
        names: Names of the representations, in the order of the matrix.
    """

    def __init__(self, names: Sequence[str]):
        self.vectors: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def update(self, features: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add a batch; see `MinibatchCKA.update`."""
        for name, values in features.items() if isinstance(features, Mapping) else features:
            self.vectors[name].append(values.flatten(1).float().cpu())

    def matrix(self) -> np.ndarray:
        """The CKA of every pair.

        Returns:
            `np.ndarray` of shape `(names, names)`, float64, in [0, 1]. It is nan where a representation does not vary.

        Raises:
            ValueError: `update` was not called.
        """
        if not any(self.vectors.values()):
            raise ValueError("CKA of 0 batches is undefined. Call `update` first.")
        grams = [_gram(torch.cat(batches)).flatten() for batches in self.vectors.values()]
        stacked = torch.stack(grams)
        return _normalised((stacked @ stacked.T).numpy())


def _normalised(sums: np.ndarray) -> np.ndarray:
    """Each sum divided by the root of both own sums."""
    own = sums.diagonal()
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt(np.where(own > 0, own, np.nan))
        return sums / np.outer(scale, scale)


def _gram(values: torch.Tensor) -> torch.Tensor:
    vectors = values.flatten(1).double()
    vectors = vectors - vectors.mean(dim=0)  # does not change the estimate, but avoids cancellation in its sums
    return vectors @ vectors.T


@dataclass
class CKAResult:
    """Linear CKA between features (S3, Figures 5c and 9).

    Args:
        keys (`list[tuple]`): Tap, timestep and guidance scale of each row and column.
        matrix (`np.ndarray` of shape `(keys, keys)`, float64): See [`MinibatchCKA.matrix`], [`FullBatchCKA.matrix`].
        num_images (`int`): Number of images.
    """

    keys: list[FeatureKey]
    matrix: np.ndarray
    num_images: int

    def between_taps(self, timestep: int, guidance_scale: float) -> tuple[list[str], np.ndarray]:
        """The taps at one timestep and scale, and their matrix (S3, Figure 9)."""
        rows = [i for i, key in enumerate(self.keys) if key[1:] == (timestep, guidance_scale)]
        return [self.keys[i][0] for i in rows], self.matrix[np.ix_(rows, rows)]

    def with_unconditional(self, tap: str, timestep: int) -> tuple[list[float], np.ndarray]:
        """The scales of one tap, and their CKA with scale 0 (S3, Figure 5c)."""
        rows = [i for i, key in enumerate(self.keys) if key[:2] == (tap, timestep)]
        return [self.keys[i][2] for i in rows], self.matrix[self.keys.index((tap, timestep, 0.0)), rows]


def cka(
    source: ComputedFeatures | Sweep, batch_size: int = 16, method: Literal["minibatch", "full"] = "minibatch"
) -> CKAResult:
    """Linear CKA between every two of the selected features, over all images.

    Args:
        source: Features of at least 4 images.
        batch_size: Images per batch. Batches have nearly equal sizes of at least 4.
        method: "minibatch" averages unbiased estimates of batches, "full" compares all images at once.

    Raises:
        ValueError: There are fewer than 4 images.
    """
    count = len(source)
    if count < 4:
        raise ValueError(f"CKA needs at least 4 images, not {count}. Give more images.")
    keys = source.selection.keys
    names = [_name(key) for key in keys]
    meter = FullBatchCKA(names) if method == "full" else MinibatchCKA(names)
    num_batches = min(math.ceil(count / batch_size), count // 4)
    for rows in np.array_split(np.arange(count), num_batches):
        features = source.batch(rows.tolist())
        meter.update((_name(feature.key), feature.values) for feature in features)
    return CKAResult(keys, meter.matrix(), count)


def _name(key: FeatureKey) -> str:
    return str(key)
