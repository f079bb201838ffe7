"""Reading a tower anywhere: other taps, timesteps and guidance scales than the configured ones, in one forward each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch

from ..diffusion import SDLlavaDiffusionModel, guide
from ..taps import Tap, list_taps, resolve_taps


@dataclass(frozen=True)
class FeatureMap:
    """Features of n images at one place.

    Args:
        tap (`str`), timestep (`int`, 0..999), guidance_scale (`float`): where, and how it was asked.
        values (`torch.Tensor` of shape `(n, height, width, channels)`): at the tap's own resolution.
    """

    tap: str
    timestep: int
    guidance_scale: float
    values: torch.Tensor

    @property
    def key(self) -> tuple[str, int, float]:
        return self.tap, self.timestep, self.guidance_scale


def reachable_taps(tower: SDLlavaDiffusionModel) -> list[Tap]:
    """The taps that a tower can read, in the order of the forward pass: all of them unless it is cut."""
    taps = list_taps(tower.config.unet_config, tower.config.latent_size)
    if not tower.config.truncate:
        return taps
    return taps[: max(taps.index(tap) for tap in tower.taps) + 1]


def choose_taps(tower: SDLlavaDiffusionModel, names: Sequence[str] | None = None) -> list[Tap]:
    """Taps by name; default the configured ones.

    Raises:
        ValueError: a name does not exist in this UNet, or what it names was cut away.
    """
    if names is None:
        return list(tower.taps)
    taps = resolve_taps(names, tower.config.unet_config, tower.config.latent_size)
    reachable = reachable_taps(tower)
    for tap in taps:
        if tap not in reachable:
            raise ValueError(
                f"{tap.name} lies behind the cut of this model, whose last tap is {reachable[-1].name}: load the "
                "diffusion model that it was made of, which is whole"
            )
    return taps


def read_elsewhere(
    tower: SDLlavaDiffusionModel,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> SDLlavaDiffusionModel:
    """The same diffusion model, read at other places. Weights are shared and `tower` stays as it is.

    Several taps, timesteps and scales come side by side on channels (`ensemble="concat"`).
    """
    config = type(tower.config).from_dict(
        {
            **tower.config.to_dict(),
            "ensemble": "concat",
            "truncate": False,
            "taps": [tap.name for tap in choose_taps(tower, taps)],
            "timesteps": list(timesteps or tower.config.timesteps),
            "guidance_scales": list(tower.config.guidance_scales if guidance_scales is None else guidance_scales),
        }
    )
    with torch.device("meta"):
        reader = type(tower)(config)
    reader.backbone = tower.backbone
    return reader.eval()


@torch.no_grad()
def read_features(
    tower: SDLlavaDiffusionModel,
    latents: torch.Tensor,
    prompts: dict[str, torch.Tensor] | None = None,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> Iterator[FeatureMap]:
    """Features at every tap, timestep and guidance scale; all taps and both prompts of a timestep in one forward.

    Args:
        latents (`torch.Tensor` of shape `(n, 4, h, w)`): from `tower.encode_latents`.
        prompts: from `tower.encode_prompts`, n of them; None for the empty prompt.
        taps, timesteps: default the configured ones.
        guidance_scales: `s` of X_u + s (X_c - X_u) (S3, equation 1); default the configured ones, 0 without a prompt.

    Yields:
        [`FeatureMap`], timestep by timestep, within it tap by tap, within it scale by scale.
    """
    places = choose_taps(tower, taps)
    scales = _scales(tower, prompts, guidance_scales)
    null = {name: x.expand(len(latents), *x.shape[1:]) for name, x in tower.null_prompt().items()}
    wanted = {"unconditional": any(s != 1 for s in scales), "conditional": any(s != 0 for s in scales)}
    halves = [half for half, name in ((null, "unconditional"), (prompts, "conditional")) if wanted[name]]
    joined = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
    noise = tower.noise(latents)
    for timestep in tower.config.timesteps if timesteps is None else timesteps:
        _check_timestep(tower, timestep)
        noisy = tower.add_noise(latents, timestep, noise)
        for tap, read in zip(places, tower.backbone.read(noisy, timestep, joined, places)):
            parts: list[Any] = list(_as_map(read).chunk(len(halves)))
            unconditional, conditional = parts if len(parts) == 2 else (parts * 2)
            for scale in scales:
                yield FeatureMap(tap.name, timestep, scale, guide(unconditional, conditional, scale))


def _scales(tower, prompts, guidance_scales) -> list[float]:
    if guidance_scales is None:
        guidance_scales = [0.0] if prompts is None else tower.config.guidance_scales
    if prompts is None and any(scale != 0 for scale in guidance_scales):
        raise ValueError(f"guidance scales {list(guidance_scales)} need a question: without one, only 0 has a meaning")
    return [float(scale) for scale in guidance_scales]


def _check_timestep(tower: SDLlavaDiffusionModel, timestep: int) -> None:
    last = len(tower._signal_rates) - 1
    if not 0 <= timestep <= last:
        raise ValueError(f"timestep {timestep} is outside the training schedule: give a value in 0..{last}")


def _as_map(read: torch.Tensor) -> torch.Tensor:
    """`(n, c, h, w)` or `(n, h * w, c)` as `(n, h, w, c)`."""
    if read.ndim == 4:
        return read.permute(0, 2, 3, 1)
    return read.unflatten(1, (isqrt(read.shape[1]), -1))
