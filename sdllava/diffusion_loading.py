"""A diffusion tower from a published diffusers repository: its parts' configurations first, checked, then their weights,
safetensors only.
"""

from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from huggingface_hub.errors import HFValidationError
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
)

from .checkpoints import refuse_pickle
from .configuration import SDLlavaDiffusionConfig
from .diffusion import FeatureEnsemble, SDLlavaDiffusionModel
from .repositories import missing, split_revision
from .small_maps import multiply_small_maps


def read_diffusion_config(diffusion: str, **config) -> SDLlavaDiffusionConfig:
    """The configuration of a tower for a published diffusers repository or folder.

    Raises:
        OSError: it is not there, or is no diffusers repository.
        ValueError: its parts do not fit together, or a field of `config` does not fit them.
    """
    where = split_revision(diffusion)
    try:
        unet = UNet2DConditionModel.load_config(subfolder="unet", **where)
        vae = AutoencoderKL.load_config(subfolder="vae", **where)
        scheduler = DDPMScheduler.load_config(subfolder="scheduler", **where)
        text_encoder = CLIPTextConfig.from_pretrained(subfolder="text_encoder", **where)
        is_xl = unet.get("addition_embed_type") == "text_time"
        text_encoder_2 = CLIPTextConfig.from_pretrained(subfolder="text_encoder_2", **where) if is_xl else None
        tokenizers = load_diffusion_tokenizers(diffusion, is_xl)
    except (OSError, HFValidationError) as error:
        raise missing(diffusion, "diffusion model", error) from error
    _check_diffusion_parts(unet, vae, [e for e in (text_encoder, text_encoder_2) if e is not None], tokenizers)
    null_ids = [t("", padding="max_length", max_length=77, truncation=True)["input_ids"] for t in tokenizers]
    return SDLlavaDiffusionConfig(
        unet_config=_published(unet),
        vae_config=_published(vae),
        scheduler_config=_published(scheduler),
        text_encoder_config=text_encoder.to_diff_dict(),
        text_encoder_2_config=text_encoder_2 and text_encoder_2.to_diff_dict(),
        null_input_ids=null_ids[0],
        null_input_ids_2=null_ids[1] if is_xl else None,
        **config,
    )


def _published(config: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def load_diffusion_tokenizers(diffusion: str, is_xl: bool) -> list[PreTrainedTokenizerBase]:
    """The repository's one tokenizer, or SDXL's two."""
    folders = ["tokenizer", "tokenizer_2"] if is_xl else ["tokenizer"]
    return [CLIPTokenizer.from_pretrained(subfolder=folder, **split_revision(diffusion)) for folder in folders]


def _check_diffusion_parts(unet, vae, text_encoders, tokenizers) -> None:
    if unet["in_channels"] != vae["latent_channels"]:
        raise ValueError(
            f"the UNet takes {unet['in_channels']} channels but the VAE gives {vae['latent_channels']}: "
            "an inpainting, depth or upscaling model cannot be an encoder, use the text-to-image one"
        )
    width = sum(encoder.hidden_size for encoder in text_encoders)
    if unet["cross_attention_dim"] != width:
        raise ValueError(
            f"the UNet is conditioned on width {unet['cross_attention_dim']}, the text encoders give {width}"
        )
    for tokenizer, encoder in zip(tokenizers, text_encoders):
        if len(tokenizer) > encoder.vocab_size:
            raise ValueError(
                f"the diffusion tokenizer has {len(tokenizer)} tokens, its text encoder only {encoder.vocab_size}"
            )


def load_diffusion(
    diffusion: str, truncate: bool = True, dtype: torch.dtype | str = torch.float32, **config
) -> SDLlavaDiffusionModel:
    """Load a published diffusers repository or folder as a tower.

    Args:
        diffusion (`str`): repository id, `id@revision`, or local folder: `unet/`, `vae/`, `text_encoder/`,
            `tokenizer/`, `scheduler/` (SDXL: `text_encoder_2/`, `tokenizer_2/`), safetensors.
        truncate (`bool`): cut away what lies behind the deepest tap.
        dtype (`torch.dtype`): of the UNet and the text encoders; the VAE stays in float32 unless `vae_in_fp32=False`.
        config: fields of [`SDLlavaDiffusionConfig`].
    """
    config = read_diffusion_config(diffusion, truncate=truncate, **config)
    return load_tower(diffusion, config, as_dtype(dtype))


def load_tower(diffusion: str, config: SDLlavaDiffusionConfig, dtype: torch.dtype) -> SDLlavaDiffusionModel:
    """The tower of a configuration that [`read_diffusion_config`] gave, with the published weights."""
    where = split_revision(diffusion)
    with torch.device("meta"):
        tower = SDLlavaDiffusionModel(config)
    backbone = tower.backbone
    try:
        options = {"use_safetensors": True, "torch_dtype": dtype, **where}
        backbone.unet = multiply_small_maps(UNet2DConditionModel.from_pretrained(subfolder="unet", **options))
        options["torch_dtype"] = torch.float32 if config.vae_in_fp32 else dtype
        backbone.vae = AutoencoderKL.from_pretrained(subfolder="vae", **options)
        options = {"use_safetensors": True, "dtype": dtype, **where}
        backbone.text_encoder = CLIPTextModel.from_pretrained(subfolder="text_encoder", **options)
        if config.text_encoder_2_config is not None:
            backbone.text_encoder_2 = CLIPTextModelWithProjection.from_pretrained(subfolder="text_encoder_2", **options)
    except OSError as error:
        refuse_pickle(diffusion, error)
        raise missing(diffusion, "diffusion model's safetensors weights", error) from error
    if config.truncate:
        backbone.cut(tower.taps)
    tower.ensemble = FeatureEnsemble(config).to(dtype)
    tower.config.dtype = dtype
    tower.freeze()
    return tower.eval()


def load_tiny_vae(
    source: str, config: SDLlavaDiffusionConfig, device: torch.device, dtype: torch.dtype
) -> tuple[AutoencoderTiny, dict[str, Any]]:
    """A tiny autoencoder and its configuration; see [`~sdllava.diffusion.SDLlavaDiffusionModel.use_tiny_vae`]."""
    where = split_revision(source)
    try:
        found = _published(AutoencoderTiny.load_config(**where))
        if "encoder_block_out_channels" not in found:
            raise ValueError(f"{source!r} is no tiny autoencoder: give a diffusers AutoencoderTiny, such as TAESD")
        channels, scale = found["latent_channels"], 2 ** (len(found["encoder_block_out_channels"]) - 1)
        if (channels, scale) != (config.unet_config.get("in_channels", 4), config.vae_scale_factor):
            raise ValueError(
                f"{source!r} makes latents of {channels} channels at 1/{scale} of an image's size, which this UNet does"
                " not take: give one that was made for this diffusion model"
            )
        vae = AutoencoderTiny.from_pretrained(use_safetensors=True, torch_dtype=dtype, **where)
    except (OSError, HFValidationError) as error:
        refuse_pickle(source, error)
        raise missing(source, "tiny autoencoder", error) from error
    found.pop("block_out_channels", None)  # diffusers writes it and does not read it
    return vae.to(device), found


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A type of weights, as itself or by name (`"bfloat16"`)."""
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(known, torch.dtype):
        raise ValueError(f"dtype {dtype!r} is no type of weights: give torch.bfloat16 or 'bfloat16', for example")
    return known
