"""What a configuration needs to know of each diffusion family, computed from the published configurations of its parts.

To add a family, describe it here (no torch is imported), add it to `FAMILIES`, write its backbone in a module of its
own, and name that in `backbones.py`. Nothing else asks which model a tower holds.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from .taps import Tap, flux_taps, list_taps, pixart_taps, sd3_taps

PartConfigs = Mapping[str, dict[str, Any] | None]
"""The published configurations of a diffusion model's parts, by the field of `SDLlavaDiffusionConfig`."""


class DiffusionFamily(ABC):
    """One kind of text-to-image model."""

    name: ClassVar[str]
    default_tap: ClassVar[str]
    """Where the denoiser is read by default."""
    default_parts: ClassVar[dict[str, dict[str, Any]]] = {}
    """Configurations of parts that are left out."""
    default_image_size: ClassVar[int] = 512
    """Height and width of images that a tower reads by default, in pixels."""
    tokenizers: ClassVar[tuple[str, ...]]
    """Folders of the published tokenizers, in the order of `diffusion_input_ids`, `diffusion_input_ids_2`, `_3`."""
    prompt_tokenizers: ClassVar[tuple[int, ...]] = (0,)
    """Which of them make the tokens that the denoiser attends to, in their order."""
    transformer_classes: ClassVar[tuple[str, ...]] = ()
    """Class names in the published configuration of the transformer."""
    can_leave_out_t5: ClassVar[bool] = False
    """Whether the third text encoder is optional."""

    @classmethod
    def matches(cls, parts: PartConfigs) -> bool:
        """Whether the configurations of parts are of this family."""
        return (parts.get("transformer_config") or {}).get("_class_name") in cls.transformer_classes

    @abstractmethod
    def list_taps(self, parts: PartConfigs, latent_size: int) -> list[Tap]:
        """Every place where the denoiser can be read, in the order of its forward pass."""

    @abstractmethod
    def latent_scale(self, parts: PartConfigs) -> int:
        """Pixels per latent along one side of an image; 1 in pixel space."""

    @abstractmethod
    def latent_channels(self, parts: PartConfigs) -> int:
        """Channels of the latents."""

    @abstractmethod
    def prompt_width(self, parts: PartConfigs) -> int:
        """Channels of a prompt's tokens as the denoiser reads them."""

    @abstractmethod
    def train_timesteps(self, parts: PartConfigs) -> int:
        """Length of the training schedule; timesteps are below it."""

    @abstractmethod
    def native_image_size(self, parts: PartConfigs) -> int:
        """Height and width of the images that the model was trained on, in pixels."""

    def patch_size(self, parts: PartConfigs) -> int:
        """Pixels along one side of the smallest square that the denoiser distinguishes; images are multiples of it."""
        return 1

    def max_image_size(self, parts: PartConfigs) -> int | None:
        """The largest height and width of images that the denoiser has positions for, or None if there is no limit."""
        return None


class LatentDiffusion(DiffusionFamily):
    """A denoiser on the latents of a VAE."""

    def latent_scale(self, parts: PartConfigs) -> int:
        """Pixels per latent along one side of an image: a factor of 2 per level of the VAE's encoder."""
        vae = _part(parts, "vae_config")
        return 2 ** (len(vae["encoder_block_out_channels" if is_tiny_vae(vae) else "block_out_channels"]) - 1)

    def train_timesteps(self, parts: PartConfigs) -> int:
        """Length of the training schedule; timesteps are below it."""
        return _part(parts, "scheduler_config").get("num_train_timesteps", 1000)


