"""Running a denoiser of stock modules up to its taps by hooks, and cutting what comes after them."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .backbone import DiffusionBackbone, Prompts
from .repositories import missing, refuse_pickle, split_revision
from .taps import Tap
from .unet_pass import cut_away, modules_up_to_taps, reading_taps, share_rows

_NEEDED_MODULES: dict[tuple[str, tuple[Tap, ...]], frozenset[str]] = {}
"""Paths of the modules that run up to the taps, by a denoiser's configuration; a pass on the meta device finds them."""


class HookedBackbone(DiffusionBackbone):
    """A denoiser whose taps are modules of its own."""

    @abstractmethod
    def _load_denoiser(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        """Replace the denoiser by the published one; `options` are those of `from_pretrained`."""

    @abstractmethod
    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        """Replace the text encoders by the published ones; `options` are those of `from_pretrained`."""

    def _load_image_encoder(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        """Replace the image encoder, where there is one; `options` are those of `from_pretrained`."""

    def _cut_decoder(self) -> None:
        """Remove the image decoder, where there is one."""

    @abstractmethod
    def _build_denoiser(self) -> nn.Module:
        """A denoiser with initial weights."""

    @abstractmethod
    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        """Small latents and one prompt, uninitialised: what `cut` runs the denoiser on."""

    def load_published(self, source: str, dtype: torch.dtype) -> None:
        """Replace the modules by those with the published weights.

        Raises:
            OSError: A part cannot be read.
            ValueError: The weights are pickles.
        """
        where = split_revision(source)
        options = {"use_safetensors": True, **where}
        try:
            self._load_denoiser(dtype, options)
            self._load_image_encoder(dtype, options)
            self._load_text_encoders(dtype, options)
        except OSError as error:
            refuse_pickle(source, error)
            raise missing(source, "diffusion model's safetensors weights", error) from error

    @property
    def prompt_weight(self) -> torch.Tensor:
        """The first text encoder's token embeddings."""
        encoder: Any = self.text_encoder
        return encoder.get_input_embeddings().weight

    def read(self, latents: torch.Tensor, timestep: int, prompts: Prompts, taps: Sequence[Tap]) -> list[torch.Tensor]:
        """As `DiffusionBackbone.read`.

        What the denoiser computes before any prompt reaches it is computed once for all blocks of prompts, unless
        gradients are recorded.
        """
        denoiser = self.denoiser
        blocks = len(prompts["encoder_hidden_states"]) // len(latents)
        modules = self.modules_before_prompts(denoiser) if blocks > 1 and not torch.is_grad_enabled() else []
        with share_rows(modules, len(latents), blocks), reading_taps(denoiser, taps) as read:
            self.denoise(denoiser, latents.repeat(blocks, 1, 1, 1), timestep, prompts)
        return read

    def cut(self, taps: Sequence[Tap]) -> None:
        """Remove what comes after the last tap in the denoiser, and the VAE's decoder."""
        denoiser: Any = self.denoiser
        config = json.dumps(published(denoiser.config), sort_keys=True, default=str)  # without where it was read
        key = (f"{type(denoiser).__name__} {config}", tuple(taps))
        if key not in _NEEDED_MODULES:
            with torch.device("meta"):
                running = self._build_denoiser()
                latents, prompts = self._example_inputs()
            with modules_up_to_taps(running, taps) as needed:
                self.denoise(running, latents, 0, prompts)
            _NEEDED_MODULES[key] = frozenset(needed)
        cut_away(denoiser, _NEEDED_MODULES[key])
        self._cut_decoder()


def as_dict(config: dict[str, Any] | None) -> dict[str, Any]:
    """A configuration as a dictionary of its own; None is an empty one."""
    return dict(config or {})


def published(config: dict[str, Any]) -> dict[str, Any]:
    """A published configuration without the fields of the library that wrote it."""
    return {name: value for name, value in config.items() if not name.startswith("_")}
