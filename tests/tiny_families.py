"""Tiny diffusion models of the other families with random weights, as folders in the published layouts."""

import json
from pathlib import Path
from typing import Any

import tiny
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from PIL import Image
from transformers import T5Config, T5EncoderModel, T5Tokenizer

T5 = {
    "vocab_size": 128,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}
PIXART = {
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