class StableDiffusion(LatentDiffusion):
    """Stable Diffusion 1.x and 2.x: a UNet on the latents of a VAE, conditioned on one CLIP text encoder."""

    name = "stable_diffusion"
    default_tap = "U-L1-R1-B0-Cross-Q"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    default_parts: ClassVar[dict[str, dict[str, Any]]] = {
        "unet_config": {
            "sample_size": 64,
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
        "vae_config": {
            "sample_size": 768,
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
            "latent_channels": 4,
            "scaling_factor": 0.18215,
        },
        "text_encoder_config": {
            "model_type": "clip_text_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "projection_dim": 512,
            "vocab_size": 49408,
        },
        "scheduler_config": {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
        },
    }
    """The part of stabilityai/stable-diffusion-2-1-base's configurations that differs from the libraries' defaults."""

    @classmethod
    def matches(cls, parts: PartConfigs) -> bool:
        """Whether the denoiser is a UNet. Other families with a UNet are earlier in `FAMILIES`."""
        return parts.get("transformer_config") is None

    def list_taps(self, parts: PartConfigs, latent_size: int) -> list[Tap]:
        """Every place where the UNet can be read, in the order of its forward pass."""
        return list_taps(_part(parts, "unet_config"), latent_size)

    def latent_channels(self, parts: PartConfigs) -> int:
        """Channels of the latents."""
        return _part(parts, "unet_config").get("in_channels", 4)

    def prompt_width(self, parts: PartConfigs) -> int:
        """Channels of a prompt's tokens as the UNet reads them."""
        return _part(parts, "unet_config")["cross_attention_dim"]

    def native_image_size(self, parts: PartConfigs) -> int:
        """Height and width of the images that the model was trained on, in pixels."""
        return _part(parts, "unet_config").get("sample_size", 64) * self.latent_scale(parts)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, the second's pooled embedding, and time ids."""

    name = "stable_diffusion_xl"
    default_tap = "U-L0-R0-B7-Out"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")

    @classmethod
    def matches(cls, parts: PartConfigs) -> bool:
        """Whether the UNet takes time ids and a pooled prompt."""
        return (parts.get("unet_config") or {}).get("addition_embed_type") == "text_time"


class DeepFloydIF(DiffusionFamily):
    """DeepFloyd IF, stage I: a UNet on images of 64 pixels, whose self-attention also has keys of T5's text."""

    name = "deepfloyd_if"
    default_tap = "U-L1-R1-B0-Cross-Q"
    default_image_size = 64
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)

    @classmethod
    def matches(cls, parts: PartConfigs) -> bool:
        """Whether the UNet pools the prompt itself."""
        return (parts.get("unet_config") or {}).get("addition_embed_type") == "text"

    def list_taps(self, parts: PartConfigs, latent_size: int) -> list[Tap]:
        """Every place where the UNet can be read, in the order of its forward pass."""
        return list_taps(_part(parts, "unet_config"), latent_size)

    def latent_scale(self, parts: PartConfigs) -> int:
        """1: the latents are the pixels."""
        return 1

    def latent_channels(self, parts: PartConfigs) -> int:
        """Channels of an image."""
        return _part(parts, "unet_config")["in_channels"]

    def prompt_width(self, parts: PartConfigs) -> int:
        """Channels of a prompt's tokens as the UNet reads them, before its own projection."""
        return _part(parts, "unet_config")["encoder_hid_dim"]

    def train_timesteps(self, parts: PartConfigs) -> int:
        """Length of the training schedule; timesteps are below it."""
        return _part(parts, "scheduler_config").get("num_train_timesteps", 1000)

    def native_image_size(self, parts: PartConfigs) -> int:
        """Height and width of the images that the model was trained on, in pixels."""
        return _part(parts, "unet_config")["sample_size"]


class PixArt(LatentDiffusion):
    """PixArt-alpha and PixArt-Sigma: a transformer on the latents of a VAE, cross-attending to T5's text."""

    name = "pixart"
    default_tap = "T-B14-Cross-Q"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    transformer_classes = ("PixArtTransformer2DModel", "Transformer2DModel")  # older repositories: the general class

    def list_taps(self, parts: PartConfigs, latent_size: int) -> list[Tap]:
        """Every place where the transformer can be read, in the order of its forward pass."""
        return pixart_taps(_part(parts, "transformer_config"), latent_size)

    def latent_channels(self, parts: PartConfigs) -> int:
        """Channels of the latents."""
        return _part(parts, "transformer_config")["in_channels"]

    def prompt_width(self, parts: PartConfigs) -> int:
        """Channels of a prompt's tokens as the transformer reads them, before its own projection."""
        return _part(parts, "transformer_config")["caption_channels"]

    def native_image_size(self, parts: PartConfigs) -> int:
        """Height and width of the images that the model was trained on, in pixels."""
        return _part(parts, "transformer_config")["sample_size"] * self.latent_scale(parts)

    def patch_size(self, parts: PartConfigs) -> int:
        """Pixels along one side of a token; images are multiples of it."""
        return self.latent_scale(parts) * _part(parts, "transformer_config")["patch_size"]


