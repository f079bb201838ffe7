"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): transformers conditioned on T5."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from .backbone import Prompts, dtype_of
from .diffusion_configuration import SDLlavaDiffusionConfig
from .hooked_backbone import as_dict, published
from .latent_backbone import LatentBackbone
from .noise import ddpm_rates
from .repositories import missing, read_json, split_revision
from .text_encoder_configs import attention_mask, check_channels, check_vocabularies, check_width, empty_prompt, read_t5

ALPHA_LENGTH, SIGMA_LENGTH = 120, 300
"""Tokens of a prompt in the published pipelines of PixArt-alpha and PixArt-Sigma."""


class PixArtBackbone(LatentBackbone):
    """`transformer`, `vae` and `text_encoder`, a T5."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.transformer = self._build_denoiser()
        self.text_encoder = T5EncoderModel(T5Config.from_dict(as_dict(config.text_encoder_config)))
        self._rates = ddpm_rates(as_dict(config.scheduler_config))

    @classmethod
    def read_part_configs(cls, source: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
        """Read `transformer/`, `vae/`, `scheduler/`, `text_encoder/` and `tokenizer/`."""
        where = split_revision(source)
        try:
            transformer = PixArtTransformer2DModel.load_config(subfolder="transformer", **where)
            vae = AutoencoderKL.load_config(subfolder="vae", **where)
            scheduler = DDPMScheduler.load_config(subfolder="scheduler", **where)
            pipeline = read_json(source, "model_index.json") or {}
            length = SIGMA_LENGTH if "Sigma" in pipeline.get("_class_name", "") else ALPHA_LENGTH
            encoder, tokenizer = read_t5(where, "", length, lower_case=True)
        except (OSError, HFValidationError) as error:
            raise missing(source, "PixArt model", error) from error
        check_channels(transformer["in_channels"], vae)
        check_width("transformer", transformer["caption_channels"], encoder.d_model)
        check_vocabularies([tokenizer], [encoder])
        parts = {
            "transformer_config": {**published(transformer), "_class_name": transformer["_class_name"]},
            "vae_config": published(vae),
            "scheduler_config": published(scheduler),
            "text_encoder_config": encoder.to_diff_dict(),
            "null_input_ids": empty_prompt(tokenizer),
        }
        return parts, [tokenizer]

    def _build_denoiser(self) -> nn.Module:
        return PixArtTransformer2DModel.from_config(as_dict(self.config.transformer_config))

    def _load_denoiser(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.transformer = PixArtTransformer2DModel.from_pretrained(
            subfolder="transformer", torch_dtype=dtype, **options
        )

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.text_encoder = T5EncoderModel.from_pretrained(subfolder="text_encoder", dtype=dtype, **options)

    @property
    def denoiser(self) -> nn.Module:
        """The transformer."""
        return self.transformer

    def compute_buffers(self, module: nn.Module) -> None:
        """Compute the position embeddings of the patches."""
        if not isinstance(module, PatchEmbed):
            return
        values = get_2d_sincos_pos_embed(
            module.pos_embed.shape[-1],
            module.base_size,
            base_size=module.base_size,
            interpolation_scale=module.interpolation_scale,
            output_type="pt",
            device=module.pos_embed.device,
        )
        module.pos_embed = values.to(module.pos_embed.dtype)[None]

    def encode_prompts(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor | None = None,
        input_ids_3: torch.Tensor | None = None,
    ) -> Prompts:
        """T5's last hidden states, and which tokens are not padding."""
        mask = attention_mask(input_ids, self.text_encoder.config)
        hidden_states = self.text_encoder(input_ids, attention_mask=mask).last_hidden_state
        return {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}

    def noise_rates(self, timestep: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t) of the 1000-step training schedule."""
        return self._rates[timestep]

    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        config: Any = self.transformer.config
        hidden_states = torch.empty(1, 1, config.caption_channels)
        mask = torch.ones(1, 1, dtype=torch.long)
        prompts = {"encoder_hidden_states": hidden_states, "encoder_attention_mask": mask}
        return torch.empty(1, config.in_channels, config.sample_size, config.sample_size), prompts

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a transformer, in its own dtype; those for several resolutions also get the configured image size."""
        dtype, rows, device = dtype_of(denoiser), len(latents), latents.device
        if isinstance(timestep, torch.Tensor):
            timestep = timestep.expand(rows)
        else:
            timestep = torch.full((rows,), timestep, device=device)
        size: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if getattr(denoiser, "use_additional_conditions", False):
            resolution = torch.full((rows, 2), self.config.image_size, device=device, dtype=dtype)
            size = {"resolution": resolution, "aspect_ratio": resolution.new_ones(rows, 1)}
        return denoiser(
            latents.to(dtype),
            prompts["encoder_hidden_states"].to(dtype),
            timestep,
            size,
            encoder_attention_mask=prompts["encoder_attention_mask"],
        )
