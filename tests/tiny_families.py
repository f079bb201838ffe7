"""Tiny diffusion models of the other families with random weights, as folders in the published layouts."""

import json
from pathlib import Path
from typing import Any

import tiny
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from sdllava import SDLlavaDiffusionConfig

T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 16,  # bitsandbytes packs no less than 64 inputs on some CPUs
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
PIXART = {
    "patch_size": 2,
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 32,
    "caption_channels": 32,
    "use_additional_conditions": False,
}
SD3 = {
    "patch_size": 2,
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "joint_attention_dim": 64,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 6,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}
FLUX = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 16,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
IF = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 2,
    "attention_head_dim": 16,
    "cross_attention_dim": 32,
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "act_fn": "gelu",
    "norm_num_groups": 8,
}
"""Two attentions per level, at 8, 4 and 4 pixels, as in DeepFloyd/IF-I-M-v1.0 but smaller."""
FLOW_VAE = {
    **tiny.VAE,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
FLUX_CLASS = "FluxTransformer2DModel"
IF_SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "variance_type": "learned_range", "thresholding": True}
LINEAR_SCHEDULE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}


def t5_tokenizer() -> T5Tokenizer:
    """Single characters, as T5's tokenizer is published."""
    vocab: list[Any] = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(chr(code), -3.0) for code in range(33, 127)]
    vocab += [("▁" + chr(code), -2.5) for code in range(97, 123)]
    return T5Tokenizer(vocab=vocab, extra_ids=4)


def noise_image() -> Image.Image:
    """An image of random pixels."""
    return Image.effect_noise((40, 30), 80).convert("RGB")


def save_pixart(folder: Path, kind: str = "alpha", **fields: Any) -> Path:
    """A PixArt-alpha or -Sigma repository in the published layout."""
    PixArtTransformer2DModel(**{**PIXART, **fields}).save_pretrained(folder / "transformer")
    AutoencoderKL.from_config(tiny.VAE).save_pretrained(folder / "vae")
    T5EncoderModel(T5Config(**T5)).save_pretrained(folder / "text_encoder")
    t5_tokenizer().save_pretrained(folder / "tokenizer")
    DPMSolverMultistepScheduler(**LINEAR_SCHEDULE).save_pretrained(folder / "scheduler")
    name = {"alpha": "PixArtAlphaPipeline", "sigma": "PixArtSigmaPipeline"}[kind]
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return folder


def save_sd3(folder: Path, use_t5: bool = True, **fields: Any) -> Path:
    """A Stable Diffusion 3.5 repository in the published layout."""
    SD3Transformer2DModel(**{**SD3, **fields}).save_pretrained(folder / "transformer")
    AutoencoderKL.from_config(FLOW_VAE).save_pretrained(folder / "vae")
    clip = CLIPTextConfig.from_dict(dict(tiny.TEXT_ENCODER))
    for number, pad_token in (("", "<|endoftext|>"), ("_2", "!")):
        CLIPTextModelWithProjection(clip).save_pretrained(folder / f"text_encoder{number}")
        tiny.diffusion_tokenizer(pad_token).save_pretrained(folder / f"tokenizer{number}")
    if use_t5:
        T5EncoderModel(T5Config(**{**T5, "d_model": 64})).save_pretrained(folder / "text_encoder_3")
        t5_tokenizer().save_pretrained(folder / "tokenizer_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return folder


def save_flux(folder: Path, **fields: Any) -> Path:
    """A FLUX.1-dev repository in the published layout; `guidance_embeds=False` makes it FLUX.1-schnell."""
    FluxTransformer2DModel(**{**FLUX, **fields}).save_pretrained(folder / "transformer")
    AutoencoderKL.from_config(FLOW_VAE).save_pretrained(folder / "vae")
    CLIPTextModel(CLIPTextConfig.from_dict(dict(tiny.TEXT_ENCODER))).save_pretrained(folder / "text_encoder")
    tiny.diffusion_tokenizer("<|endoftext|>").save_pretrained(folder / "tokenizer")
    T5EncoderModel(T5Config(**T5)).save_pretrained(folder / "text_encoder_2")
    t5_tokenizer().save_pretrained(folder / "tokenizer_2")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    return folder


def save_if(folder: Path, **fields: Any) -> Path:
    """A DeepFloyd IF repository of stage I in the published layout."""
    UNet2DConditionModel(**{**IF, **fields}).save_pretrained(folder / "unet")
    T5EncoderModel(T5Config(**T5)).save_pretrained(folder / "text_encoder")
    t5_tokenizer().save_pretrained(folder / "tokenizer")
    DDPMScheduler(**IF_SCHEDULE).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "IFPipeline"}))
    return folder


def diffusion_config(kind: str, **fields: Any) -> SDLlavaDiffusionConfig:
    """A tiny tower of another family, deep enough for the taps of its presets."""
    t5, clip = T5Config(**T5).to_diff_dict(), dict(tiny.TEXT_ENCODER)
    wide = {**t5, "d_model": 64}
    parts: dict[str, dict[str, Any]] = {
        "pixart": {
            "transformer_config": {**PIXART, "num_layers": 15, "_class_name": "PixArtTransformer2DModel"},
            "vae_config": tiny.VAE,
            "text_encoder_config": t5,
            "scheduler_config": LINEAR_SCHEDULE,
        },
        "sd3": {
            "transformer_config": {**SD3, "num_layers": 14, "_class_name": "SD3Transformer2DModel"},
            "vae_config": FLOW_VAE,
            "text_encoder_config": clip,
            "text_encoder_2_config": clip,
            "text_encoder_3_config": wide,
            "scheduler_config": {"shift": 3.0},
            "null_input_ids_2": tiny.NULL_IDS,
            "null_input_ids_3": [1],
        },
        "flux": {
            "transformer_config": {**FLUX, "num_layers": 19, "num_single_layers": 10, "_class_name": FLUX_CLASS},
            "vae_config": FLOW_VAE,
            "text_encoder_config": clip,
            "text_encoder_2_config": t5,
            "scheduler_config": {"shift": 3.0},
            "null_input_ids_2": [1],
        },
        "if": {"unet_config": IF, "text_encoder_config": t5, "scheduler_config": IF_SCHEDULE},
    }
    defaults = {"null_input_ids": [1] if kind in ("pixart", "if") else tiny.NULL_IDS, "image_size": 64, "grid_size": 4}
    return SDLlavaDiffusionConfig(**{**parts[kind], **defaults, **fields})
