"""FLUX.1 dev and schnell: a transformer with blocks of two streams, then blocks of one sequence of text and image."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from huggingface_hub.errors import HFValidationError
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from .backbone import Prompts, dtype_of
from .diffusion_configuration import SDLlavaDiffusionConfig
from .flow import FlowBackbone
from .hooked_backbone import as_dict, published
from .repositories import missing, split_revision
from .text_encoder_configs import check_channels, check_vocabularies, check_width, empty_prompt, read_clip, read_t5

T5_LENGTH = 512
"""Tokens of a prompt in the published pipeline."""


class FluxBackbone(FlowBackbone):
    """`transformer`, `vae`, a CLIP in `text_encoder`, whose pooled output is read, and T5 in `text_encoder_2`."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.transformer = self._build_denoiser()
        self.text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(as_dict(config.text_encoder_config)))
        self.text_encoder_2 = T5EncoderModel(T5Config.from_dict(as_dict(config.text_encoder_2_config)))

    @classmethod
    def read_part_configs(cls, source: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
        """Read `transformer/`, `vae/`, `scheduler/`, `text_encoder/`, `tokenizer/`, and `_2` of the last two."""
        where = split_revision(source)
        try:
            transformer = FluxTransformer2DModel.load_config(subfolder="transformer", **where)
            vae = AutoencoderKL.load_config(subfolder="vae", **where)
            scheduler = FlowMatchEulerDiscreteScheduler.load_config(subfolder="scheduler", **where)
            clip, tokenizer = read_clip(where)
            t5, tokenizer_2 = read_t5(where, "_2", T5_LENGTH)
        except (OSError, HFValidationError) as error:
            raise missing(source, "FLUX model", error) from error
        check_channels(transformer["in_channels"] // 4, vae)
        check_width("transformer", transformer["joint_attention_dim"], t5.d_model)
        check_width("transformer", transformer["pooled_projection_dim"], clip.hidden_size, "pooled prompts")
        check_vocabularies([tokenizer, tokenizer_2], [clip, t5])
        parts = {
            "transformer_config": {**published(transformer), "_class_name": transformer["_class_name"]},
            "vae_config": published(vae),
            "scheduler_config": published(scheduler),
            "text_encoder_config": clip.to_diff_dict(),
            "text_encoder_2_config": t5.to_diff_dict(),
            "null_input_ids": empty_prompt(tokenizer),
            "null_input_ids_2": empty_prompt(tokenizer_2),
        }
        return parts, [tokenizer, tokenizer_2]

    def _build_denoiser(self) -> nn.Module:
        return FluxTransformer2DModel.from_config(as_dict(self.config.transformer_config))

    def _load_denoiser(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.transformer = FluxTransformer2DModel.from_pretrained(subfolder="transformer", torch_dtype=dtype, **options)

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.text_encoder = CLIPTextModel.from_pretrained(subfolder="text_encoder", dtype=dtype, **options)
        self.text_encoder_2 = T5EncoderModel.from_pretrained(subfolder="text_encoder_2", dtype=dtype, **options)

    @property
    def denoiser(self) -> nn.Module:
        """The transformer."""
        return self.transformer

    def encode_prompts(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor | None = None,
        input_ids_3: torch.Tensor | None = None,
    ) -> Prompts:
        """T5's last hidden states, padding included as in the pipeline, and CLIP's pooled output.

        Raises:
            ValueError: `input_ids_2` is missing.
        """
        if input_ids_2 is None:
            raise ValueError("FLUX has two tokenizers. Give diffusion_input_ids_2 in addition to diffusion_input_ids.")
        return {
            "encoder_hidden_states": self.text_encoder_2(input_ids_2).last_hidden_state,
            "pooled_projections": self.text_encoder(input_ids).pooler_output,
        }

    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        config: Any = self.transformer.config
        prompts = {
            "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        }
        return torch.empty(1, config.in_channels // 4, 2, 2), prompts

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a transformer, in its own dtype, on latents packed in squares of 2 by 2.

        FLUX.1-dev also reads the guidance scale that it was distilled with, `distilled_guidance`.
        """
        config: Any = denoiser.config
        dtype, device = dtype_of(denoiser), latents.device
        rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
        text = prompts["encoder_hidden_states"].to(dtype)
        guidance = None
        if config.guidance_embeds:
            guidance = torch.full((len(latents),), self.config.distilled_guidance, device=device)
        return denoiser(
            hidden_states=F.pixel_unshuffle(latents.to(dtype), 2).flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            pooled_projections=prompts["pooled_projections"].to(dtype),
            timestep=self._timesteps(latents, timestep) / 1000,
            img_ids=_positions(rows, columns, device),
            txt_ids=torch.zeros(text.shape[1], 3, device=device),
            guidance=guidance,
        )

    def predict(self, latents: torch.Tensor, timestep: int, prompts: Prompts) -> torch.Tensor:
        """As `DiffusionBackbone.predict`: the velocity, unpacked."""
        packed = self.denoise(self.transformer, latents, timestep, prompts).sample
        squares = packed.transpose(1, 2).unflatten(2, (latents.shape[-2] // 2, latents.shape[-1] // 2))
        return F.pixel_shuffle(squares, 2).float()


def _positions(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Position ids of image tokens, `(rows * columns, 3)`: 0, row, column."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1).float()