class StableDiffusion3(LatentDiffusion):
    """Stable Diffusion 3 and 3.5: joint attention over image and text of two CLIPs and, optionally, T5; flow noise."""

    name = "stable_diffusion_3"
    default_tap = "T-B9-Norm"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2", "tokenizer_3")
    prompt_tokenizers: ClassVar[tuple[int, ...]] = (0, 2)
    transformer_classes = ("SD3Transformer2DModel",)
    can_leave_out_t5 = True

    def list_taps(self, parts: PartConfigs, latent_size: int) -> list[Tap]:
        """Every place where the transformer can be read, in the order of its forward pass."""
        return sd3_taps(_part(parts, "transformer_config"), latent_size)

    def latent_channels(self, parts: PartConfigs) -> int:
        """Channels of the latents."""
        return _part(parts, "transformer_config")["in_channels"]

    def prompt_width(self, parts: PartConfigs) -> int:
        """Channels of a prompt's tokens as the transformer reads them, before its own projection."""
        return _part(parts, "transformer_config")["joint_attention_dim"]

    def native_image_size(self, parts: PartConfigs) -> int:
        """Height and width of the images that the model was trained on, in pixels."""
        return _part(parts, "transformer_config")["sample_size"] * self.latent_scale(parts)

    def patch_size(self, parts: PartConfigs) -> int:
        """Pixels along one side of a token; images are multiples of it."""
        return self.latent_scale(parts) * _part(parts, "transformer_config")["patch_size"]

    def max_image_size(self, parts: PartConfigs) -> int | None:
        """Height and width of an image that uses every stored position embedding."""
        return _part(parts, "transformer_config")["pos_embed_max_size"] * self.patch_size(parts)


class Flux(LatentDiffusion):
    """FLUX.1: joint attention over image and T5's text, CLIP's pooled text, flow noise, latents packed 2 by 2."""

    name = "flux"
    default_tap = "T-B28-Norm"
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer", "tokenizer_2")
    prompt_tokenizers: ClassVar[tuple[int, ...]] = (1,)
    transformer_classes = ("FluxTransformer2DModel",)

    def list_taps(self, parts: PartConfigs, latent_size: int) -> list[Tap]:
        """Every place where the transformer can be read, in the order of its forward pass."""
        return flux_taps(_part(parts, "transformer_config"), latent_size)

    def latent_channels(self, parts: PartConfigs) -> int:
        """Channels of the latents, before they are packed."""
        return _part(parts, "transformer_config")["in_channels"] // 4

    def prompt_width(self, parts: PartConfigs) -> int:
        """Channels of a prompt's tokens as the transformer reads them, before its own projection."""
        return _part(parts, "transformer_config")["joint_attention_dim"]

    def native_image_size(self, parts: PartConfigs) -> int:
        """Height and width that the published pipeline makes by default, in pixels."""
        return 128 * self.latent_scale(parts)

    def patch_size(self, parts: PartConfigs) -> int:
        """Pixels along one side of a token; images are multiples of it."""
        return 2 * self.latent_scale(parts)


FAMILIES: tuple[type[DiffusionFamily], ...] = (
    PixArt,
    StableDiffusion3,
    Flux,
    DeepFloydIF,
    StableDiffusionXL,
    StableDiffusion,
)
"""The families; the first that matches is used, so a new one with a UNet comes before Stable Diffusion."""


def find_family(parts: PartConfigs) -> DiffusionFamily:
    """The family that the configurations of parts describe.

    Raises:
        ValueError: The transformer's class is not supported.
    """
    for family in FAMILIES:
        if family.matches(parts):
            return family()
    name = (parts["transformer_config"] or {}).get("_class_name")
    known = ", ".join(name for family in FAMILIES for name in family.transformer_classes)
    raise ValueError(f"The diffusion transformer {name!r} is not supported. Use one of {known}.")


def is_tiny_vae(vae_config: Mapping[str, Any]) -> bool:
    """Whether a VAE's configuration is that of diffusers' `AutoencoderTiny`."""
    return "encoder_block_out_channels" in vae_config


def _part(parts: PartConfigs, name: str) -> dict[str, Any]:
    config = parts[name]
    if config is None:
        raise ValueError(f"This diffusion family needs {name!r}, which is None. Give the published configuration.")
    return config
