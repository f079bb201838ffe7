"""Operations, memory and time of each diffusion family at 512 pixels (DeepFloyd IF: 64).

For each model: one pass of the denoiser, whole and up to the preset's tap, one prompt through the text encoders, and
one image through the VAE. Then the memory of a first question in bfloat16, with the language model and T5 in 4 bits.
Both are counted on the meta device, without weights in memory. `--measure` times the same calls on random weights.

    python perf/families.py                       # every model; about 6 CPU minutes
    python perf/families.py --model flux-dev --tap T-B18-Out
    python perf/families.py --model pixart-alpha --measure --no-text
"""

from pathlib import Path
from typing import Annotated, Any

import memory
import models
import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Device, DType, Repeats, count_gflop
from rich.console import Console
from rich.table import Table
from torch import nn

from sdllava import SDLlavaConfig, SDLlavaDiffusionConfig, SDLlavaDiffusionModel
from sdllava.presets import PRESETS
from sdllava.train.activations import FusedAttention

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


def deepfloyd_if(width: int, head_width: int = 64) -> dict[str, Any]:
    """A UNet of DeepFloyd IF's stage I.

    The repositories are gated. XL's channels and layers per block are those that descriptions of its configuration
    give; M's and L's are from memory. The parameters agree with the published 400 million, 900 million and 4.3 billion.

    Args:
        width: Channels of the first level.
        head_width: Channels of an attention head.
    """
    return {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "down_block_types": ["ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 3],
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": [*["SimpleCrossAttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        "block_out_channels": [width, 2 * width, 3 * width, 4 * width],
        "layers_per_block": 3,
        "attention_head_dim": head_width,
        "cross_attention_dim": 4 * width,
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "cross_attention_norm": "group_norm",
        "resnet_time_scale_shift": "scale_shift",
        "resnet_skip_time_act": True,
        "act_fn": "gelu",
    }


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
_IF = {
    "text_encoder_config": T5_XXL,
    "scheduler_config": {"beta_schedule": "squaredcos_cap_v2"},
    "null_input_ids": [0] * 77,
    "image_size": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "sd15": models.SD_1_5,
    "sd21": {},
    "sdxl": models.SDXL,
    "pixart-alpha": {**_PIXART, "null_input_ids": [0] * 120},
    "pixart-sigma": {**_PIXART, "null_input_ids": [0] * 300},
    "sd3-medium": {"transformer_config": SD3_MEDIUM, **_SD3},
    "sd35-medium": {"transformer_config": SD35_MEDIUM, **_SD3},
    "sd35-large": {"transformer_config": SD35_LARGE, **_SD3},
    "flux-dev": {"transformer_config": FLUX, **_FLUX},
    "flux-schnell": {"transformer_config": {**FLUX, "guidance_embeds": False}, **_FLUX},
    "if-m": {"unet_config": deepfloyd_if(192), **_IF},
    "if-l": {"unet_config": deepfloyd_if(320), **_IF},
    "if-xl": {"unet_config": deepfloyd_if(704), **_IF},
}
"""The published configurations, with empty prompts of the published lengths."""
PRESET_OF = {"sd15": "sd21", "if-l": "if-m", "if-xl": "if-m"}
"""The presets of models that have none of their own name."""
META = torch.device("meta")


def tower_config(model: str, tap: str | None = None, **fields: Any) -> SDLlavaDiffusionConfig:
    """The tower of a model at its preset's tap, or another one, at s = 4 and a grid of 16."""
    preset = PRESETS[PRESET_OF.get(model, model)].values
    preset |= {"taps": [tap]} if tap else {}
    return SDLlavaDiffusionConfig(**{**FAMILIES[model], **preset, **fields})


def operations(model: str, tap: str | None = None) -> tuple[float, float, float, float, float]:
    """TFLOP of one denoiser pass whole and up to the tap, of one prompt, of one image; parameters up to the tap.

    Args:
        model: A key of `FAMILIES`.
        tap: Default: the preset's.
    """
    with META:
        whole = SDLlavaDiffusionModel(tower_config(model, tap, truncate=False)).requires_grad_(False)
        cut = SDLlavaDiffusionModel(tower_config(model, tap))
    with torch.no_grad():
        text, image, complete, to_tap = (count_gflop(call)[0] / 1e3 for call in calls(whole, META).values())
    parameters = sum(p.numel() for p in cut.backbone.denoiser.parameters())
    return complete, to_tap, text, image, parameters / 1e9


def calls(tower: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What a first question runs once, by name: a prompt, an image, a whole pass of the denoiser, a pass to the tap.

    Args:
        tower: A whole tower on the meta device, which may get weights on another one before the calls.
        device: Of the inputs.
        dtype: Of the denoiser's weights.
    """
    config, backbone = tower.config, tower.backbone
    ids = [torch.zeros(1, len(row), dtype=torch.long, device=device) for row in config.null_prompt_ids]
    pixels = torch.zeros(1, 3, config.image_size, config.image_size, device=device)
    channels = config.family.latent_channels(config.part_configs)
    latents = torch.zeros(1, channels, config.latent_size, config.latent_size, device=device)
    with torch.no_grad():
        shapes = encode(backbone, [row.to("meta") for row in ids])
    prompts = {name: torch.ones(x.shape, dtype=x.dtype, device=device) for name, x in shapes.items()}
    prompts = {name: x.to(dtype) if x.is_floating_point() else x for name, x in prompts.items()}
    timestep = config.timesteps[0]
    return {
        "one prompt": lambda: encode(backbone, ids),
        "one image": lambda: backbone.encode_image(pixels),
        "whole pass": lambda: backbone.denoise(backbone.denoiser, latents, timestep, prompts).sample,
        "pass to the tap": lambda: backbone.read(latents, timestep, prompts, tower.taps)[0],
    }


def encode(backbone: Any, ids: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Prompts of meta tensors, or of others. T5's mask, which needs values, changes no count."""
    if backbone.config.family.name not in ("pixart", "deepfloyd_if"):
        return backbone.encode_prompts(*ids)
    return {
        "encoder_hidden_states": backbone.text_encoder(*ids).last_hidden_state,
        "encoder_attention_mask": torch.ones_like(ids[0]),
    }


def first_question(model: str, tap: str | None = None) -> dict[str, float]:
    """GiB of each part during a first question: bfloat16, the VAE in float32, the language model and T5 in 4 bits.

    4 bits hold the linear layers of T5's blocks, except for `wo`, which transformers does not quantise. Other weights
    than those of the pass lie on the GPU as well. Not included: the CUDA context and fragmented memory.
    """
    config: SDLlavaConfig = models.model_config("full", diffusion_config=tower_config(model, tap))
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
    parts["intermediate results"] = peak_results(tower)
    return {name: size / 2**30 for name, size in parts.items()}


def peak_results(tower: Any) -> float:
    """Peak bytes of intermediate results in the image encoder, in the text encoders and in both halves of a pass."""
    config, backbone = tower.config, tower.backbone.to(torch.bfloat16)
    if hasattr(backbone, "vae"):
        backbone.vae.float()
    with META, torch.no_grad(), FusedAttention():
        ids = [torch.zeros(1, len(row), dtype=torch.long) for row in config.null_prompt_ids]
        pixels = torch.empty(1, 3, config.image_size, config.image_size)
        prompts = encode(backbone, ids)
        latents = backbone.encode_image(pixels)
        both = {name: x.repeat(2, *[1] * (x.ndim - 1)) for name, x in prompts.items()}
        peaks = []
        for call in (
            lambda: backbone.encode_image(pixels),
            lambda: encode(backbone, ids),
            lambda: backbone.read(latents, config.timesteps[0], both, tower.taps),
        ):
            with memory.LiveResults(tower) as live:
                call()
            peaks.append(live.peak)
    return max(peaks)


def measure(
    names: list[str], tap: str | None, text: bool, device: str, dtype: str, repeats: int, output: Path | None
) -> None:
    """Time the calls of each model on random weights, and print them with their operations and peak memory.

    Args:
        names: Keys of `FAMILIES`.
        tap: Default: the presets'.
        text: Also build and time the text encoders; T5 has 4.8 billion parameters.
        device: Torch device.
        dtype: Of the weights, also of the VAE's.
        repeats: Timed rounds.
        output: JSON file.
    """
    bench = Bench("families", "full", device, dtype, repeats, output, wall_clock=True, tap=tap)
    for name in names:
        with META:
            tower = SDLlavaDiffusionModel(tower_config(name, tap, truncate=False)).requires_grad_(False).eval()
        timed = {f"{name}, {call}": run for call, run in calls(tower, bench.device, bench.dtype).items()}
        for part, module in tower.backbone.named_children():
            if text or not part.startswith("text_encoder"):
                models.fill_randomly(module, bench.device, bench.dtype)
                _zero_buffers(module, bench.device, bench.dtype)
        if not text:
            timed.pop(f"{name}, one prompt")
        if not hasattr(tower.backbone, "vae"):
            timed.pop(f"{name}, one image")
        with torch.inference_mode():
            bench.time(timed, reference=f"{name}, whole pass")
        bench.results.clear()
    bench.report()


def _zero_buffers(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give buffers on the meta device values, which do not change how long a pass takes."""
    for child in module.modules():
        for name, buffer in list(child.named_buffers(recurse=False)):
            if buffer.is_meta:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                setattr(child, name, torch.zeros(buffer.shape, dtype=kind, device=device))


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only these. Repeatable.")] = None,
    tap: Annotated[str | None, typer.Option(help="Instead of the presets' taps.")] = None,
    measured: Annotated[bool, typer.Option("--measure", help="Time random weights instead of counting.")] = False,
    text: Annotated[bool, typer.Option(help="With --measure: also the text encoders.")] = True,
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 3,
    output: Annotated[Path | None, typer.Option(help="JSON file of --measure.")] = None,
) -> None:
    """Print operations and memory of each model, or measure them."""
    names = model or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        raise SystemExit(f"--model {unknown[0]!r} is not supported. Use {', '.join(FAMILIES)}.")
    if measured:
        measure(names, tap, text, device, dtype, repeats, output)
        return
    console = Console(width=160)
    table = Table(
        "model", "tap", "whole pass", "to the tap", "one prompt", "one image", "denoiser kept", title="TFLOP", box=None
    )
    for name in names:
        *tflop, kept = operations(name, tap)
        read = tower_config(name, tap).taps[0]
        table.add_row(name, read, *(f"{value:.2f}" for value in tflop), f"{kept:.2f}B parameters")
    console.print(table)
    for name in names:
        parts = first_question(name, tap)
        console.print(f"\n{name}: {sum(parts.values()):.1f} GiB for a first question")
        console.print(", ".join(f"{part} {size:.2f}" for part, size in parts.items() if size >= 0.005))


if __name__ == "__main__":
    typer.run(main)
