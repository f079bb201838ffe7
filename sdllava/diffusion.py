"""The diffusion tower: a frozen text-to-image model as a question-conditioned vision encoder (S3, sections 3 and 4)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers.utils import ModelOutput

from .attention_maps import (
    AttentionCapture,
    AttentionMaps,
    ConceptCapture,
    attention_layers,
    choose_layers,
    concept_layers,
)
from .backbone import Prompts, PublishedDiffusion, without_autocast
from .backbones import read_published
from .compiled_pass import CompiledPass
from .configuration import SDLlavaDiffusionConfig
from .frozen_diffusion import FrozenDiffusionModel
from .grids import as_map, resize_grid
from .guidance import guide
from .noise import draw_noise
from .repositories import as_dtype


@dataclass
class SDLlavaDiffusionOutput(ModelOutput):
    """Features of a call.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(n, grid_size ** 2, hidden_size)`): Guided and ensembled.
        unconditional_features, conditional_features (`torch.FloatTensor` of shape `(n, grid_size ** 2, channels)`):
            The features of the empty and of the given prompt, taps and timesteps on channels; None where no guidance
            scale needs them.
    """

    last_hidden_state: torch.Tensor | None = None
    unconditional_features: torch.Tensor | None = None
    conditional_features: torch.Tensor | None = None


class SDLlavaDiffusionModel(FrozenDiffusionModel):
    """Conditions a frozen diffusion model on a prompt and reads its features.

    The image is encoded to latents and noised; the denoiser runs up to the taps; guidance, ensemble and grid follow.
    The parts are stock modules under `backbone`, for Stable Diffusion `unet`, `vae`, `text_encoder` (and
    `text_encoder_2`).
    """

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self._null_prompt: tuple[Any, Prompts] | None = None
        self._compiled_pass: CompiledPass | None = None
        self._captures: list[AttentionCapture] = []

    @classmethod
    def from_component_pretrained(
        cls,
        diffusion: str,
        truncate: bool = False,
        dtype: torch.dtype | str = torch.float32,
        **config: Any,
    ) -> Self:
        """Load a published diffusers repository or folder as a tower.

        Args:
            diffusion (`str`): Repository id, `id@revision`, or local folder in the diffusers layout, with safetensors.
            truncate (`bool`): Cut away what comes after the last tap.
            dtype (`torch.dtype` or `str`): Of the weights; the VAE stays in float32 unless `vae_in_fp32=False`.
            config: Fields of [`SDLlavaDiffusionConfig`].

        Raises:
            OSError: A part cannot be read.
            ValueError: The parts do not fit together, a field does not fit them, or the weights are pickles.
        """
        return cls.from_published(read_published(diffusion, truncate=truncate, **config), dtype)

    @classmethod
    def from_published(cls, published: PublishedDiffusion, dtype: torch.dtype | str = torch.float32) -> Self:
        """Load a published diffusion model whose configuration has been read.

        Args:
            published: From `read_published` or `read_whole`.
            dtype (`torch.dtype` or `str`): Of the weights; the VAE stays in float32 where the configuration says so.

        Raises:
            OSError: A part cannot be read.
            ValueError: The weights are pickles.
        """
        with torch.device("meta"):
            tower = cls(published.config)
        return tower.load_published(published.source, as_dtype(dtype))

    def compile_pass(self, **options: Any) -> None:
        """Compile the denoiser's pass up to the taps, for calls that record no gradients.

        The first call on inputs of another shape takes a minute or more and logs it. Call this where the tower is on
        the device on which it stays.

        Args:
            options: Of `torch.compile`; `mode="reduce-overhead"` uses CUDA graphs on a GPU.
        """
        self._compiled_pass = CompiledPass(self.backbone, self.taps, **options)

    @torch.no_grad()
    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Latents z0 of images `(n, 3, height, width)` in [-1, 1]: `(n, channels, h, w)`, float32."""
        device = self.backbone.image_weight.device
        return self.backbone.encode_image(pixel_values if device.type == "meta" else pixel_values.to(device))

    @torch.no_grad()
    def encode_prompts(self, *input_ids: Any) -> Prompts:
        """Conditioning of n prompts, from token ids `(n, tokens)` of each tokenizer, without autocast.

        Guidance amplifies any difference in precision between them and the empty prompt. See
        `DiffusionBackbone.encode_prompts`.
        """
        with without_autocast(input_ids[0].device):
            return self.backbone.encode_prompts(*input_ids)

    @torch.compiler.disable
    def null_prompt(self, device: torch.device | str | None = None) -> Prompts:
        """Conditioning of the empty prompt, first dimension 1; computed once for the weights as they are.

        ZeRO-3 moves the weights at other times in each process, so there it is computed every time: a process that
        finds it stored would leave the others waiting for its part of the text encoder.

        Args:
            device: Where its token ids lie. Default: the text encoder's device.
        """
        weight = self.backbone.prompt_weight
        version = None if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device)
        if self._null_prompt is None or self._null_prompt[0] != key or hasattr(weight, "ds_id"):
            device = torch.device(device or weight.device)
            tensors = [torch.tensor([row], device=device) for row in self.config.null_prompt_ids]
            with torch.inference_mode(False):
                self._null_prompt = (key, self.encode_prompts(*tensors))
        return self._null_prompt[1]

    def noise(self, latents: torch.Tensor, noise_seed: torch.Tensor | None = None) -> torch.Tensor:
        """Standard normal noise for latents `(n, channels, h, w)`, drawn on the CPU in float32.

        One map for all of them from the configuration's seed, or one each from `noise_seed`, a `(n,)` integer tensor.
        """
        return draw_noise(latents, [self.config.noise_seed] if noise_seed is None else noise_seed.tolist())

    def add_noise(self, latents: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps on the training schedule, or the family's own rates."""
        signal_rate, noise_rate = self.backbone.noise_rates(timestep)
        return signal_rate * latents.float() + noise_rate * noise

    def denoiser_input(self, latents: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
        """What features are read from: x_t, or the latents themselves with `add_noise=False`."""
        return self.add_noise(latents, timestep, noise) if self.config.add_noise else latents.float()

    def extract(self, latents: torch.Tensor, prompts: Prompts, noise_seed: torch.Tensor | None = None) -> torch.Tensor:
        """Features of noisy latents under prompts, at every tap and timestep.

        Args:
            latents (`torch.Tensor` of shape `(n, channels, h, w)`): z0.
            prompts: From `encode_prompts`; k times n of them read each latent k times, in blocks of n.
            noise_seed (`torch.LongTensor` of shape `(n,)`, *optional*): See `noise`.

        Returns:
            `torch.Tensor` of shape `(k * n, grid_size ** 2, channels)`: Taps and timesteps on channels, tap first.
        """
        noise = self.noise(latents, noise_seed)
        by_tap: list[list[torch.Tensor]] = [[] for _ in self.taps]
        for timestep in self.config.timesteps:
            read = self._read(self.denoiser_input(latents, timestep, noise), timestep, prompts)
            for features, output in zip(by_tap, read, strict=True):
                maps = as_map(output) if output.ndim == 3 else output
                features.append(resize_grid(maps, self.config.grid_size))
        return torch.cat([features for tap in by_tap for features in tap], dim=-1)

    def _read(self, noisy: torch.Tensor, timestep: int, prompts: Prompts) -> list[torch.Tensor]:
        for capture in self._captures:
            capture.timestep = timestep
        if self._compiled_pass is None or self._captures or torch.is_grad_enabled():
            return self.backbone.read(noisy, timestep, prompts, self.taps)
        return self._compiled_pass(noisy, timestep, prompts)

    def attention_layers(self) -> list[str]:
        """The blocks whose attention to the prompt runs, up to the last tap, in order; e.g. `U-L1-R1-B0`."""
        return list(attention_layers(self.config.all_taps(), self.taps))

    @contextmanager
    def capture_attention(
        self, layers: Sequence[str] | None = None, per_head: bool = False, concepts: bool = False
    ) -> Iterator[AttentionMaps]:
        """Keep the probabilities of attention to the prompt of calls inside a context; outputs stay the same.

        Each call with a prompt replaces the maps of the call before. A compiled pass is not used meanwhile.

        ```python
        >>> with tower.capture_attention(layers=["U-L1-R1-B0"]) as maps:
        ...     model.generate(**inputs)
        >>> maps["U-L1-R1-B0", 50].shape  # (n, 1, 77, 16, 16)
        ```

        Args:
            layers: Transformer blocks, e.g. `["U-L1-R1-B0"]`. Default: all that run.
            per_head: Keep the heads of probabilities apart.
            concepts: Keep products of outputs instead of probabilities, see `ConceptCapture`.

        Raises:
            ValueError: A layer does not exist, or comes after the last tap, or no layer has concept maps.
            RuntimeError: A layer is compiled.
        """
        denoiser, known = self.backbone.denoiser, self.config.all_taps()
        found = concept_layers(denoiser, known, self.taps) if concepts else attention_layers(known, self.taps)
        chosen = choose_layers(found, layers)
        capture = ConceptCapture(denoiser, chosen) if concepts else AttentionCapture(denoiser, chosen, per_head)
        self._captures.append(capture)
        try:
            with capture.hooked():
                yield capture.maps
        finally:
            self._captures.remove(capture)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        input_ids_2: torch.Tensor | None = None,
        input_ids_3: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        unconditional_features: torch.Tensor | None = None,
        conditional_features: torch.Tensor | None = None,
        implicit_caption: torch.Tensor | None = None,
        noise_seed: torch.Tensor | None = None,
        guidance_scales: Sequence[float] | float | None = None,
    ) -> SDLlavaDiffusionOutput:
        """X = X_u + s (X_c - X_u) for each guidance scale s (S3, equation 1), ensembled.

        The unconditional half is skipped at s = 1 and where `unconditional_features` are given, the conditional half
        at s = 0, where `conditional_features` are given, and without a prompt, which makes X = X_u.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(n, 3, image_size, image_size)`): In [-1, 1]; not needed where
                `latents` or all features that the scales need are given.
            input_ids, input_ids_2, input_ids_3 (`torch.LongTensor` of shape `(n, tokens)`): The prompts, of as many
                tokenizers as the model has.
            latents (`torch.FloatTensor` of shape `(n, channels, h, w)`): z0 of the images.
            unconditional_features, conditional_features: Kept from an earlier call on the same images with the
                configuration's noise, and the same prompts.
            implicit_caption (`torch.FloatTensor` of shape `(n, k, width)`): Prompt tokens appended to the text's.
            noise_seed (`torch.LongTensor` of shape `(n,)`): A noise map for each image instead of the shared one.
            guidance_scales: As many as configured. Default: the configuration's.

        Raises:
            ValueError: Images are not square, prompts, seeds or kept features are not as many as images, or
                `conditional_features` are given without the unconditional features that a scale needs.
        """
        scales = self.scales(guidance_scales)
        if conditional_features is None:
            if latents is None:
                if pixel_values is None:
                    raise ValueError("The diffusion tower got neither images nor latents. Give pixel_values.")
                latents = self.encode_latents(pixel_values)
            _check_inputs(
                latents,
                prompts=input_ids,
                implicit_captions=implicit_caption,
                noise_seeds=noise_seed,
                unconditional_features=unconditional_features,
            )
            prompts = self._prompts(latents, [input_ids, input_ids_2, input_ids_3], implicit_caption)
            unconditional_features, conditional_features = self._halves(
                latents, prompts, scales, unconditional_features, noise_seed
            )
            for capture in self._captures:
                capture.end(self._attended(input_ids, input_ids_2, input_ids_3), conditional_features is not None)
        by_scale = [guide(unconditional_features, conditional_features, s) for s in scales]
        return SDLlavaDiffusionOutput(self.ensemble(by_scale), unconditional_features, conditional_features)

    def _halves(
        self,
        latents: torch.Tensor,
        prompts: Prompts | None,
        scales: Sequence[float],
        unconditional_features: torch.Tensor | None,
        noise_seed: torch.Tensor | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Unconditional and conditional features, as far as the scales need them."""
        want_conditional = prompts is not None and any(s != 0 for s in scales)
        want_unconditional = unconditional_features is None and (not want_conditional or any(s != 1 for s in scales))
        halves = [self._null_prompts(latents)] if want_unconditional else []
        if prompts is not None and want_conditional:
            halves.append(prompts)
        for capture in self._captures:
            capture.begin(len(latents))
        if not halves:
            return unconditional_features, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._needs_grad(halves)):
            features = self._run_halves(latents, halves, noise_seed)
        return (
            features[0] if want_unconditional else unconditional_features,
            features[-1] if want_conditional else None,
        )

    def _run_halves(
        self, latents: torch.Tensor, halves: Sequence[Prompts], noise_seed: torch.Tensor | None
    ) -> list[torch.Tensor]:
        lengths = {half["encoder_hidden_states"].shape[1] for half in halves}
        if len(lengths) > 1:  # implicit caption tokens make the conditional prompt longer
            return [self.extract(latents, half, noise_seed) for half in halves]
        prompts = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        return list(self.extract(latents, prompts, noise_seed).chunk(len(halves)))

    def scales(self, guidance_scales: Sequence[float] | float | None) -> list[float]:
        """The guidance scales of a call: those given, or else the configured ones.

        Raises:
            ValueError: They are not as many as configured.
        """
        if guidance_scales is None:
            return self.config.guidance_scales
        if isinstance(guidance_scales, int | float):
            guidance_scales = [guidance_scales]
        if len(guidance_scales) != len(self.config.guidance_scales):
            raise ValueError(
                f"guidance_scales={list(guidance_scales)} has {len(guidance_scales)} entries, but this model combines "
                f"{len(self.config.guidance_scales)}. Give as many as {self.config.guidance_scales}."
            )
        if not all(map(math.isfinite, scales := [float(scale) for scale in guidance_scales])):
            raise ValueError(f"guidance_scales={scales} has a value that is not finite. Use numbers such as 4.0.")
        return scales

    def _null_prompts(self, latents: torch.Tensor) -> Prompts:
        is_offloaded = self.backbone.prompt_weight.device.type == "meta"
        null = self.null_prompt(latents.device if is_offloaded else None)
        return {name: x.expand(len(latents), *x.shape[1:]) for name, x in null.items()}

    def _prompts(
        self,
        latents: torch.Tensor,
        input_ids: Sequence[torch.Tensor | None],
        implicit_caption: torch.Tensor | None,
    ) -> Prompts | None:
        if self.config.conditioning == "none" or (input_ids[0] is None and implicit_caption is None):
            return None
        prompts = self._null_prompts(latents) if input_ids[0] is None else self.encode_prompts(*input_ids)
        if implicit_caption is not None:
            text = prompts["encoder_hidden_states"]
            prompts["encoder_hidden_states"] = torch.cat([text, implicit_caption.to(text.dtype)], dim=1)
            if (mask := prompts.get("encoder_attention_mask")) is not None:
                kept = mask.new_ones(len(mask), implicit_caption.shape[1])
                prompts["encoder_attention_mask"] = torch.cat([mask, kept], dim=1)
        return prompts

    def _attended(self, *input_ids: torch.Tensor | None) -> list[torch.Tensor]:
        """The ids whose tokens the denoiser attends to."""
        chosen = [input_ids[tokenizer] for tokenizer in self.config.family.prompt_tokenizers]
        return [ids for ids in chosen if ids is not None]

    def _needs_grad(self, halves: Sequence[Prompts]) -> bool:
        if any(x.requires_grad for half in halves for x in half.values()):
            return True
        return any(p.requires_grad for p in self.backbone.denoiser.parameters())


def _check_inputs(latents: torch.Tensor, **rows: torch.Tensor | None) -> None:
    if latents.shape[-2] != latents.shape[-1]:
        raise ValueError(
            f"Latents of {latents.shape[-2]} x {latents.shape[-1]} are not square. Pad the images to squares."
        )
    for name, values in rows.items():
        if values is not None and len(values) != len(latents):
            raise ValueError(f"There are {len(values)} {name} for {len(latents)} image(s). Give one per image.")
