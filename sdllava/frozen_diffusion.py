"""The parts of the diffusion tower: a frozen text-to-image model, loaded as published, and the trainable ensemble."""

from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .backbones import build_backbone, freeze
from .checkpoints import CheckpointMixin
from .configuration import SDLlavaDiffusionConfig
from .guidance import FeatureEnsemble, ZeroLinear


class FrozenDiffusionModel(CheckpointMixin, PreTrainedModel):
    """Builds and loads the stock modules under `backbone`, and keeps them frozen.

    For Stable Diffusion they are `unet`, `vae`, `text_encoder` (and `text_encoder_2`). `SDLlavaDiffusionModel` reads
    features from them.
    """

    config: SDLlavaDiffusionConfig
    config_class = SDLlavaDiffusionConfig
    base_model_prefix = "diffusion_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"^(lm_head|model)\."]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__(config)
        self.taps = config.resolved_taps()
        self.backbone = build_backbone(config)
        if config.truncate:
            self.backbone.cut(self.taps)
        self.ensemble = FeatureEnsemble(config)
        self._keep_in_fp32_modules_strict = ["vae"] if config.vae_in_fp32 else []
        self.freeze()
        self.post_init()

    def load_published(self, diffusion: str, dtype: torch.dtype) -> Self:
        """Fill a tower that was built on the meta device with the weights of the repository that it describes.

        Args:
            diffusion: Where its configuration was read.
            dtype: Of the weights; the VAE stays in float32 where the configuration says so.

        Raises:
            OSError: A part cannot be read.
            ValueError: The weights are pickles.
        """
        self.backbone.load_published(diffusion, dtype)
        if self.config.truncate:
            self.backbone.cut(self.taps)
        self.ensemble = FeatureEnsemble(self.config).to(dtype)
        self.config.dtype = dtype
        self.freeze()
        return self.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; of a whole model's checkpoint, only the tower is read."""
        kwargs.setdefault("key_mapping", {r"^model\.diffusion_tower\.": ""})
        return super().from_pretrained(*args, **kwargs)

    def use_tiny_vae(self, source: str) -> None:
        """Encode images with a tiny autoencoder instead of the VAE, also in checkpoints saved from now on.

        It costs a ninth of the VAE's operations, and its features differ slightly.

        Args:
            source (`str`): Repository id, `id@revision` or folder of a diffusers `AutoencoderTiny`, for example
                `madebyollin/taesd`.

        Raises:
            OSError: It cannot be read.
            ValueError: This family has no VAE, its latents do not fit the UNet, or its weights are pickles.
        """
        self.config.vae_config = self.backbone.load_tiny_vae(source)
        self.freeze()

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.backbone.denoiser

    @property
    def vae(self) -> Any:
        """The image encoder of a latent diffusion model."""
        return self.backbone.vae

    @property
    def text_encoder(self) -> Any:
        """The first text encoder."""
        return self.backbone.text_encoder

    def freeze(self) -> None:
        """Stop gradients to the diffusion model's own weights; the ensemble's weights stay trainable."""
        freeze(self.backbone)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but a frozen diffusion model stays in evaluation mode."""
        super().train(mode)
        self.backbone.train(mode and any(p.requires_grad for p in self.backbone.parameters()))
        return self

    def _init_weights(self, module: nn.Module) -> None:
        """diffusers' modules initialise themselves when they are built."""  # noqa: D403  # the library's own name
        self.backbone.compute_buffers(module)
        if isinstance(module, FeatureEnsemble) and module.mode == "learned":
            init.zeros_(module.weight)
        elif isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)
        elif module is getattr(self.ensemble, "gate_norm", None):
            init.ones_(module.weight)
            init.zeros_(module.bias)
