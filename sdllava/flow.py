"""Rectified flow (arXiv 2209.03003), the noising of Stable Diffusion 3 and FLUX: x = (1 - sigma) x0 + sigma eps."""

import torch

from .latent_backbone import LatentBackbone


class FlowBackbone(LatentBackbone):
    """Timestep t means sigma = t / 1000, whatever shift the published scheduler has.

    A shift only changes which noise levels a sampler visits, not what a noise level is.
    """

    def noise_rates(self, timestep: int) -> tuple[float, float]:
        """1 - sigma and sigma."""
        sigma = timestep / self.config.family.train_timesteps(self.config.part_configs)
        return 1 - sigma, sigma

    def prediction_target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """The velocity eps - x0."""
        return noise - latents

    def _timesteps(self, latents: torch.Tensor, timestep: int | torch.Tensor) -> torch.Tensor:
        """A timestep for each of n latents, in float32, so that half precision does not round it."""
        if isinstance(timestep, torch.Tensor):
            return timestep.float().expand(len(latents))
        return torch.full((len(latents),), float(timestep), device=latents.device)
