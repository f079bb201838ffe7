"""The diffusion tower: a frozen text-to-image model as a question-aware visual encoder (S3, sections 3 and 4)."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .attention_maps import AttentionMaps, capture_attention
from .backbones import backbone_for, without_autocast
from .checkpoints import CheckpointMixin
from .compiled_pass import CompiledPass
from .configuration import SDLlavaDiffusionConfig


@dataclass
class SDLlavaDiffusionOutput(ModelOutput):
    """Args:
    last_hidden_state (`torch.FloatTensor` of shape `(n, grid_size ** 2, hidden_size)`): guided and ensembled.
    unconditional_features, conditional_features (`torch.FloatTensor` of shape `(n, grid_size ** 2, channels)`):
        the features of the empty and of the given prompt, taps and timesteps side by side on channels; None where
        no guidance scale needs them.
    """

    last_hidden_state: torch.Tensor | None = None
    unconditional_features: torch.Tensor | None = None
    conditional_features: torch.Tensor | None = None


class FeatureEnsemble(nn.Module):
    """Several taps, timesteps and guidance scales become one map: side by side, their mean, or a learned mean."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__()
        self.mode = config.ensemble
        self.widths = [tap.channels for tap in config.resolved_taps() for _ in config.timesteps]
        if self.mode == "learned":
            self.weight = nn.Parameter(torch.zeros(len(self.widths) * len(config.guidance_scales)))

    def forward(self, by_scale: Sequence[torch.Tensor]) -> torch.Tensor:
        """Args:
            by_scale: one `(n, tokens, channels)` tensor a guidance scale.

        Returns:
            `torch.Tensor` of shape `(n, tokens, hidden_size)`, in the order tap, timestep, scale.
        """
        parts = [part for parts in zip(*(x.split(self.widths, dim=-1) for x in by_scale)) for part in parts]
        if self.mode == "concat":
            return torch.cat(parts, dim=-1)
        if self.mode == "mean":
            return torch.stack(parts).mean(dim=0)
        weight = self.weight.softmax(dim=0).to(parts[0].dtype)
        return torch.einsum("s,sntc->ntc", weight, torch.stack(parts))


