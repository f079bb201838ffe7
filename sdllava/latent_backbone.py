"""What backbones of latent diffusion models share: the VAE."""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import HFValidationError

from .backbone import dtype_of, first_weight, without_autocast
from .diffusion_configuration import SDLlavaDiffusionConfig
from .families import is_tiny_vae
from .hooked_backbone import HookedBackbone, as_dict, published
from .repositories import missing, refuse_pickle, split_revision
from .unet_pass import CutAway


class LatentBackbone(HookedBackbone):
    """A denoiser on the latents of `vae`, an `AutoencoderKL` or an `AutoencoderTiny`."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        vae_class = AutoencoderTiny if self._has_tiny_vae else AutoencoderKL
        self.vae = vae_class.from_config(as_dict(config.vae_config))

    def _load_image_encoder(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        vae_dtype = torch.float32 if self.config.vae_in_fp32 else dtype
        self.vae = AutoencoderKL.from_pretrained(subfolder="vae", torch_dtype=vae_dtype, **options)

    def load_tiny_vae(self, source: str) -> dict[str, Any]:
        """As `DiffusionBackbone.load_tiny_vae`."""
        where = split_revision(source)
        device, dtype = self.image_weight.device, self.image_weight.dtype
        try:
            found = published(AutoencoderTiny.load_config(**where))
            if not is_tiny_vae(found):
                raise ValueError(
                    f"{source!r} is not a tiny autoencoder. Give a diffusers AutoencoderTiny, such as TAESD."
                )
            family, parts = self.config.family, self.config.part_configs
            own = (family.latent_channels(parts), family.latent_scale(parts))
            channels, scale = found["latent_channels"], family.latent_scale({**parts, "vae_config": found})
            if (channels, scale) != own:
                raise ValueError(
                    f"{source!r} makes latents of {channels} channels at 1/{scale} of an image's size, which this UNet "
                    "does not take. Give one that was made for this diffusion model."
                )
            vae = AutoencoderTiny.from_pretrained(use_safetensors=True, torch_dtype=dtype, **where)
        except (OSError, HFValidationError) as error:
            refuse_pickle(source, error)
            raise missing(source, "tiny autoencoder", error) from error
        found.pop("block_out_channels", None)  # diffusers writes it and does not read it
        self.vae, self.config.vae_config = vae.to(device), found
        if self.config.truncate:
            self._cut_decoder()
        return found

    @property
    def image_weight(self) -> torch.Tensor:
        """The VAE's first weight."""
        return first_weight(self.vae)

    @property
    def _has_tiny_vae(self) -> bool:
        return is_tiny_vae(as_dict(self.config.vae_config))

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The mode of the VAE's posterior, shifted and scaled; a tiny autoencoder, without posterior, gives its output.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, height, width)`): In [-1, 1].

        Returns:
            `torch.FloatTensor` of shape `(n, channels, height / 8, width / 8)`: The latents z0.
        """
        return self.image_distribution(pixel_values)[0]

    def image_distribution(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `DiffusionBackbone.image_distribution`: of the VAE's posterior, 0 for a tiny autoencoder."""
        with without_autocast(pixel_values.device):
            pixels = pixel_values.to(dtype_of(self.vae))
            if pixels.device.type == "cpu" and pixels.dtype == torch.float32:
                pixels = pixels.contiguous(memory_format=torch.channels_last)  # measured to be faster there
            encoded = self.vae.encode(pixels)
        scale = self.vae.config.scaling_factor
        if self._has_tiny_vae:
            mean = (encoded.latents * scale).float()
            return mean, torch.zeros_like(mean)
        mean = encoded.latent_dist.mode()
        shift = self.vae.config.get("shift_factor")
        if shift is not None:
            mean = mean - shift
        return (mean * scale).float(), (encoded.latent_dist.std * scale).float()

    def _cut_decoder(self) -> None:
        self.vae.decoder = CutAway(self.vae.decoder)
        if getattr(self.vae, "post_quant_conv", None) is not None:
            self.vae.post_quant_conv = CutAway(self.vae.post_quant_conv)
