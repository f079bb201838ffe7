"""The Stable Diffusion family: 1.x, 2.x and SDXL."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
)

from .backbone import DiffusionBackbone, Prompts, dtype_of, without_autocast
from .configuration import SDLlavaDiffusionConfig
from .families import is_tiny_vae
from .noise import ddpm_rates
from .repositories import missing, refuse_pickle, split_revision
from .small_maps import multiply_small_maps
from .taps import Tap
from .unet_pass import CompiledPass, CutAway, cut_after_taps, read_taps, share_rows

_BEFORE_CROSS_ATTENTION = (
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
)
"""What a UNet computes before its first cross-attention: a ninth of the pass up to the papers' tap."""


class StableDiffusionBackbone(DiffusionBackbone):
    """Stable Diffusion 1.x and 2.x: `unet`, `vae` and `text_encoder`."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.unet = multiply_small_maps(UNet2DConditionModel.from_config(_as_dict(config.unet_config)))
        vae_class = AutoencoderTiny if self._has_tiny_vae else AutoencoderKL
        self.vae = vae_class.from_config(_as_dict(config.vae_config))
        self.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(_as_dict(config.text_encoder_config)))
        self._rates = ddpm_rates(_as_dict(config.scheduler_config))

    @classmethod
    def read_part_configs(cls, source: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
        """Read `unet/`, `vae/`, `scheduler/`, `text_encoder/`, `tokenizer/`; for SDXL also `_2` of the last two."""
        where = split_revision(source)
        try:
            unet = UNet2DConditionModel.load_config(subfolder="unet", **where)
            vae = AutoencoderKL.load_config(subfolder="vae", **where)
            scheduler = DDPMScheduler.load_config(subfolder="scheduler", **where)
            is_xl = unet.get("addition_embed_type") == "text_time"
            suffixes = ["", "_2"] if is_xl else [""]
            encoders = [CLIPTextConfig.from_pretrained(subfolder=f"text_encoder{end}", **where) for end in suffixes]
            tokenizers = [CLIPTokenizer.from_pretrained(subfolder=f"tokenizer{end}", **where) for end in suffixes]
        except (OSError, HFValidationError) as error:
            raise missing(source, "diffusion model", error) from error
        _check_parts(unet, vae, encoders, tokenizers)
        empty = [t("", padding="max_length", max_length=77, truncation=True)["input_ids"] for t in tokenizers]
        parts = {
            "unet_config": _published(unet),
            "vae_config": _published(vae),
            "scheduler_config": _published(scheduler),
            "text_encoder_config": encoders[0].to_diff_dict(),
            "text_encoder_2_config": encoders[1].to_diff_dict() if is_xl else None,
            "null_input_ids": empty[0],
            "null_input_ids_2": empty[1] if is_xl else None,
        }
        return parts, tokenizers

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
            unet = UNet2DConditionModel.from_pretrained(subfolder="unet", torch_dtype=dtype, **options)
            self.unet = multiply_small_maps(unet)
            self.vae = AutoencoderKL.from_pretrained(subfolder="vae", torch_dtype=vae_dtype, **options)
            self._load_text_encoders(dtype, options)
        except OSError as error:
            refuse_pickle(source, error)
            raise missing(source, "diffusion model's safetensors weights", error) from error

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.text_encoder = CLIPTextModel.from_pretrained(subfolder="text_encoder", dtype=dtype, **options)

    def load_tiny_vae(self, source: str) -> dict[str, Any]:
        """As `DiffusionBackbone.load_tiny_vae`."""
        where = split_revision(source)
        device, dtype = self.image_weight.device, self.image_weight.dtype
        try:
            found = _published(AutoencoderTiny.load_config(**where))
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
    def denoiser(self) -> nn.Module:
        """The UNet."""
        return self.unet

    @property
    def prompt_weight(self) -> torch.Tensor:
        """The text encoder's token embeddings."""
        return self.text_encoder.get_input_embeddings().weight

    @property
    def image_weight(self) -> torch.Tensor:
        """The VAE's first weight."""
        return next(self.vae.parameters())

    @property
    def _has_tiny_vae(self) -> bool:
        return is_tiny_vae(_as_dict(self.config.vae_config))

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The mode of the VAE's posterior, scaled; a tiny autoencoder, which has no posterior, gives its output.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, height, width)`): In [-1, 1].

        Returns:
            `torch.FloatTensor` of shape `(n, 4, height / 8, width / 8)`: The latents z0.
        """
        with without_autocast(pixel_values.device):
            pixels = pixel_values.to(dtype_of(self.vae))
            if pixels.device.type == "cpu" and pixels.dtype == torch.float32:
                pixels = pixels.contiguous(memory_format=torch.channels_last)  # measured to be faster there
            encoded = self.vae.encode(pixels)
        latents = encoded.latents if self._has_tiny_vae else encoded.latent_dist.mode()
        return (latents * self.vae.config.scaling_factor).float()

    def encode_prompts(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor | None = None) -> Prompts:
        """The text encoder's last hidden states, `(n, 77, width)`."""
        return {"encoder_hidden_states": self.text_encoder(input_ids).last_hidden_state}

    def noise_rates(self, timestep: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t) of the 1000-step training schedule."""
        return self._rates[timestep]

    def read(self, latents: torch.Tensor, timestep: int, prompts: Prompts, taps: Sequence[Tap]) -> list[torch.Tensor]:
        """As `DiffusionBackbone.read`.

        What the UNet computes before any prompt reaches it is computed once for all blocks of prompts, unless
        gradients are recorded.
        """
        blocks = len(prompts["encoder_hidden_states"]) // len(latents)
        modules = self._modules_before_prompts(self.unet) if blocks > 1 and not torch.is_grad_enabled() else []
        with share_rows(modules, len(latents), blocks):
            repeated = latents.repeat(blocks, 1, 1, 1)
            return read_taps(self.unet, taps, lambda: self.denoise(self.unet, repeated, timestep, prompts))

    def compile_pass(self, taps: Sequence[Tap], **options: Any) -> CompiledPass:
        """A compiled form of `read` for these taps, with `options` of `torch.compile`."""
        return CompiledPass(self.unet, taps, self.denoise, self._modules_before_prompts, **options)

    def _modules_before_prompts(self, unet: nn.Module) -> list[nn.Module]:
        config: Any = unet.config
        if (
            config.down_block_types[0] != "CrossAttnDownBlock2D"
            or config.addition_embed_type is not None  # SDXL: the prompt enters the time embedding
            or config.dual_cross_attention
        ):
            return []
        only = config.only_cross_attention
        attends_prompt_first = only if isinstance(only, bool) else only[0]
        paths = _BEFORE_CROSS_ATTENTION[:-1] if attends_prompt_first else _BEFORE_CROSS_ATTENTION
        known = dict(unet.get_submodule("down_blocks.0").named_modules(prefix="down_blocks.0"))
        return [known[path] for path in paths if path in known]

    def cut(self, taps: Sequence[Tap]) -> None:
        """Remove what comes after the last tap in the UNet, and the VAE's decoder."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(_as_dict(self.config.unet_config))
            size = 2 ** len(unet.config.block_out_channels)
            latents = torch.empty(1, unet.config.in_channels, size, size)
            prompts = self._empty_prompts(unet)
        cut_after_taps(self.unet, unet, taps, lambda: self.denoise(unet, latents, 0, prompts))
        self._cut_decoder()

    def _cut_decoder(self) -> None:
        self.vae.decoder = CutAway(self.vae.decoder)
        if not self._has_tiny_vae:
            self.vae.post_quant_conv = CutAway(self.vae.post_quant_conv)

    def _empty_prompts(self, unet: Any) -> Prompts:
        return {"encoder_hidden_states": torch.empty(1, 1, unet.config.cross_attention_dim)}

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a UNet, in its own dtype; see `DiffusionBackbone.denoise`."""
        return denoiser(*_unet_inputs(dtype_of(denoiser), latents, timestep, prompts))


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """SDXL: two text encoders (the layer before the last of each), the second's pooled embedding, and time ids."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        encoder_config = CLIPTextConfig.from_dict(_as_dict(config.text_encoder_2_config))
        self.text_encoder_2 = CLIPTextModelWithProjection(encoder_config)

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        super()._load_text_encoders(dtype, options)
        second = CLIPTextModelWithProjection.from_pretrained(subfolder="text_encoder_2", dtype=dtype, **options)
        self.text_encoder_2 = second

    def encode_prompts(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor | None = None) -> Prompts:
        """The second-last hidden states of both text encoders on channels, and the second's pooled embedding.

        Raises:
            ValueError: `input_ids_2` is missing.
        """
        if input_ids_2 is None:
            raise ValueError("SDXL has two tokenizers. Give diffusion_input_ids_2 in addition to diffusion_input_ids.")
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        hidden_states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": hidden_states, "text_embeds": second.text_embeds}

    def _empty_prompts(self, unet: Any) -> Prompts:
        pooled = torch.empty(1, self.text_encoder_2.config.projection_dim)
        return {**super()._empty_prompts(unet), "text_embeds": pooled}

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a UNet with the time ids of an uncropped image of the configured size."""
        dtype = dtype_of(denoiser)
        time_ids = torch.full((len(latents), 6), self.config.image_size, device=latents.device, dtype=dtype)
        time_ids[:, 2:4] = 0  # original height and width, top and left of the crop, target height and width
        added = {"text_embeds": prompts["text_embeds"].to(dtype), "time_ids": time_ids}
        return denoiser(*_unet_inputs(dtype, latents, timestep, prompts), added_cond_kwargs=added)


def _unet_inputs(
    dtype: torch.dtype, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
) -> tuple[torch.Tensor, ...]:
    if not isinstance(timestep, torch.Tensor):
        timestep = torch.full((), timestep, device=latents.device)  # diffusers would wait for the GPU to send it
    return latents.to(dtype), timestep, prompts["encoder_hidden_states"].to(dtype)


def _as_dict(config: dict[str, Any] | None) -> dict[str, Any]:
    return dict(config or {})


def _published(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _check_parts(
    unet: dict[str, Any],
    vae: dict[str, Any],
    text_encoders: Sequence[Any],
    tokenizers: Sequence[PreTrainedTokenizerBase],
) -> None:
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"The UNet takes {unet['in_channels']} channels but the VAE gives {vae['latent_channels']}. An inpainting, "
            "depth or upscaling model cannot be an encoder. Use the text-to-image model."
        )
    width = sum(encoder.hidden_size for encoder in text_encoders)
    if unet["cross_attention_dim"] != width:
        raise ValueError(
            f"The UNet is conditioned on prompts of width {unet['cross_attention_dim']}, but the text encoders give "
            f"{width}. Use the parts of one repository."
        )
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        if len(tokenizer) > encoder.vocab_size:
            raise ValueError(
                f"The diffusion tokenizer has {len(tokenizer)} tokens, its text encoder only {encoder.vocab_size}. "
                "Use the parts of one repository."
            )
