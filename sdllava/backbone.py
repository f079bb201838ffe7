"""The interface between the diffusion tower and a family of text-to-image models.

A backbone turns pixels into latents, prompts into conditioning, and noisy latents into what its taps read. The tower
(`diffusion.py`) adds noise, guidance and ensembles, and does not know the family.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .diffusion_configuration import SDLlavaDiffusionConfig
from .taps import Tap

Prompts = dict[str, torch.Tensor]
"""What a denoiser is conditioned on: tensors whose first dimension counts prompts. `encoder_hidden_states` is
`(n, tokens, prompt_width)`, `encoder_attention_mask`, where there is one, `(n, tokens)`."""


@dataclass(frozen=True)
class PublishedDiffusion:
    """A published diffusion model before its weights are read: the tower's configuration and the tokenizers."""

    source: str
    config: SDLlavaDiffusionConfig
    tokenizers: list[PreTrainedTokenizerBase]


class DiffusionBackbone(nn.Module, ABC):
    """Stock diffusers and transformers modules of one diffusion model, under their published names.

    Args:
        config: Describes the parts.
    """

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__()
        self.config = config

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """The weights that parts of transformers share, as `PreTrainedModel.post_init` collects them from children."""
        tied = {name: getattr(module, "all_tied_weights_keys", {}) for name, module in self.named_children()}
        return {f"{part}.{key}": f"{part}.{source}" for part, keys in tied.items() for key, source in keys.items()}

    @property
    def _keep_in_fp32_modules(self) -> set[str]:
        """Modules of the parts that stay in float32 in a model loaded in float16; collected in the same way."""
        return self._names_of_parts("_keep_in_fp32_modules")

    @property
    def _no_split_modules(self) -> set[str]:
        """Modules of the parts that stay on one device with a `device_map`; collected in the same way."""
        return self._names_of_parts("_no_split_modules")

    def _names_of_parts(self, attribute: str) -> set[str]:
        return {name for module in self.children() for name in getattr(module, attribute, None) or ()}

    @classmethod
    @abstractmethod
    def read_part_configs(cls, source: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
        """Read and check the parts of a published repository or folder, without weights.

        Args:
            source: Repository id, `id@revision` or local folder.

        Returns:
            The fields of `SDLlavaDiffusionConfig` that describe the parts, and the tokenizers.

        Raises:
            OSError: A part cannot be read.
            ValueError: The parts do not fit together.
        """

    @abstractmethod
    def load_published(self, source: str, dtype: torch.dtype) -> None:
        """Replace the modules by those with the published weights, safetensors only.

        Args:
            source: As for `read_part_configs`.
            dtype: Of the weights; the image encoder's stay in float32 where the configuration says so.

        Raises:
            OSError: A part cannot be read.
            ValueError: The weights are pickles.
        """

    @property
    @abstractmethod
    def denoiser(self) -> nn.Module:
        """The module in which taps are paths."""

    @property
    @abstractmethod
    def prompt_weight(self) -> torch.Tensor:
        """A weight of the text encoder: prompts stay valid as long as it does, on its device."""

    @property
    @abstractmethod
    def image_weight(self) -> torch.Tensor:
        """A weight of the image encoder: images are encoded on its device."""

    @abstractmethod
    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images deterministically.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, height, width)`): In [-1, 1].

        Returns:
            `torch.FloatTensor` of shape `(n, channels, h, w)`: The latents z0.
        """

    @abstractmethod
    def encode_prompts(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor | None = None,
        input_ids_3: torch.Tensor | None = None,
    ) -> Prompts:
        """Encode prompts.

        Args:
            input_ids (`torch.LongTensor` of shape `(n, tokens)`): Padded as the first tokenizer pads.
            input_ids_2, input_ids_3 (`torch.LongTensor` of shape `(n, tokens)`, *optional*): Padded as the second and
                third tokenizer pad.

        Raises:
            ValueError: The family has more tokenizers than were given ids.
        """

    @abstractmethod
    def noise_rates(self, timestep: int) -> tuple[float, float]:
        """The factors of signal and noise in x_t, for a timestep of the training schedule."""

    @abstractmethod
    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a denoiser of this family, in its own dtype.

        Args:
            denoiser: `self.denoiser`, or a module of the same structure.
            latents (`torch.Tensor` of shape `(n, channels, h, w)`): Noisy latents x_t.
            timestep (`int`, or integer tensor without dimensions): 0..999.
            prompts: n of them, from `encode_prompts`.
        """

    @abstractmethod
    def read(self, latents: torch.Tensor, timestep: int, prompts: Prompts, taps: Sequence[Tap]) -> list[torch.Tensor]:
        """Run the denoiser up to the last tap.

        Args:
            latents (`torch.Tensor` of shape `(n, channels, h, w)`): Noisy latents x_t.
            timestep (`int`): 0..999.
            prompts: From `encode_prompts`; k times n of them read each latent k times, in blocks of n.
            taps: Where to read.

        Returns:
            `list[torch.Tensor]`: Each tap's output for the k times n prompts, `(k * n, channels, h, w)` or
            `(k * n, h * w, channels)`, as the module returns it.
        """

    def predict(self, latents: torch.Tensor, timestep: int, prompts: Prompts) -> torch.Tensor:
        """Run the whole denoiser; `prediction_target` is what it was trained to return.

        Args:
            latents (`torch.Tensor` of shape `(n, channels, h, w)`): Noisy latents x_t.
            timestep (`int`): 0..999.
            prompts: n of them, from `encode_prompts`.

        Returns:
            `torch.FloatTensor` of shape `(n, channels, h, w)`, without a learned variance.
        """
        output = self.denoise(self.denoiser, latents, timestep, prompts)
        return output.sample[:, : latents.shape[1]].float()

    def prediction_target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int) -> torch.Tensor:
        """What `predict` was trained to return: by default noise, velocity or latents, as the scheduler says.

        Args:
            latents (`torch.Tensor` of shape `(n, channels, h, w)`): z0.
            noise (`torch.Tensor` of that shape): What was added to them.
            timestep (`int`): 0..999.

        Raises:
            ValueError: The scheduler's prediction type is unknown.
        """
        kind = (self.config.scheduler_config or {}).get("prediction_type", "epsilon")
        signal, spread = self.noise_rates(timestep)
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return signal * noise - spread * latents
        if kind == "sample":
            return latents
        raise ValueError(f"Unknown prediction type {kind!r}. Use epsilon, v_prediction or sample.")

    def image_distribution(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the latents; the deviation is 0 for encoders that do not sample.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, height, width)`): In [-1, 1].

        Returns:
            Two `torch.FloatTensor` of shape `(n, channels, h, w)`; the mean equals `encode_image`.
        """
        latents = self.encode_image(pixel_values)
        return latents, torch.zeros_like(latents)

    def modules_before_prompts(self, denoiser: nn.Module) -> list[nn.Module]:
        """Modules of a denoiser of this family whose results no prompt has reached yet."""
        return []

    def load_tiny_vae(self, source: str) -> dict[str, Any]:
        """Replace the VAE by a tiny autoencoder, cut as the VAE was; returns its configuration, for `vae_config`.

        Args:
            source: Repository id, `id@revision` or folder of a diffusers `AutoencoderTiny`.

        Raises:
            OSError: It cannot be read.
            ValueError: This family has no VAE, its latents do not fit the denoiser, or its weights are pickles.
        """
        raise ValueError(f"{source!r} cannot be used: the family {self.config.family.name!r} has no VAE to replace.")

    def compute_buffers(self, module: nn.Module) -> None:
        """Compute a module's buffers that no checkpoint holds, such as fixed position embeddings, in place.

        Args:
            module: Any module of this backbone.
        """

    @abstractmethod
    def cut(self, taps: Sequence[Tap]) -> None:
        """Remove what comes after the last tap, and the image decoder."""


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context without automatic casting on a device; the meta device has none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def first_weight(module: nn.Module) -> torch.Tensor:
    """A module's first parameter. Training with DeepSpeed holds the VAE's as buffers."""
    return next(chain(module.parameters(), module.buffers()))


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first weight; diffusers' own `dtype` walks through all modules at each call."""
    return first_weight(module).dtype
