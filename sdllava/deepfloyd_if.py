"""DeepFloyd IF, stage I: a UNet on pixels, conditioned on T5's text by keys that are added to its self-attention."""

from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import PreTrainedTokenizerBase, T5Config, T5EncoderModel

from .backbone import Prompts, dtype_of
from .diffusion_configuration import SDLlavaDiffusionConfig
from .hooked_backbone import HookedBackbone, as_dict, published
from .noise import ddpm_rates
from .repositories import missing, split_revision
from .text_encoder_configs import attention_mask, check_vocabularies, check_width, empty_prompt, read_t5

T5_LENGTH = 77
"""Tokens of a prompt in the published pipeline."""


class DeepFloydIFBackbone(HookedBackbone):
    """`unet` and `text_encoder`, a T5. The latents are the pixels."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.unet = self._build_denoiser()
        self.text_encoder = T5EncoderModel(T5Config.from_dict(as_dict(config.text_encoder_config)))
        self._rates = ddpm_rates(as_dict(config.scheduler_config))

    @classmethod
    def read_part_configs(cls, source: str) -> tuple[dict[str, Any], list[PreTrainedTokenizerBase]]:
        """Read `unet/`, `scheduler/`, `text_encoder/` and `tokenizer/`.

        Raises:
            OSError: A part cannot be read.
            ValueError: The parts do not fit together, or are those of an upscaler.
        """
        where = split_revision(source)
        try:
            unet = UNet2DConditionModel.load_config(subfolder="unet", **where)
            scheduler = DDPMScheduler.load_config(subfolder="scheduler", **where)
            encoder, tokenizer = read_t5(where, "", T5_LENGTH, lower_case=True)
        except (OSError, HFValidationError) as error:
            raise missing(source, "DeepFloyd IF model", error) from error
        if unet["in_channels"] != 3:
            raise ValueError(
                f"The UNet takes {unet['in_channels']} channels, so it is an upscaler. Use a stage I model, such as "
                "DeepFloyd/IF-I-M-v1.0."
            )
        check_width("UNet", unet["encoder_hid_dim"], encoder.d_model)
        check_vocabularies([tokenizer], [encoder])
        parts = {
            "unet_config": published(unet),
            "scheduler_config": published(scheduler),
            "text_encoder_config": encoder.to_diff_dict(),
            "null_input_ids": empty_prompt(tokenizer),
        }
        return parts, [tokenizer]

    def _build_denoiser(self) -> nn.Module:
        return UNet2DConditionModel.from_config(as_dict(self.config.unet_config))

    def _load_denoiser(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(subfolder="unet", torch_dtype=dtype, **options)

    def _load_text_encoders(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        self.text_encoder = T5EncoderModel.from_pretrained(subfolder="text_encoder", dtype=dtype, **options)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet."""
        return self.unet

    @property
    def image_weight(self) -> torch.Tensor:
        """The UNet's first weight, since the UNet reads pixels."""
        return next(self.unet.parameters())

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The pixels."""
        return pixel_values.float()

    def encode_prompts(
        self,
        input_ids: torch.Tensor,
        input_ids_2: torch.Tensor | None = None,
        input_ids_3: torch.Tensor | None = None,
    ) -> Prompts:
        """T5's last hidden states. The UNet reads padding like text, as in the pipeline; T5 does not."""
        mask = attention_mask(input_ids, self.text_encoder.config)
        return {"encoder_hidden_states": self.text_encoder(input_ids, attention_mask=mask).last_hidden_state}

    def noise_rates(self, timestep: int) -> tuple[float, float]:
        """sqrt(abar_t) and sqrt(1 - abar_t) of the 1000-step training schedule."""
        return self._rates[timestep]

    def _example_inputs(self) -> tuple[torch.Tensor, Prompts]:
        config: Any = self.unet.config
        size = 2 ** len(config.block_out_channels)
        prompts = {"encoder_hidden_states": torch.empty(1, 2, config.encoder_hid_dim)}  # a norm is over tokens
        return torch.empty(1, config.in_channels, size, size), prompts

    def denoise(
        self, denoiser: nn.Module, latents: torch.Tensor, timestep: int | torch.Tensor, prompts: Prompts
    ) -> Any:
        """Run a UNet, in its own dtype; see `DiffusionBackbone.denoise`."""
        dtype = dtype_of(denoiser)
        if not isinstance(timestep, torch.Tensor):
            timestep = torch.full((), timestep, device=latents.device)
        return denoiser(latents.to(dtype), timestep, prompts["encoder_hidden_states"].to(dtype))
