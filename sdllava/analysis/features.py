"""Feature maps as numbers: principal components, differences between prompts, registers (S3, Figures 2, 5, 7, 8)."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .reading import FeatureMap

GroupField = Literal["tap", "timestep", "guidance_scale"]
GROUP_FIELDS: tuple[GroupField, ...] = ("tap", "timestep", "guidance_scale")

_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class PCA:
    """Principal components of channel vectors. Sign and scale are fixed, so equal features give equal colours.

    Args:
        mean (`np.ndarray` of shape `(channels,)`, float64): Mean of the samples.
        components (`np.ndarray` of shape `(k, channels)`, float64): Unit vectors. The loading of largest magnitude is
            positive.
        explained_variance_ratio (`np.ndarray` of shape `(k,)`): Shares of the total variance, in [0, 1].
        low, high (`np.ndarray` of shape `(k,)`): 1st and 99th percentile of the samples' scores, drawn as 0 and 1.
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
        """Features `(..., channels)` as `(..., k)` in [0, 1]. With k = 3: red, green and blue."""
        span = np.where(self.high > self.low, self.high - self.low, 1)
        return ((self.scores(features) - self.low) / span).clip(0, 1)


def fit_pca(features: np.ndarray, n_components: int = 3) -> PCA:
    """Fit principal components to channel vectors.

    Args:
        features (`np.ndarray` of shape `(samples, channels)`): Channel vectors.
        n_components: Number of components k.

    Raises:
        ValueError: There are fewer samples or channels than components.
    """
    samples = np.asarray(features, np.float64)
    if min(samples.shape) < n_components:
        raise ValueError(
            f"{n_components} components need as many samples and channels, but the features have shape "
            f"{samples.shape}. Choose a tap with a larger map, or more images."
        )
    mean = samples.mean(axis=0)
    centred = samples - mean
    variances, vectors = np.linalg.eigh(centred.T @ centred)
    components = vectors[:, ::-1][:, :n_components].T
    largest = np.abs(components).argmax(axis=1)
    components = components * np.sign(components[np.arange(n_components), largest])[:, None]
    total = max(variances.sum(), _TINY)
    scores = centred @ components.T
    low, high = np.percentile(scores, [1, 99], axis=0)
    return PCA(mean, components, variances[::-1][:n_components].clip(0) / total, low, high)


@dataclass
class PCAMap:
    """A feature map as colours along the principal components of its group.

    Args:
        tap (`str`): Name of the tap.
        timestep (`int`): Noise level in 0..999.
        guidance_scale (`float`, *optional*): None for a difference of features.
        colours (`np.ndarray` of shape `(n, height, width, 3)`): In [0, 1].
        pca ([`PCA`]): The components of the group.
    """

    tap: str
    timestep: int
    guidance_scale: float | None
    colours: np.ndarray
    pca: PCA


def pca_maps(maps: Sequence[FeatureMap], fit_per: Sequence[GroupField] = ("tap",)) -> list[PCAMap]:
    """Feature maps as colours. Each group of maps has one joint PCA over all of its images.

    Args:
        maps: From [`~sdllava.analysis.reading.read_features`].
        fit_per: The fields that separate groups. `("tap",)` joins timesteps and scales; `("tap", "timestep")` fits each
            timestep separately (S3, Figure 2b); `()` joins everything, which needs taps of equal channels.

    Raises:
        ValueError: The taps of a group differ in channels, or a group has fewer than 3 samples or channels.
    """
    groups: dict[tuple, list[np.ndarray]] = defaultdict(list)
    arrays = [feature.values.float().cpu().numpy() for feature in maps]
    keys = [tuple(getattr(feature, field) for field in fit_per) for feature in maps]
    for key, values in zip(keys, arrays, strict=True):
        groups[key].append(values.reshape(-1, values.shape[-1]))
    fitted = {}
    for key, parts in groups.items():
        widths = sorted({part.shape[1] for part in parts})
        if len(widths) > 1:
            raise ValueError(f"One PCA needs equal channels, but the taps have {widths}. Fit each tap separately.")
        fitted[key] = fit_pca(np.concatenate(parts))
    return [
        PCAMap(feature.tap, feature.timestep, feature.guidance_scale, fitted[key].colours(values), fitted[key])
        for feature, key, values in zip(maps, keys, arrays, strict=True)
    ]


