"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): transformers conditioned on T5."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PixArtTransformer2DModel
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, T5Config, T5EncoderModel

from .backbone import Prompts, dtype_of
from .configuration import SDLlavaDiffusionConfig
from .latent_backbone import LatentBackbone, as_dict, published
from .noise import ddpm_rates
from .repositories import missing, read_json, split_revision

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
            encoder = T5Config.from_pretrained(subfolder="text_encoder", **where)
            pipeline = read_json(source, "model_index.json") or {}
            tokenizer = AutoTokenizer.from_pretrained(
                subfolder="tokenizer",
                model_max_length=SIGMA_LENGTH if "Sigma" in pipeline.get("_class_name", "") else ALPHA_LENGTH,
                lower_case_prompts=True,
                **where,
            )
        except (OSError, HFValidationError) as error:
            raise missing(source, "PixArt model", error) from error
        _check_parts(transformer, vae, encoder, tokenizer)
        parts = {
            "transformer_config": {**published(transformer), "_class_name": transformer["_class_name"]},
            "vae_config": published(vae),
            "scheduler_config": published(scheduler),
            "text_encoder_config": encoder.to_diff_dict(),
            "null_input_ids": tokenizer("", padding="max_length")["input_ids"],
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

    def encode_prompts(self, input_ids: torch.Tensor, input_ids_2: torch.Tensor | None = None) -> Prompts:
        """T5's last hidden states, and which tokens are not padding."""
        is_text = input_ids != self.text_encoder.config.pad_token_id
        mask = is_text.flip(1).cummax(1).values.flip(1).long()  # "<pad>" written in a prompt is text
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


def _check_parts(
    transformer: dict[str, Any], vae: dict[str, Any], encoder: T5Config, tokenizer: PreTrainedTokenizerBase
) -> None:
    if transformer["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"The transformer takes {transformer['in_channels']} channels but the VAE gives {vae['latent_channels']}. "
            "Use the parts of one repository."
        )
    if transformer["caption_channels"] != encoder.d_model:
        raise ValueError(
            f"The transformer is conditioned on prompts of width {transformer['caption_channels']}, but the text "
            f"encoder gives {encoder.d_model}. Use the parts of one repository."
        )
    if len(tokenizer) > encoder.vocab_size:
        raise ValueError(
            f"The diffusion tokenizer has {len(tokenizer)} tokens, its text encoder only {encoder.vocab_size}. "
            "Use the parts of one repository."
        )
