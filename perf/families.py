"""Operations and memory of each diffusion family at 512 pixels, counted on the meta device.

For each preset: one pass of the denoiser, whole and up to the preset's tap, one prompt through the text encoders, and
one image through the VAE. Then the memory of a first question in bfloat16, with the language model and T5 in 4 bits.

    python perf/families.py                       # every preset; minutes, without weights in memory
    python perf/families.py --preset flux-dev
"""

from typing import Annotated, Any

import memory
import models
import torch
import typer
from measure import count_gflop
from rich.console import Console
from rich.table import Table
from torch import nn

from sdllava import SDLlavaConfig, SDLlavaDiffusionConfig, SDLlavaDiffusionModel
from sdllava.presets import PRESETS
from sdllava.taps import Tap

T5_XXL = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
VAE_16 = {
    **models.StableDiffusion.default_parts["vae_config"],
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": 0.0609,
}
PIXART = {
    "_class_name": "PixArtTransformer2DModel",
    "sample_size": 64,
    "patch_size": 2,
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "use_additional_conditions": False,
}
SD3_MEDIUM = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM = {**SD3_MEDIUM, "pos_embed_max_size": 384, "dual_attention_layers": list(range(13)), "qk_norm": "rms_norm"}
SD35_LARGE = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
IF_M = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
    "block_out_channels": [192, 384, 576, 768],
    "layers_per_block": 3,
    "attention_head_dim": 64,
    "cross_attention_dim": 768,
    "encoder_hid_dim": 4096,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "cross_attention_norm": "group_norm",
    "resnet_time_scale_shift": "scale_shift",
    "resnet_skip_time_act": True,
    "act_fn": "gelu",
}
"""From memory, not from the gated repository."""