@dataclass
class DeltaMap:
    """The effect of a question on the features of one tap and timestep: X_c - X_u (S3, section 4.2).

    Args:
        tap (`str`): Name of the tap.
        timestep (`int`): Noise level in 0..999.
        difference (`np.ndarray` of shape `(n, height, width, channels)`, float32): X_c - X_u.
        heat (`np.ndarray` of shape `(n, height, width)`, float32): |X_c - X_u| relative to the image's mean |X_u|.
    """

    tap: str
    timestep: int
    difference: np.ndarray
    heat: np.ndarray

    def pca(self) -> PCAMap:
        """The difference as colours, with its own joint PCA (S3, Figure 5a, bottom rows)."""
        pca = fit_pca(self.difference.reshape(-1, self.difference.shape[-1]))
        return PCAMap(self.tap, self.timestep, None, pca.colours(self.difference), pca)


def delta_maps(maps: Sequence[FeatureMap]) -> list[DeltaMap]:
    """Differences between conditional and unconditional features.

    Args:
        maps: Feature maps with the guidance scales 0 and 1 of each tap and timestep.

    Raises:
        ValueError: One of the two scales is missing for a tap and timestep.
    """
    known = {feature.key: feature.values.float().cpu().numpy() for feature in maps}
    found = []
    for tap, timestep in dict.fromkeys(key[:2] for key in known):
        unconditional, conditional = known.get((tap, timestep, 0.0)), known.get((tap, timestep, 1.0))
        if unconditional is None or conditional is None:
            raise ValueError(
                f"The difference at {tap!r}, t = {timestep} needs the guidance scales 0 and 1. Read both scales."
            )
        difference = conditional - unconditional
        length = np.linalg.norm(unconditional, axis=-1).mean(axis=(1, 2), keepdims=True)
        heat = np.linalg.norm(difference, axis=-1) / np.maximum(length, np.finfo(np.float32).tiny)
        found.append(DeltaMap(tap, timestep, difference, heat))
    return found


@dataclass
class RegisterReport:
    """Register tokens: positions of outlying norm whose vectors agree between images (S3, section 3.1 and C.1).

    Args:
        tap (`str`): Name of the tap.
        timestep (`int`): Noise level in 0..999.
        guidance_scale (`float`): Guidance scale.
        outlying (`np.ndarray` of shape `(n, height, width)`, bool): Positions of outlying norm.
        norm_ratio (`np.ndarray` of shape `(n, height, width)`, float32): Norm divided by the image's median norm.
        variance_share (`float`): Share of the total variance at the outlying positions, in [0, 1].
        shared_similarity (`float`): Mean over outlying positions of the cosine similarity with the most similar
            outlying position of each other image; nan where fewer than two images have any.
        ordinary_similarity (`float`): The same for the other positions, as a reference.
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
        """Mean number of outlying positions per image."""
        return float(self.outlying.sum(axis=(1, 2)).mean())


def find_registers(feature: FeatureMap, threshold: float = 6.0) -> RegisterReport:
    """Find register tokens in one feature map.

    Args:
        feature: The features of n images.
        threshold: A norm is outlying if it exceeds the image's median by more than this many standard deviations,
            estimated from the median absolute deviation.
    """
    values = feature.values.float().cpu().numpy().astype(np.float64)
    norms = np.linalg.norm(values, axis=-1)
    median = np.median(norms, axis=(1, 2), keepdims=True)
    deviation = 1.4826 * np.median(np.abs(norms - median), axis=(1, 2), keepdims=True)
    outlying = norms - median > threshold * np.maximum(deviation, 1e-6 * median)
    squared = ((values - values.mean(axis=(0, 1, 2))) ** 2).sum(axis=-1)
    directions = values / np.maximum(norms, _TINY)[..., None]
    pairs = list(zip(directions, outlying, strict=True))
    return RegisterReport(
        *feature.key,
        outlying=outlying,
        norm_ratio=(norms / np.maximum(median, _TINY)).astype(np.float32),
        variance_share=float(squared[outlying].sum() / max(squared.sum(), _TINY)),
        shared_similarity=_best_similarity([image[mask] for image, mask in pairs]),
        ordinary_similarity=_best_similarity([image[~mask] for image, mask in pairs]),
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
