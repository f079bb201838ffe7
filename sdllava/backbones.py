"""Text-to-image models behind one interface.

A backbone turns pixels into latents, prompts into conditioning, and noisy latents into what its taps show. The tower
(`diffusion.py`) adds noise, guidance and ensembles, and knows no model by name. To add a family, subclass
`StableDiffusionBackbone` or write a module with the same methods, and name it in `backbone_for`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from .configuration import SDLlavaDiffusionConfig
from .small_maps import multiply_small_maps
from .taps import CutAway, Tap, cut_behind_taps, read_taps, share_rows

_BEFORE_CROSS_ATTENTION = (
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
)
"""What a UNet computes before its first cross-attention: a ninth of the pass up to the papers' tap."""


class StableDiffusionBackbone(nn.Module):
    """Stable Diffusion 1.x and 2.x: stock diffusers and transformers modules under their published names."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__()
        self.config = config
        self.unet = multiply_small_maps(UNet2DConditionModel.from_config(dict(config.unet_config)))
        self.vae = (AutoencoderTiny if config.has_tiny_vae else AutoencoderKL).from_config(dict(config.vae_config))
        self.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(dict(config.text_encoder_config)))

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The mode of the VAE's posterior, scaled; what a tiny autoencoder, which has no posterior, gives in its place.

        Args:
            pixel_values (`torch.Tensor` of shape `(n, 3, height, width)`): in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(n, 4, height / 8, width / 8)`: the latents z0, float32.
        """
        with without_autocast(pixel_values.device):
            pixels = pixel_values.to(dtype_of(self.vae))
            if pixels.device.type == "cpu" and pixels.dtype == torch.float32:
                pixels = pixels.contiguous(memory_format=torch.channels_last)  # measured to be faster there
            encoded = self.vae.encode(pixels)
        latents = encoded.latents if self.config.has_tiny_vae else encoded.latent_dist.mode()
        return (latents * self.vae.config.scaling_factor).float()

    def encode_prompts(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor | None = None) -> dict:
        """What the UNet is conditioned on.

        Args:
            input_ids (`torch.LongTensor` of shape `(n, 77)`): the prompts, padded as the SD tokenizer pads.
            input_ids_2: SDXL's second tokenizer's, of the same shape.

        Returns:
            `dict[str, torch.Tensor]`: tensors whose first dimension is n; `encoder_hidden_states` is `(n, 77, width)`.
        """
        return {"encoder_hidden_states": self.text_encoder(input_ids).last_hidden_state}

    def read(
        self, latents: torch.Tensor, timestep: int, prompts: dict[str, torch.Tensor], taps: Sequence[Tap]
    ) -> list[torch.Tensor]:
        """Run the UNet up to the last tap.

        Args:
            latents (`torch.Tensor` of shape `(n, 4, h, w)`): noisy latents x_t.
            timestep (`int`): 0..999.
            prompts: from `encode_prompts`; k times n of them read each latent k times, in blocks of n. What the UNet
                computes before any prompt reaches it is then computed once, unless gradients are recorded.

        Returns:
            `list[torch.Tensor]`: each tap's output for the k times n prompts, as the module gives it.
        """
        blocks = len(prompts["encoder_hidden_states"]) // len(latents)
        modules = self.modules_before_prompts(self.unet) if blocks > 1 and not torch.is_grad_enabled() else []
        with share_rows(modules, len(latents), blocks):
            repeated = latents.repeat(blocks, 1, 1, 1)
            return read_taps(self.unet, taps, lambda: self.denoise(self.unet, repeated, timestep, prompts))

    def modules_before_prompts(self, unet: UNet2DConditionModel) -> list[nn.Module]:
        """The modules of a UNet whose results no prompt has reached yet."""
        config = unet.config
        if (
            config.down_block_types[0] != "CrossAttnDownBlock2D"
            or config.addition_embed_type is not None  # SDXL: the prompt enters the time embedding
            or config.dual_cross_attention
        ):
            return []
        only = config.only_cross_attention
        attends_prompt_first = only if isinstance(only, bool) else only[0]
        paths = _BEFORE_CROSS_ATTENTION[:-1] if attends_prompt_first else _BEFORE_CROSS_ATTENTION
        known = dict(unet.down_blocks[0].named_modules(prefix="down_blocks.0"))
        return [known[path] for path in paths if path in known]

    def cut(self, taps: Sequence[Tap]) -> None:
        """Remove the part of the UNet behind the last tap, and the VAE's decoder."""
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(dict(self.config.unet_config))
            size = 2 ** len(unet.config.block_out_channels)
            latents = torch.empty(1, unet.config.in_channels, size, size)
            prompts = self._empty_prompts(unet)
        cut_behind_taps(self.unet, unet, taps, lambda: self.denoise(unet, latents, 0, prompts))
        self.cut_decoder()

    def cut_decoder(self) -> None:
        """Remove the VAE's decoder."""
        self.vae.decoder = CutAway(self.vae.decoder)
        if not self.config.has_tiny_vae:
            self.vae.post_quant_conv = CutAway(self.vae.post_quant_conv)

    def _empty_prompts(self, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
        return {"encoder_hidden_states": torch.empty(1, 1, unet.config.cross_attention_dim)}

    def denoise(
        self,
        unet: UNet2DConditionModel,
        latents: torch.Tensor,
        timestep: int | torch.Tensor,
        prompts: dict[str, torch.Tensor],
    ) -> Any:
        """Run a UNet, in its own dtype.

        Args:
            latents (`torch.Tensor` of shape `(n, 4, h, w)`): noisy latents x_t.
            timestep (`int` or integer tensor without dimensions): 0..999.
            prompts: from `encode_prompts`, n of them.
        """
        return unet(*self._unet_inputs(dtype_of(unet), latents, timestep, prompts))

    def _unet_inputs(self, dtype, latents, timestep, prompts) -> tuple[torch.Tensor, ...]:
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.full((), timestep, device=latents.device)  # diffusers would wait for the GPU to send it
        return latents.to(dtype), timestep, prompts["encoder_hidden_states"].to(dtype)


class StableDiffusionXLBackbone(StableDiffusionBackbone):
    """SDXL: two text encoders (the layer before the last of each), the second's pooled embedding, and time ids."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config.text_encoder_2_config)))

    def encode_prompts(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor | None = None) -> dict:
        if input_ids_2 is None:
            raise ValueError("SDXL has two tokenizers: give diffusion_input_ids_2 beside diffusion_input_ids")
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        hidden_states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": hidden_states, "text_embeds": second.text_embeds}

    def _empty_prompts(self, unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
        pooled = torch.empty(1, self.text_encoder_2.config.projection_dim)
        return {**super()._empty_prompts(unet), "text_embeds": pooled}

    def denoise(self, unet, latents, timestep, prompts):
        dtype = dtype_of(unet)
        time_ids = torch.full((len(latents), 6), self.config.image_size, device=latents.device, dtype=dtype)
        time_ids[:, 2:4] = 0  # original height and width, top and left of the crop, target height and width
        added = {"text_embeds": prompts["text_embeds"].to(dtype), "time_ids": time_ids}
        return unet(*self._unet_inputs(dtype, latents, timestep, prompts), added_cond_kwargs=added)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """No automatic casting on a device; the meta device, where operations are counted, knows none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of a module's first weight; diffusers' own `dtype` walks through all modules at each call."""
    return next(module.parameters()).dtype


def backbone_for(config: SDLlavaDiffusionConfig) -> StableDiffusionBackbone:
    """The backbone that a configuration describes, with fresh weights."""
    return (
        StableDiffusionBackbone(config) if config.text_encoder_2_config is None else StableDiffusionXLBackbone(config)
    )
