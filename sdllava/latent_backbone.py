"""What backbones of latent diffusion models share: the VAE, and running a denoiser up to its taps."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from huggingface_hub.errors import HFValidationError
from torch import nn

from .backbone import DiffusionBackbone, Prompts, dtype_of, without_autocast
from .configuration import SDLlavaDiffusionConfig
from .families import is_tiny_vae
from .repositories import missing, refuse_pickle, split_revision
from .taps import Tap
from .unet_pass import CompiledPass, CutAway, cut_away, modules_up_to_taps, read_taps, share_rows

_NEEDED_MODULES: dict[tuple[str, tuple[Tap, ...]], frozenset[str]] = {}
"""Paths of the modules that run up to the taps, by a denoiser's configuration; a pass on the meta device finds them."""


class LatentBackbone(DiffusionBackbone):
    """A denoiser on the latents of `vae`, an `AutoencoderKL` or an `AutoencoderTiny`."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        vae_class = AutoencoderTiny if self._has_tiny_vae else AutoencoderKL
        self.vae = vae_class.from_config(as_dict(config.vae_config))

    @abstractmethod
    def _load_denoiser(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        """Replace the denoiser by the published one; `options` are those of `from_pretrained`."""

    @abstractmethod
    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        """Replace the text encoders by the published ones; `options` are those of `from_pretrained`."""

    @abstractmethod
    def _build_denoiser(self) -> nn.Module:
        """A denoiser with initial weights."""

    @abstractmethod
    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        """Small latents and one prompt, uninitialised: what `cut` runs the denoiser on."""

    def _modules_before_prompts(self, denoiser: nn.Module) -> list[nn.Module]:
        """Modules whose result no prompt has reached yet."""
        return []

    def load_published(self, source: str, dtype: torch.dtype) -> None:
        """Replace the modules by those with the published weights; the VAE stays in float32 where configured.

        Raises:
            OSError: A part cannot be read.
            ValueError: The weights are pickles.
        """
        where = split_revision(source)
        vae_dtype = torch.float32 if self.config.vae_in_fp32 else dtype
        options = {"use_safetensors": True, **where}
        try:
            self._load_denoiser(dtype, options)
            self.vae = AutoencoderKL.from_pretrained(subfolder="vae", torch_dtype=vae_dtype, **options)
            self._load_text_encoders(dtype, options)
        except OSError as error:
            refuse_pickle(source, error)
            raise missing(source, "diffusion model's safetensors weights", error) from error

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
    def prompt_weight(self) -> torch.Tensor:
        """The first text encoder's token embeddings."""
        encoder: Any = self.text_encoder
        return encoder.get_input_embeddings().weight

    @property
    def image_weight(self) -> torch.Tensor:
        """The VAE's first weight."""
        return next(self.vae.parameters())

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

    def read(self, latents: torch.Tensor, timestep: int, prompts: Prompts, taps: Sequence[Tap]) -> list[torch.Tensor]:
        """As `DiffusionBackbone.read`.

        What the denoiser computes before any prompt reaches it is computed once for all blocks of prompts, unless
        gradients are recorded.
        """
        denoiser = self.denoiser
        blocks = len(prompts["encoder_hidden_states"]) // len(latents)
        modules = self._modules_before_prompts(denoiser) if blocks > 1 and not torch.is_grad_enabled() else []
        with share_rows(modules, len(latents), blocks):
            repeated = latents.repeat(blocks, 1, 1, 1)
            return read_taps(denoiser, taps, lambda: self.denoise(denoiser, repeated, timestep, prompts))

    def compile_pass(self, taps: Sequence[Tap], **options: Any) -> CompiledPass:
        """A compiled form of `read` for these taps, with `options` of `torch.compile`."""
        return CompiledPass(self.denoiser, taps, self.denoise, self._modules_before_prompts, **options)

    def cut(self, taps: Sequence[Tap]) -> None:
        """Remove what comes after the last tap in the denoiser, and the VAE's decoder."""
        denoiser: Any = self.denoiser
        config = json.dumps(published(denoiser.config), sort_keys=True, default=str)  # without where it was read
        key = (f"{type(denoiser).__name__} {config}", tuple(taps))
        if key not in _NEEDED_MODULES:
            with torch.device("meta"):
                running = self._build_denoiser()
                latents, prompts = self._example_inputs()
            _NEEDED_MODULES[key] = modules_up_to_taps(running, taps, lambda: self.denoise(running, latents, 0, prompts))
        cut_away(denoiser, _NEEDED_MODULES[key])
        self._cut_decoder()

    def _cut_decoder(self) -> None:
        self.vae.decoder = CutAway(self.vae.decoder)
        if getattr(self.vae, "post_quant_conv", None) is not None:
            self.vae.post_quant_conv = CutAway(self.vae.post_quant_conv)


def as_dict(config: dict[str, Any] | None) -> dict[str, Any]:
    """A configuration as a dictionary of its own; None is an empty one."""
    return dict(config or {})


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A published configuration without the fields of the library that wrote it."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
