"""The noise that is added to latents, and how much of it: x_t = signal z0 + noise eps."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler


def draw_noise(latents: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
    """Standard normal noise for latents, drawn on the CPU in float32, so that it does not depend on device or batch.

    Args:
        latents (`torch.Tensor` of shape `(n, channels, h, w)`): Gives shape and device.
        seeds: One for all latents, or one per latent.

    Returns:
        `torch.FloatTensor` of the latents' shape.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = tuple(latents.shape[1:])
    maps = [torch.randn(shape, generator=g, device="cpu", dtype=torch.float32) for g in generators]
    return torch.stack(maps).to(latents.device, non_blocking=latents.is_cuda).expand_as(latents)


def ddpm_rates(scheduler_config: dict[str, Any]) -> list[tuple[float, float]]:
    """Signal and noise rates of a DDPM training schedule, by timestep: sqrt(abar_t) and sqrt(1 - abar_t).

    Args:
        scheduler_config: The published configuration of the scheduler.

    Raises:
        ValueError: It has no schedule of betas, as those of EDM and of flow matching.
    """
    if not {"beta_schedule", "trained_betas"} & scheduler_config.keys():
        raise ValueError(
            f"The scheduler's configuration has no schedule of betas; it has {', '.join(sorted(scheduler_config))}. "
            "Use a diffusion model of this architecture that was trained as a DDPM."
        )
    with torch.device("cpu"):
        alphas_cumprod = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
    return list(zip((alphas_cumprod**0.5).tolist(), ((1 - alphas_cumprod) ** 0.5).tolist(), strict=True))
