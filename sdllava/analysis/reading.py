"""Reading a tower at other taps, timesteps and guidance scales than the configured ones, in one pass per timestep."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from ..diffusion import SDLlavaDiffusionModel
from ..guidance import guide
from ..taps import Tap, resolve_taps

FeatureKey = tuple[str, int, float]
"""Tap, timestep and guidance scale."""

Prompts = dict[str, torch.Tensor]
"""Conditioning of n prompts, from `tower.encode_prompts`."""


@dataclass(frozen=True)
class FeatureMap:
    """Features of n images at one tap, timestep and guidance scale.

    Args:
        tap (`str`): Name of the tap.
        timestep (`int`): Noise level in 0..999.
        guidance_scale (`float`): Scale s of X_u + s (X_c - X_u) (S3, equation 1).
        values (`torch.Tensor` of shape `(n, height, width, channels)`): At the tap's own resolution.
    """

    tap: str
    timestep: int
    guidance_scale: float
    values: torch.Tensor

    @property
    def key(self) -> FeatureKey:
        """Tap, timestep and guidance scale."""
        return self.tap, self.timestep, self.guidance_scale


def available_taps(tower: SDLlavaDiffusionModel) -> list[Tap]:
    """The taps that a tower can read, in the order of its forward pass: all of them unless it is truncated."""
    taps = tower.config.all_taps()
    if not tower.config.truncate:
        return taps
    return taps[: max(taps.index(tap) for tap in tower.taps) + 1]


def choose_taps(tower: SDLlavaDiffusionModel, names: Sequence[str] | None = None) -> list[Tap]:
    """Look tap names up in a tower.

    Args:
        tower: The diffusion model.
        names: Tap names. Default: the configured ones.

    Raises:
        ValueError: A name does not exist in this tower, or its module was truncated.
    """
    if names is None:
        return list(tower.taps)
    taps = resolve_taps(names, tower.config.all_taps())
    available = available_taps(tower)
    for tap in taps:
        if tap not in available:
            raise ValueError(
                f"Tap {tap.name!r} comes after {available[-1].name!r}, the last tap of this truncated model. Load the "
                "published diffusion model, which is whole."
            )
    return taps


def reconfigure(
    tower: SDLlavaDiffusionModel,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> SDLlavaDiffusionModel:
    """A tower with the same weights that reads other taps, timesteps and guidance scales.

    Weights are shared and `tower` is not modified. Several taps, timesteps and scales are concatenated on channels
    (`ensemble="concat"`).

    Args:
        tower: The diffusion model.
        taps: Tap names. Default: the configured ones.
        timesteps: Noise levels in 0..999. Default: the configured ones.
        guidance_scales: Default: the configured ones.

    Raises:
        ValueError: A tap cannot be read, or a timestep is outside the training schedule.
    """
    fields = tower.config.to_dict()
    fields |= {"ensemble": "concat", "truncate": False, "taps": [tap.name for tap in choose_taps(tower, taps)]}
    if timesteps is not None:
        fields["timesteps"] = list(timesteps)
    if guidance_scales is not None:
        fields["guidance_scales"] = list(guidance_scales)
    config = type(tower.config).from_dict(fields)
    with torch.device("meta"):
        reader = type(tower)(config)
    reader.backbone = tower.backbone
    return reader.eval()


@torch.no_grad()
def read_features(
    tower: SDLlavaDiffusionModel,
    latents: torch.Tensor,
    prompts: Prompts | None = None,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> Iterator[FeatureMap]:
    """Features at every tap, timestep and guidance scale. One pass per timestep gives all taps and both prompts.

    Args:
        tower: The diffusion model.
        latents (`torch.Tensor` of shape `(n, 4, h, w)`): From `tower.encode_latents`.
        prompts: From `tower.encode_prompts`, one per image. None for the empty prompt.
        taps: Tap names. Default: the configured ones.
        timesteps: Noise levels in 0..999. Default: the configured ones.
        guidance_scales: Scales s of X_u + s (X_c - X_u) (S3, equation 1). Default: the configured ones, 0 without
            prompts.

    Yields:
        [`FeatureMap`]: Ordered by timestep, then tap, then guidance scale.

    Raises:
        ValueError: A tap cannot be read, a timestep is outside the training schedule, or a scale needs prompts.
    """
    chosen = choose_taps(tower, taps)
    scales = _choose_scales(tower, prompts, guidance_scales)
    halves = []
    if any(scale != 1 for scale in scales):
        halves.append({name: x.expand(len(latents), *x.shape[1:]) for name, x in tower.null_prompt().items()})
    if prompts is not None and any(scale != 0 for scale in scales):
        halves.append(prompts)
    joined = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    noise = tower.noise(latents)
    for timestep in tower.config.timesteps or [] if timesteps is None else timesteps:
        _check_timestep(tower, timestep)
        noisy = tower.denoiser_input(latents, timestep, noise)
        for tap, read in zip(chosen, tower.backbone.read(noisy, timestep, joined, chosen), strict=True):
            parts = _as_map(read).chunk(len(halves))
            for scale in scales:
                yield FeatureMap(tap.name, timestep, scale, guide(parts[0], parts[-1], scale))


def _choose_scales(
    tower: SDLlavaDiffusionModel, prompts: Prompts | None, guidance_scales: Sequence[float] | None
) -> list[float]:
    if guidance_scales is None:
        guidance_scales = [0.0] if prompts is None else tower.config.guidance_scales or []
    if prompts is None and any(scale != 0 for scale in guidance_scales):
        raise ValueError(
            f"Guidance scales {list(guidance_scales)} need a question. Give one, or use scale 0, the empty prompt."
        )
    return [float(scale) for scale in guidance_scales]


def _check_timestep(tower: SDLlavaDiffusionModel, timestep: int) -> None:
    last = tower.config.family.train_timesteps(tower.config.part_configs) - 1
    if not 0 <= timestep <= last:
        raise ValueError(f"Timestep {timestep} is outside the training schedule. Use a value in 0..{last}.")


def _as_map(read: torch.Tensor) -> torch.Tensor:
    """`(n, c, h, w)` or `(n, h * w, c)` as `(n, h, w, c)`."""
    if read.ndim == 4:
        return read.permute(0, 2, 3, 1)
    return read.unflatten(1, (isqrt(read.shape[1]), -1))
