"""Feature maps as numbers: principal components, what a question moved, registers (S3, Figures 2, 5, 7, 8 and 12)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .reading import FeatureMap

GroupField = Literal["tap", "timestep", "guidance_scale"]


@dataclass(frozen=True)
class PCA:
    """Principal components of channel vectors, with sign and scale fixed: equal features always give equal colours.

    Args:
        mean (`np.ndarray` of shape `(channels,)`, float64)
        components (`np.ndarray` of shape `(k, channels)`, float64): unit vectors; of each, the loading that is largest
            in magnitude is positive.
        explained_variance_ratio (`np.ndarray` of shape `(k,)`): shares of the total variance.
        low, high (`np.ndarray` of shape `(k,)`): 1st and 99th percentile of the scores that the fit saw; colours 0, 1.
    """

    mean: np.ndarray
    components: np.ndarray
    explained_variance_ratio: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Features `(..., channels)` along the components, `(..., k)` in float64."""
        return (features.astype(np.float64) - self.mean) @ self.components.T

    def colours(self, features: np.ndarray) -> np.ndarray:
        """Features `(..., channels)` as `(..., k)` in [0, 1]; with k = 3, red, green and blue."""
        span = np.where(self.high > self.low, self.high - self.low, 1)
        return ((self.scores(features) - self.low) / span).clip(0, 1)


def fit_pca(features: np.ndarray, n_components: int = 3) -> PCA:
    """Fit principal components to channel vectors of shape `(samples, channels)`.

    Raises:
        ValueError: there are fewer samples or channels than components.
    """
    samples = np.asarray(features, np.float64)
    if min(samples.shape) < n_components:
        raise ValueError(
            f"{n_components} components need as many samples and channels, but the features have the shape "
            f"{samples.shape}: choose a tap with a larger map, or more images"
        )
    mean = samples.mean(axis=0)
    centred = samples - mean
    variances, vectors = np.linalg.eigh(centred.T @ centred)
    components = vectors[:, ::-1][:, :n_components].T
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(n_components), largest])[:, None]
    total = max(variances.sum(), np.finfo(np.float64).tiny)
    scores = centred @ components.T
    low, high = np.percentile(scores, [1, 99], axis=0)
    return PCA(mean, components, variances[::-1][:n_components].clip(0) / total, low, high)


@dataclass
class PCAMap:
    """A feature map in the colours of its group's components.

    Args:
        tap, timestep, guidance_scale: where it was read; the scale is None for a difference of features.
        colours (`np.ndarray` of shape `(n, height, width, 3)`): in [0, 1].
        pca ([`PCA`]): of the group.
    """

    tap: str
    timestep: int
    guidance_scale: float | None
    colours: np.ndarray
    pca: PCA


def pca_maps(maps: Sequence[FeatureMap], fit_per: Sequence[GroupField] = ("tap",)) -> list[PCAMap]:
    """Feature maps as colours. Each group of maps that agree in `fit_per` gets one joint PCA over all of its images.

    Args:
        maps: from [`~sdllava.analysis.reading.read_features`].
        fit_per: fields that are never joined. `("tap",)` joins timesteps and scales; `("tap", "timestep")` fits each
            timestep alone (S3, Figure 2b); `()` joins everything, which needs taps of equal channels.
    """
    groups: dict[tuple, list[np.ndarray]] = defaultdict(list)
    arrays = [feature.values.float().cpu().numpy() for feature in maps]
    keys = [tuple(getattr(feature, field) for field in fit_per) for feature in maps]
    for key, values in zip(keys, arrays):
        groups[key].append(values.reshape(-1, values.shape[-1]))
    fitted = {}
    for key, parts in groups.items():
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            raise ValueError(f"one PCA needs equal channels, but the taps have {widths}: fit each tap alone")
        fitted[key] = fit_pca(np.concatenate(parts))
    return [
        PCAMap(feature.tap, feature.timestep, feature.guidance_scale, fitted[key].colours(values), fitted[key])
        for feature, key, values in zip(maps, keys, arrays)
    ]