_SD3 = {
    "vae_config": VAE_16,
    "text_encoder_config": models.CLIP_L_TEXT,
    "text_encoder_2_config": models.OPEN_CLIP_BIG_G_TEXT,
    "text_encoder_3_config": T5_XXL,
    "scheduler_config": {"shift": 3.0},
    "null_input_ids": [0] * 77,
    "null_input_ids_2": [0] * 77,
    "null_input_ids_3": [0] * 256,
}
_FLUX = {
    "vae_config": VAE_16,
    "text_encoder_config": models.CLIP_L_TEXT,
    "text_encoder_2_config": T5_XXL,
    "scheduler_config": {"shift": 3.0},
    "null_input_ids": [0] * 77,
    "null_input_ids_2": [0] * 512,
}
_PIXART = {
    "transformer_config": PIXART,
    "vae_config": models.StableDiffusion.default_parts["vae_config"],
    "text_encoder_config": T5_XXL,
    "scheduler_config": {"beta_schedule": "linear"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd21": {},
    "sdxl": models.SDXL,
    "pixart-alpha": {**_PIXART, "null_input_ids": [0] * 120},
    "pixart-sigma": {**_PIXART, "null_input_ids": [0] * 300},
    "sd3-medium": {"transformer_config": SD3_MEDIUM, **_SD3},
    "sd35-medium": {"transformer_config": SD35_MEDIUM, **_SD3},
    "sd35-large": {"transformer_config": SD35_LARGE, **_SD3},
    "flux-dev": {"transformer_config": FLUX, **_FLUX},
    "flux-schnell": {"transformer_config": {**FLUX, "guidance_embeds": False}, **_FLUX},
    "if-m": {
        "unet_config": IF_M,
        "text_encoder_config": T5_XXL,
        "scheduler_config": {"beta_schedule": "squaredcos_cap_v2"},
        "null_input_ids": [0] * 77,
        "image_size": 64,
    },
}
"""The published configurations, by preset, with empty prompts of the published lengths."""
META = torch.device("meta")


def tower_config(preset: str, **fields: Any) -> SDLlavaDiffusionConfig:
    """The tower of a preset at s = 4 and a grid of 16."""
    return SDLlavaDiffusionConfig(**{**FAMILIES[preset], **PRESETS[preset].values, **fields})


def operations(preset: str) -> tuple[float, float, float, float, float]:
    """TFLOP of one denoiser pass whole and up to the tap, of one prompt, of one image; parameters up to the tap.

    Args:
        preset: A key of `FAMILIES`.
    """
    with META:
        whole = SDLlavaDiffusionModel(tower_config(preset, truncate=False)).requires_grad_(False)
        cut = SDLlavaDiffusionModel(tower_config(preset))
    config, backbone = whole.config, whole.backbone
    with META, torch.no_grad():
        ids = [torch.zeros(1, len(row), dtype=torch.long) for row in config.null_prompt_ids]
        text, prompts = count_gflop(lambda: encode(backbone, ids))
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        image, latents = count_gflop(lambda: backbone.encode_image(pixels))
        complete, _ = count_gflop(lambda: backbone.denoise(backbone.denoiser, latents, config.timesteps[0], prompts))
        to_tap, _ = count_gflop(lambda: read(whole, latents, prompts, whole.taps))
    parameters = sum(p.numel() for p in cut.backbone.denoiser.parameters())
    return complete / 1e3, to_tap / 1e3, text / 1e3, image / 1e3, parameters / 1e9


def encode(backbone: Any, ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts of meta tensors. T5's mask, which needs values, changes no count."""
    if backbone.config.family.name not in ("pixart", "deepfloyd_if"):
        return backbone.encode_prompts(*ids)
    return {
        "encoder_hidden_states": backbone.text_encoder(*ids).last_hidden_state,
        "encoder_attention_mask": torch.ones_like(ids[0]),
    }


def read(tower: Any, latents: torch.Tensor, prompts: Any, taps: list[Tap]) -> list[torch.Tensor]:
    """One pass up to the taps."""
    return tower.backbone.read(latents, tower.config.timesteps[0], prompts, taps)


def first_question(preset: str) -> dict[str, float]:
    """GiB of each part during a first question: bfloat16, the VAE in float32, the language model and T5 in 4 bits.

    4 bits hold the linear layers of T5's blocks, except for `wo`, which transformers does not quantise.
    """
    config: SDLlavaConfig = models.model_config("full", diffusion_config=tower_config(preset))
    parts = memory.part_bytes(config, torch.bfloat16, four_bit=True)
    saved = torch.bfloat16.itemsize - memory.BITS_PER_QUANTIZED_WEIGHT / 8
    with META:
        tower = SDLlavaDiffusionModel(config.diffusion_config)
    for name, part in tower.backbone.named_children():
        if hasattr(part, "encoder") and hasattr(part.encoder, "block"):  # a T5
            linear = [m for n, m in part.encoder.block.named_modules() if isinstance(m, nn.Linear) and "wo" not in n]
            parts[name] -= saved * sum(m.weight.numel() for m in linear)
    parts["position embeddings"] = sum(
        b.numel() * torch.bfloat16.itemsize for n, b in tower.backbone.named_buffers() if "pos_embed" in n
    )
    parts["intermediate results, upper bound"] = peak_results(tower)
    return {name: size / 2**30 for name, size in parts.items()}


def peak_results(tower: Any) -> float:
    """Peak bytes of intermediate results in the image encoder, in the text encoders and in both halves of a pass."""
    config, backbone = tower.config, tower.backbone.to(torch.bfloat16)
    if hasattr(backbone, "vae"):
        backbone.vae.float()
    with META, torch.no_grad():
        ids = [torch.zeros(1, len(row), dtype=torch.long) for row in config.null_prompt_ids]
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        prompts = encode(backbone, ids)
        latents = backbone.encode_image(pixels)
        both = {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in prompts.items()}
        calls = (
            lambda: backbone.encode_image(pixels),
            lambda: encode(backbone, ids),
            lambda: read(tower, latents, both, tower.taps),
        )
        peaks = []
        for call in calls:
            with memory.LiveResults(tower) as live:
                call()
            peaks.append(live.peak)
    return max(peaks)


def main(
    preset: Annotated[list[str] | None, typer.Option(help="Only these. Repeatable.")] = None,
) -> None:
    """Print operations and memory of each preset."""
    console = Console(width=160)
    names = preset or list(FAMILIES)
    table = Table(
        "preset", "tap", "whole pass", "to the tap", "one prompt", "one image", "denoiser kept", title="TFLOP", box=None
    )
    for name in names:
        *tflop, kept = operations(name)
        tap = PRESETS[name].taps[0]
        table.add_row(name, tap, *(f"{value:.2f}" for value in tflop), f"{kept:.2f}B parameters")
    console.print(table)
    for name in names:
        parts = first_question(name)
        console.print(f"\n{name}: {sum(parts.values()):.1f} GiB for a first question")
        console.print(", ".join(f"{part} {size:.2f}" for part, size in parts.items() if size >= 0.005))


if __name__ == "__main__":
    typer.run(main)