class SDLlavaDiffusionModel(CheckpointMixin, PreTrainedModel):
    """Ask a frozen Stable Diffusion with a prompt and take its inner features: VAE encode, noise, UNet up to the taps,
    guidance on features, ensemble, grid.

    The parts are stock modules under `backbone`: `unet`, `vae`, `text_encoder` (and `text_encoder_2`).
    """

    config: SDLlavaDiffusionConfig
    config_class = SDLlavaDiffusionConfig
    base_model_prefix = "diffusion_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"^(lm_head|model)\."]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.taps = config.resolved_taps()
        self.backbone = backbone_for(config)
        if config.truncate:
            self.backbone.cut(self.taps)
        self.ensemble = FeatureEnsemble(config)
        self._keep_in_fp32_modules_strict = ["vae"] if config.vae_in_fp32 else []
        with torch.device("cpu"):
            alphas_cumprod = DDPMScheduler.from_config(dict(config.scheduler_config)).alphas_cumprod
        self._signal_rates = (alphas_cumprod**0.5).tolist()
        self._noise_rates = ((1 - alphas_cumprod) ** 0.5).tolist()
        self._null_prompt: tuple[Any, dict[str, torch.Tensor]] | None = None
        self._compiled_pass: CompiledPass | None = None
        self._captures = 0
        self.freeze()
        self.post_init()

    @classmethod
    def from_component_pretrained(cls, diffusion: str, truncate: bool = False, **config) -> "SDLlavaDiffusionModel":
        """Load a published diffusers repository or folder as a tower; see [`~sdllava.diffusion_loading.load_diffusion`].

        Args:
            diffusion (`str`): repository id, `id@revision`, or local folder with `model_index.json`.
            truncate (`bool`): cut away what lies behind the deepest tap.
            config: fields of [`SDLlavaDiffusionConfig`]; `dtype` sets the weights' type.
        """
        from .diffusion_loading import load_diffusion

        return load_diffusion(diffusion, truncate=truncate, **config)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As `PreTrainedModel.from_pretrained`; of a whole model's checkpoint, the tower alone is read."""
        kwargs.setdefault("key_mapping", {r"^model\.diffusion_tower\.": ""})
        return super().from_pretrained(*args, **kwargs)

    def use_tiny_vae(self, source: str) -> None:
        """Encode images with a tiny autoencoder instead of the VAE, here and in checkpoints saved from now on: a ninth of
        its operations, and slightly different features.

        Args:
            source (`str`): repository id, `id@revision` or folder of a diffusers `AutoencoderTiny`, for example
                `madebyollin/taesd`.

        Raises:
            OSError: it is not there.
            ValueError: it makes latents that this UNet does not take, or its weights are no safetensors.
        """
        from .diffusion_loading import load_tiny_vae

        self.backbone.vae, self.config.vae_config = load_tiny_vae(source, self.config, self.vae.device, self.vae.dtype)
        if self.config.truncate:
            self.backbone.cut_decoder()
        self.freeze()

    def compile_pass(self, **options: Any) -> None:
        """Compile the UNet's pass up to the taps, for calls that record no gradients; the first call on inputs of another
        shape says so and takes a minute or more. To be called where the tower is on the device on which it stays.

        Args:
            options: of `torch.compile`; `mode="reduce-overhead"` uses CUDA graphs on a GPU.
        """
        self._compiled_pass = CompiledPass(self.backbone, self.taps, **options)

    @property
    def unet(self) -> Any:
        return self.backbone.unet

    @property
    def vae(self) -> Any:
        return self.backbone.vae

    @property
    def text_encoder(self) -> Any:
        return self.backbone.text_encoder

    def freeze(self) -> None:
        """Stop gradients to the diffusion model's own weights; the ensemble's weights stay trainable."""
        self.backbone.requires_grad_(False)
        self.backbone.eval()

    def train(self, mode: bool = True) -> "SDLlavaDiffusionModel":
        """As `nn.Module.train`, but a frozen diffusion model stays in evaluation mode."""
        super().train(mode)
        self.backbone.train(mode and any(p.requires_grad for p in self.backbone.parameters()))
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """Diffusers' modules initialise themselves when they are built."""
        if isinstance(module, FeatureEnsemble) and module.mode == "learned":
            init.zeros_(module.weight)

    @torch.no_grad()
    def encode_latents(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Latents z0 of images `(n, 3, height, width)` in [-1, 1]: `(n, 4, height / 8, width / 8)`, float32."""
        device = self.vae.device
        return self.backbone.encode_image(pixel_values if device.type == "meta" else pixel_values.to(device))

    @torch.no_grad()
    def encode_prompts(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor | None = None) -> dict:
        """Conditioning of n prompts, from token ids `(n, 77)`; see `StableDiffusionBackbone.encode_prompts`."""
        return self.backbone.encode_prompts(input_ids, input_ids_2)

    @torch.compiler.disable
    def null_prompt(self, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Conditioning of the empty prompt, first dimension 1; computed once for the weights as they are.

        Args:
            device: where its token ids lie; default the text encoder's.
        """
        weight = self.text_encoder.get_input_embeddings().weight
        version = None if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype, weight.device)
        if self._null_prompt is None or self._null_prompt[0] != key:
            device = torch.device(device or weight.device)
            ids = [self.config.null_input_ids, self.config.null_input_ids_2]
            tensors = [torch.tensor([row], device=device) for row in ids if row is not None]
            with torch.inference_mode(False), without_autocast(device):
                self._null_prompt = (key, self.encode_prompts(*tensors))
        return self._null_prompt[1]

    def noise(self, latents: torch.Tensor, noise_seed: torch.Tensor | None = None) -> torch.Tensor:
        """Standard normal noise for latents `(n, 4, h, w)`, drawn on the CPU in float32.

        One map for all of them from the configuration's seed, or one each from `noise_seed`, a `(n,)` integer tensor.
        """
        seeds = [self.config.noise_seed] if noise_seed is None else noise_seed.tolist()
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = tuple(latents.shape[1:])
        maps = [torch.randn(shape, generator=g, device="cpu", dtype=torch.float32) for g in generators]
        return torch.stack(maps).to(latents.device, non_blocking=latents.is_cuda).expand_as(latents)

    def add_noise(self, latents: torch.Tensor, timestep: int, noise: torch.Tensor) -> torch.Tensor:
        """x_t = sqrt(abar_t) z0 + sqrt(1 - abar_t) eps, on the 1000-step training schedule."""
        return self._signal_rates[timestep] * latents.float() + self._noise_rates[timestep] * noise

    def extract(
        self,
        latents: torch.Tensor,
        prompts: dict[str, torch.Tensor],
        noise_seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Features of noisy latents under prompts, at every tap and timestep.

        Args:
            latents (`torch.Tensor` of shape `(n, 4, h, w)`): z0.
            prompts: from `encode_prompts`; k times n of them read each latent k times, in blocks of n.
            noise_seed (`torch.LongTensor` of shape `(n,)`, *optional*): see `noise`.

        Returns:
            `torch.Tensor` of shape `(k * n, grid_size ** 2, channels)`: taps and timesteps side by side, tap first.
        """
        noise = self.noise(latents, noise_seed)
        by_tap: list[list[torch.Tensor]] = [[] for _ in self.taps]
        for timestep in self.config.timesteps:
            noisy = self.add_noise(latents, timestep, noise)
            for features, read in zip(by_tap, self._read(noisy, timestep, prompts)):
                features.append(self._to_grid(read))
        return torch.cat([features for tap in by_tap for features in tap], dim=-1)

    def _read(self, noisy, timestep, prompts) -> list[torch.Tensor]:
        if self._compiled_pass is None or self._captures or torch.is_grad_enabled():
            return self.backbone.read(noisy, timestep, prompts, self.taps)
        return self._compiled_pass(noisy, timestep, prompts)

    def _to_grid(self, features: torch.Tensor) -> torch.Tensor:
        if features.ndim == 3:
            side = math.isqrt(features.shape[1])
            features = features.transpose(1, 2).unflatten(2, (side, side))
        return resize_grid(features, self.config.grid_size)

    def capture_attention(
        self, layers: Sequence[str] | None = None, per_head: bool = False
    ) -> AbstractContextManager[AttentionMaps]:
        """Keep the cross-attention maps of calls inside a context; see [`~sdllava.attention_maps.capture_attention`].

        ```python
        >>> with tower.capture_attention(layers=["U-L1-R1-B0"]) as maps:
        ...     model.generate(**inputs)
        >>> maps["U-L1-R1-B0", 50].shape  # (n, 1, 77, 16, 16)
        ```
        """
        return capture_attention(self, layers, per_head)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        input_ids_2: torch.Tensor | None = None,
        latents: torch.Tensor | None = None,
        unconditional_features: torch.Tensor | None = None,
        implicit_caption: torch.Tensor | None = None,
        noise_seed: torch.Tensor | None = None,
        guidance_scales: Sequence[float] | float | None = None,
    ) -> SDLlavaDiffusionOutput:
        """X = X_u + s (X_c - X_u) for each guidance scale s (S3, equation 1), ensembled.

        The unconditional half is skipped at s = 1 and where `unconditional_features` are given, the conditional half
        at s = 0 and where there is no prompt, which makes X = X_u.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(n, 3, image_size, image_size)`): in [-1, 1]; not needed where
                `latents` `(n, 4, h, w)` are given.
            input_ids, input_ids_2 (`torch.LongTensor` of shape `(n, 77)`): the prompts.
            unconditional_features: kept from an earlier call on the same images with the configuration's noise.
            implicit_caption (`torch.FloatTensor` of shape `(n, k, width)`): prompt tokens appended to the text's.
            noise_seed (`torch.LongTensor` of shape `(n,)`): a noise map for each image instead of the shared one.
            guidance_scales: as many as configured; default the configuration's.

        Returns:
            [`SDLlavaDiffusionOutput`]

        Raises:
            ValueError: images are not square, or prompts, seeds or kept features are not as many as images.
        """
        if latents is None:
            latents = self.encode_latents(pixel_values)
        _check_inputs(
            latents, prompts=input_ids, implicit_captions=implicit_caption, noise_seeds=noise_seed,
            unconditional_features=unconditional_features,
        )  # fmt: skip
        scales = self.scales(guidance_scales)
        prompts = self._prompts(latents, input_ids, input_ids_2, implicit_caption)
        want_conditional = prompts is not None and any(s != 0 for s in scales)
        want_unconditional = unconditional_features is None and (not want_conditional or any(s != 1 for s in scales))

        halves = []
        if want_unconditional:
            halves.append(self._null_prompts(latents))
        if want_conditional:
            halves.append(prompts)
        conditional_features = None
        if halves:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._needs_grad(implicit_caption)):
                features = self._run_halves(latents, halves, noise_seed)
            if want_unconditional:
                unconditional_features = features[0]
            if want_conditional:
                conditional_features = features[-1]
        by_scale = [guide(unconditional_features, conditional_features, s) for s in scales]
        return SDLlavaDiffusionOutput(self.ensemble(by_scale), unconditional_features, conditional_features)

    def _run_halves(self, latents, halves, noise_seed) -> list[torch.Tensor]:
        lengths = {half["encoder_hidden_states"].shape[1] for half in halves}
        if len(lengths) > 1:  # implicit caption tokens make the conditional prompt longer
            return [self.extract(latents, half, noise_seed) for half in halves]
        prompts = {name: torch.cat([half[name] for half in halves]) for name in halves[0]}
        return list(self.extract(latents, prompts, noise_seed).chunk(len(halves)))

    def scales(self, guidance_scales: Sequence[float] | float | None) -> list[float]:
        """The guidance scales of a call: those given, as many as configured, else the configured ones."""
        if guidance_scales is None:
            return self.config.guidance_scales
        if isinstance(guidance_scales, int | float):
            guidance_scales = [guidance_scales]
        if len(guidance_scales) != len(self.config.guidance_scales):
            raise ValueError(
                f"this model combines {len(self.config.guidance_scales)} guidance scale(s), but {guidance_scales} was "
                f"given: pass as many as {self.config.guidance_scales}"
            )
        return [float(s) for s in guidance_scales]

    def _null_prompts(self, latents: torch.Tensor) -> dict[str, torch.Tensor]:
        null = self.null_prompt(latents.device if self.text_encoder.device.type == "meta" else None)
        return {name: x.expand(len(latents), *x.shape[1:]) for name, x in null.items()}

    def _prompts(self, latents, input_ids, input_ids_2, implicit_caption) -> dict[str, torch.Tensor] | None:
        if self.config.conditioning == "none" or (input_ids is None and implicit_caption is None):
            return None
        if input_ids is None:
            prompts = self._null_prompts(latents)
        else:
            prompts = self.encode_prompts(input_ids, input_ids_2)
        if implicit_caption is not None:
            text = prompts["encoder_hidden_states"]
            prompts["encoder_hidden_states"] = torch.cat([text, implicit_caption.to(text.dtype)], dim=1)
        return prompts

    def _needs_grad(self, implicit_caption: torch.Tensor | None) -> bool:
        if implicit_caption is not None and implicit_caption.requires_grad:
            return True
        return any(p.requires_grad for p in self.unet.parameters())


def _check_inputs(latents: torch.Tensor, **rows: torch.Tensor | None) -> None:
    if latents.shape[-2] != latents.shape[-1]:
        raise ValueError(f"latents of {latents.shape[-2]} x {latents.shape[-1]} are not square: pad images to squares")
    for name, values in rows.items():
        if values is not None and len(values) != len(latents):
            raise ValueError(f"{len(values)} {name} for {len(latents)} image(s): give one for each")


def guide(unconditional: torch.Tensor | None, conditional: torch.Tensor | None, scale: float) -> torch.Tensor:
    """X_u + s (X_c - X_u), in float32; X_u where there is no X_c or s = 0, X_c at s = 1."""
    if conditional is None or scale == 0:
        return unconditional
    if scale == 1:
        return conditional
    base = unconditional.float()
    return (base + scale * (conditional.float() - base)).to(conditional.dtype)


def resize_grid(features: torch.Tensor, size: int) -> torch.Tensor:
    """Maps `(n, channels, h, w)` resized to `size` (bilinear, float32) as tokens `(n, size ** 2, channels)`."""
    if features.shape[-2:] != (size, size):
        features = F.interpolate(features.float(), (size, size), mode="bilinear", align_corners=False).to(
            features.dtype
        )
    return features.flatten(2).transpose(1, 2)
