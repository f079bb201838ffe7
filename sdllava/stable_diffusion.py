"""The Stable Diffusion family: 1.x, 2.x and SDXL."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerBase,
)

from .backbone import Prompts, dtype_of
from .diffusion_configuration import SDLlavaDiffusionConfig
from .families import find_family
from .hooked_backbone import as_dict, published
from .latent_backbone import LatentBackbone
from .noise import ddpm_rates
from .repositories import missing, split_revision
from .small_maps import multiply_small_maps
from .text_encoder_configs import check_vocabularies, check_width, empty_prompt, read_clip

_BEFORE_CROSS_ATTENTION = (
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
)
"""What a UNet computes before its first cross-attention: a ninth of the pass up to the papers' tap."""


class StableDiffusionBackbone(LatentBackbone):
    """Stable Diffusion 1.x and 2.x: `unet`, `vae` and `text_encoder`."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.unet = multiply_small_maps(UNet2DConditionModel.from_config(as_dict(config.unet_config)))
        self.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(as_dict(config.text_encoder_config)))
        self._rates = ddpm_rates(as_dict(config.scheduler_config))

    @classmethod
    def read_part_configs(cls, source: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
        """Read `unet/`, `vae/`, `scheduler/`, `text_encoder/`, `tokenizer/`; for SDXL also `_2` of the last two."""
        where = split_revision(source)
        try:
            unet = UNet2DConditionModel.load_config(subfolder="unet", **where)
            vae = AutoencoderKL.load_config(subfolder="vae", **where)
            scheduler = DDPMScheduler.load_config(subfolder="scheduler", **where)
            names = find_family({"unet_config": unet}).tokenizers
            read = [read_clip(where, name.removeprefix("tokenizer")) for name in names]
            encoders, tokenizers = zip(*read, strict=True)
        except (OSError, HFValidationError) as error:
            raise missing(source, "diffusion model", error) from error
        _check_parts(unet, vae, encoders, tokenizers)
        empty = [empty_prompt(tokenizer) for tokenizer in tokenizers]
        parts = {
            "unet_config": published(unet),
            "vae_config": published(vae),
            "scheduler_config": published(scheduler),
            "text_encoder_config": encoders[0].to_diff_dict(),
            "text_encoder_2_config": encoders[1].to_diff_dict() if len(encoders) > 1 else None,
            "null_input_ids": empty[0],
            "null_input_ids_2": empty[1] if len(empty) > 1 else None,
        }
        return parts, list(tokenizers)

    def _load_denoiser(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        unet = UNet2DConditionModel.from_pretrained(subfolder="unet", torch_dtype=dtype, **options)
        self.unet = multiply_small_maps(unet)

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.text_encoder = CLIPTextModel.from_pretrained(subfolder="text_encoder", dtype=dtype, **options)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet."""
        return self.unet

    def encode_prompts(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor | None = None,
        input_ids_3: torch.Tensor | None = None,
    ) -> Prompts:
        """The text encoder's last hidden states, `(n, 77, width)`."""
        return {"encoder_hidden_states": self.text_encoder(input_ids).last_hidden_state}

    def noise_rates(self, timestep: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t) of the 1000-step training schedule."""
        return self._rates[timestep]

    def modules_before_prompts(self, denoiser: nn.Module) -> list[nn.Module]:
        """Modules of the first block whose results no prompt has reached, where none enters the time embedding."""
        config: Any = denoiser.config
        if (
            config.down_block_types[0] != "CrossAttnDownBlock2D"
            or config.addition_embed_type is not None  # SDXL: the prompt enters the time embedding
            or config.dual_cross_attention
        ):
            return []
        only = config.only_cross_attention
        attends_prompt_first = only if isinstance(only, bool) else only[0]
        paths = _BEFORE_CROSS_ATTENTION[:-1] if attends_prompt_first else _BEFORE_CROSS_ATTENTION
        known = dict(denoiser.get_submodule("down_blocks.0").named_modules(prefix="down_blocks.0"))
        return [known[path] for path in paths if path in known]

    def _build_denoiser(self) -> nn.Module:
        return UNet2DConditionModel.from_config(as_dict(self.config.unet_config))

    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        config: Any = self.unet.config
        size = 2 ** len(config.block_out_channels)
        prompts = {"encoder_hidden_states": torch.empty(1, 1, config.cross_attention_dim)}
        return torch.empty(1, config.in_channels, size, size), prompts

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a UNet, in its own dtype; see `DiffusionBackbone.denoise`."""
        return denoiser(*_unet_inputs(dtype_of(denoiser), latents, timestep, prompts))


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """SDXL: two text encoders (the layer before the last of each), the second's pooled embedding, and time ids."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        encoder_config = CLIPTextConfig.from_dict(as_dict(config.text_encoder_2_config))
        self.text_encoder_2 = CLIPTextModelWithProjection(encoder_config)

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        super()._load_text_encoders(dtype, options)
        second = CLIPTextModelWithProjection.from_pretrained(subfolder="text_encoder_2", dtype=dtype, **options)
        self.text_encoder_2 = second

    def encode_prompts(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor | None = None,
        input_ids_3: torch.Tensor | None = None,
    ) -> Prompts:
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

    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        latents, prompts = super()._example_inputs()
        return latents, {**prompts, "text_embeds": torch.empty(1, self.text_encoder_2.config.projection_dim)}

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
    check_width("UNet", unet["cross_attention_dim"], sum(encoder.hidden_size for encoder in text_encoders))
    check_vocabularies(tokenizers, text_encoders)