@dataclass
class DeltaMap:
    """What a question moved at one tap and timestep: X_c - X_u (S3, section 4.2).

    Args:
        tap (`str`), timestep (`int`): where.
        difference (`np.ndarray` of shape `(n, height, width, channels)`, float32)
        heat (`np.ndarray` of shape `(n, height, width)`, float32): the difference's length at each position, relative
            to the mean length of that image's unconditional features.
    """

    tap: str
    timestep: int
    difference: np.ndarray
    heat: np.ndarray

    def pca(self) -> PCAMap:
        """The difference in the colours of its own joint PCA (S3, Figure 5a, bottom rows)."""
        pca = fit_pca(self.difference.reshape(-1, self.difference.shape[-1]))
        return PCAMap(self.tap, self.timestep, None, pca.colours(self.difference), pca)


def delta_maps(maps: Sequence[FeatureMap]) -> list[DeltaMap]:
    """Differences of conditional and unconditional features.

    Args:
        maps: feature maps that hold the guidance scales 0 and 1 of each tap and timestep.
    """
    known = {feature.key: feature.values.float().cpu().numpy() for feature in maps}
    places = list(dict.fromkeys(key[:2] for key in known))
    found = []
    for place in places:
        if (*place, 0.0) not in known or (*place, 1.0) not in known:
            raise ValueError(f"a difference needs the guidance scales 0 and 1, which {place} has not")
        base = known[(*place, 0.0)]
        difference = known[(*place, 1.0)] - base
        length = np.linalg.norm(base, axis=-1).mean(axis=(1, 2), keepdims=True)
        heat = np.linalg.norm(difference, axis=-1) / np.maximum(length, np.finfo(np.float32).tiny)
        found.append(DeltaMap(*place, difference, heat))
    return found


@dataclass
class RegisterReport:
    """Register tokens: positions of outlying norm that images share (S3, section 3.1 and C.1).

    Args:
        tap (`str`), timestep (`int`), guidance_scale (`float`): where.
        outlying (`np.ndarray` of shape `(n, height, width)`, bool): positions of outlying norm.
        norm_ratio (`np.ndarray` of shape `(n, height, width)`, float32): norm by the image's median norm.
        variance_share (`float`): the outlying positions' share of the total variance.
        shared_similarity (`float`): mean over outlying positions of the cosine similarity with the most similar
            outlying position of each other image; nan where fewer than two images have any.
        ordinary_similarity (`float`): the same for the other positions; what images share without registers.
    """

    tap: str
    timestep: int
    guidance_scale: float
    outlying: np.ndarray
    norm_ratio: np.ndarray
    variance_share: float
    shared_similarity: float
    ordinary_similarity: float

    @property
    def per_image(self) -> float:
        """Mean number of outlying positions an image."""
        return float(self.outlying.sum(axis=(1, 2)).mean())


def find_registers(feature: FeatureMap, threshold: float = 6.0) -> RegisterReport:
    """Look for register tokens in one feature map.

    Args:
        threshold: a norm is outlying where it lies above the image's median by more than this many standard
            deviations, estimated from the median absolute deviation.
    """
    values = feature.values.float().cpu().numpy().astype(np.float64)
    norms = np.linalg.norm(values, axis=-1)
    median = np.median(norms, axis=(1, 2), keepdims=True)
    deviation = 1.4826 * np.median(np.abs(norms - median), axis=(1, 2), keepdims=True)
    outlying = norms - median > threshold * np.maximum(deviation, 1e-6 * median)
    squared = ((values - values.mean(axis=(0, 1, 2))) ** 2).sum(axis=-1)
    directions = values / np.maximum(norms, np.finfo(np.float64).tiny)[..., None]
    return RegisterReport(
        *feature.key,
        outlying=outlying,
        norm_ratio=(norms / np.maximum(median, np.finfo(np.float64).tiny)).astype(np.float32),
        variance_share=float(squared[outlying].sum() / max(squared.sum(), np.finfo(np.float64).tiny)),
        shared_similarity=_best_similarity([image[mask] for image, mask in zip(directions, outlying)]),
        ordinary_similarity=_best_similarity([image[~mask] for image, mask in zip(directions, outlying)]),
    )


def _best_similarity(directions: Sequence[np.ndarray]) -> float:
    """Mean cosine similarity of each vector with the most similar one of each other image."""
    best = [
        (a @ b.T).max(axis=1)
        for i, a in enumerate(directions)
        for j, b in enumerate(directions)
        if i != j and len(a) and len(b)
    ]
    return float(np.concatenate(best).mean()) if best else float("nan")
