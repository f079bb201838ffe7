"""The small VAE: 64x64 pixels to 32x32 latents with 4 channels."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from sdllava.scenes.render import SIZE
from sdllava.scenes.world import sample_scene

from .images import to_pixels
from .loop import scene_numbers

_CROP = 32
_KL_WEIGHT = 1e-4


class VaePart:
    """Trains the VAE on random crops. A step on whole images costs four times as much and is not better.

    Args:
        channels: Channels of each stage, multiples of 8.
        seed: Selects the scenes.
    """

    name = "vae"

    def __init__(self, channels: tuple[int, ...], seed: int = 0):
        self.seed = seed
        stages = len(channels)
        self.model = AutoencoderKL(
            block_out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * stages,
            up_block_types=("UpDecoderBlock2D",) * stages,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=SIZE,
        )

    def loss(self, step: int, batch_size: int) -> Tensor:
        """Squared error and KL divergence on crops of this step's scenes."""
        pixels = to_pixels([sample_scene("train", number) for number in scene_numbers(self.seed, step, batch_size)])
        top, left = torch.randint(0, SIZE - _CROP + 1, (2, batch_size))
        crops = [p[:, y : y + _CROP, x : x + _CROP] for p, y, x in zip(pixels, top, left, strict=True)]
        pixels = torch.stack(crops).to(self.model.device)
        posterior = self.model.encode(pixels).latent_dist
        decoded = self.model.decode(posterior.sample()).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return torch.nn.functional.mse_loss(decoded, pixels) + _KL_WEIGHT * kl

    @torch.no_grad()
    def check(self, count: int) -> dict[str, float]:
        """The peak signal-to-noise ratio of whole held-out scenes, in dB, decoded from the posterior's mode."""
        pixels = to_pixels([sample_scene("validation", number) for number in range(count)]).to(self.model.device)
        decoded = self.model.decode(self.model.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
        error = (decoded - pixels).square().mean(dim=(1, 2, 3))
        return {"psnr": (10 * torch.log10(4.0 / error)).mean().item()}

    @torch.no_grad()
    def scaling_factor(self, count: int = 256) -> float:
        """The inverse of the latents' standard deviation, which scales them to unit variance."""
        pixels = to_pixels([sample_scene("train", number) for number in range(count)]).to(self.model.device)
        return 1.0 / self.model.encode(pixels).latent_dist.mode().std().item()

    def write(self, folder: str | Path) -> None:
        """Write `diffusion/vae/` in diffusers' layout."""
        self.model.register_to_config(scaling_factor=self.scaling_factor())
        self.model.save_pretrained(Path(folder) / "diffusion" / "vae")
