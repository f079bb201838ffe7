"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): a transformer whose image and text tokens attend to each other."""

from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from huggingface_hub.errors import HFValidationError
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from .backbone import Prompts, dtype_of
from .diffusion_configuration import SDLlavaDiffusionConfig
from .flow import FlowBackbone
from .hooked_backbone import as_dict, published
from .repositories import missing, split_revision
from .text_encoder_configs import check_channels, check_vocabularies, check_width, empty_prompt, read_clip, read_t5

T5_LENGTH = 256
"""Tokens of T5's part of a prompt in the published pipeline; zeros without T5."""


class StableDiffusion3Backbone(FlowBackbone):
    """`transformer`, `vae`, two CLIPs in `text_encoder` and `text_encoder_2`, and T5 in `text_encoder_3` if used."""

    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.transformer = self._build_denoiser()
        for name in ("text_encoder", "text_encoder_2"):
            encoder_config = CLIPTextConfig.from_dict(as_dict(getattr(config, f"{name}_config")))
            setattr(self, name, CLIPTextModelWithProjection(encoder_config))
        if config.use_t5:
            self.text_encoder_3 = T5EncoderModel(T5Config.from_dict(as_dict(config.text_encoder_3_config)))

    @classmethod
    def read_part_configs(cls, source: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
        """Read `transformer/`, `vae/`, `scheduler/`, and three of `text_encoder/` and `tokenizer/`, or two of them."""
        where = split_revision(source)
        try:
            transformer = SD3Transformer2DModel.load_config(subfolder="transformer", **where)
            vae = AutoencoderKL.load_config(subfolder="vae", **where)
            scheduler = FlowMatchEulerDiscreteScheduler.load_config(subfolder="scheduler", **where)
            clips = [read_clip(where, number) for number in ("", "_2")]
        except (OSError, HFValidationError) as error:
            raise missing(source, "Stable Diffusion 3 model", error) from error
        try:
            t5 = [read_t5(where, "_3", T5_LENGTH)]
        except OSError:
            t5 = []  # published without; the configuration raises where it is needed
        encoders, tokenizers = ([*part] for part in zip(*clips, *t5, strict=True))
        _check_parts(transformer, vae, encoders)
        check_vocabularies(tokenizers, encoders)
        empty = [empty_prompt(tokenizer) for tokenizer in tokenizers]
        parts = {
            "transformer_config": {**published(transformer), "_class_name": transformer["_class_name"]},
            "vae_config": published(vae),
            "scheduler_config": published(scheduler),
            "text_encoder_config": encoders[0].to_diff_dict(),
            "text_encoder_2_config": encoders[1].to_diff_dict(),
            "text_encoder_3_config": encoders[2].to_diff_dict() if t5 else None,
            "null_input_ids": empty[0],
            "null_input_ids_2": empty[1],
            "null_input_ids_3": empty[2] if t5 else None,
        }
        return parts, tokenizers

    def _build_denoiser(self) -> nn.Module:
        return SD3Transformer2DModel.from_config(as_dict(self.config.transformer_config))

    def _load_denoiser(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.transformer = SD3Transformer2DModel.from_pretrained(subfolder="transformer", torch_dtype=dtype, **options)

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        for name in ("text_encoder", "text_encoder_2"):
            encoder = CLIPTextModelWithProjection.from_pretrained(subfolder=name, dtype=dtype, **options)
            setattr(self, name, encoder)
        if self.config.use_t5:
            self.text_encoder_3 = T5EncoderModel.from_pretrained(subfolder="text_encoder_3", dtype=dtype, **options)

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
        """Both CLIPs' second-last hidden states on channels, then T5's last ones, and the CLIPs' pooled embeddings.

        Padding is read like text, as the pipeline does. Without T5 its 256 rows are zero.

        Raises:
            ValueError: `input_ids_2` is missing, or `input_ids_3` with T5.
        """
        if input_ids_2 is None or (self.config.use_t5 and input_ids_3 is None):
            raise ValueError(
                f"Stable Diffusion 3 has {3 if self.config.use_t5 else 2} tokenizers. Give diffusion_input_ids_2"
                f"{' and diffusion_input_ids_3' if self.config.use_t5 else ''} in addition to diffusion_input_ids."
            )
        first = self.text_encoder(input_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids_2, output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = F.pad(clip, (0, self.config.prompt_width - clip.shape[-1]))
        if self.config.use_t5:
            t5 = self.text_encoder_3(input_ids_3).last_hidden_state.to(clip.dtype)
        else:
            t5 = clip.new_zeros(len(clip), T5_LENGTH, clip.shape[-1])
        pooled = torch.cat([first.text_embeds, second.text_embeds], dim=-1)
        return {"encoder_hidden_states": torch.cat([clip, t5], dim=1), "pooled_projections": pooled}

    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        config: Any = self.transformer.config
        prompts = {
            "encoder_hidden_states": torch.empty(1, 1, config.joint_attention_dim),
            "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        }
        return torch.empty(1, config.in_channels, config.patch_size, config.patch_size), prompts

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a transformer, in its own dtype; see `DiffusionBackbone.denoise`."""
        dtype = dtype_of(denoiser)
        return denoiser(
            latents.to(dtype),
            encoder_hidden_states=prompts["encoder_hidden_states"].to(dtype),
            pooled_projections=prompts["pooled_projections"].to(dtype),
            timestep=self._timesteps(latents, timestep),
        )


def _check_parts(transformer: dict[str, Any], vae: dict[str, Any], encoders: list[Any]) -> None:
    check_channels(transformer["in_channels"], vae)
    pooled = sum(encoder.projection_dim for encoder in encoders[:2])
    check_width("transformer", transformer["pooled_projection_dim"], pooled, "pooled prompts")
    width = transformer["joint_attention_dim"]
    if len(encoders) > 2:
        check_width("transformer", width, encoders[2].d_model)
    if (clip := sum(encoder.hidden_size for encoder in encoders[:2])) > width:
        check_width("transformer", width, clip)
