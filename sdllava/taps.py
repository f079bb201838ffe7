"""Tap names: where a denoiser is read.

A name is `Stage-Level-Repeat-Block-Feature`, zero-based: `U-L1-R1-B0-Cross-Q` is
`up_blocks[1].attentions[1].transformer_blocks[0].attn2.to_q` with all heads joined (S3, Table 3). Stages: `D` (down),
`M` (middle), `U` (up). Features:

- `Cross-Q`: the cross-attention's query projection
- `Cross-Out`: the cross-attention's output, before its residual
- `Out`: the end of the transformer block, after its feed-forward
- `Vit-Out`: the attention module's output (no block in the name)
- `Res-Out`: the ResNet of that repeat (no block in the name)
- `Up-Out`: the upsampler at the end of a level (no repeat and block in the name): `U-L1-Up-Out`

DeepFloyd IF has one attention where others have transformer blocks: `Cross-Q` and `Vit-Out` are its query projection
and its output.

A diffusion transformer has one stage `T`, with its blocks in the order of the forward pass: `T-B14-Cross-Q`. There
`Norm` is the block's input, normalised and modulated (AdaLN), as its first attention reads it. Where image and text
attend to each other jointly (Stable Diffusion 3, FLUX), `Joint-Q` and `Joint-Out` are the query projection and the
output of that attention, `Self-Q` and `Self-Out` those of Stable Diffusion 3.5 medium's second one, which is over the
image only. All of them are of the image's tokens.

The long names of generic-diffusion-feature (`up-level1-repeat1-vit-block0-cross-q`) are understood as well.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_BLOCK_FEATURES = {"Cross-Q": ".attn2.to_q", "Cross-Out": ".attn2", "Out": ""}
_JOINT_FEATURES = {"Joint-Q": ".attn.to_q", "Joint-Out": ".attn"}
_STAGES = {"down": "D", "mid": "M", "up": "U"}
_LONG_NAME = re.compile(r"(down|mid|up)(?:-level(\d+))?(?:-repeat(\d+))?(?:-vit)?(?:-block(\d+))?-(?:(vit|res)-)?(.+)")


@dataclass(frozen=True)
class Tap:
    """One place where a denoiser can be read: its name, module path, and the height, width and channels found there."""

    name: str
    module_path: str
    height: int
    width: int
    channels: int
    is_input: bool = False
    """Whether the module's first input is read, and not its output."""
    output_index: int = 0
    """Which output of a module that returns a tuple is the image."""
    after_text: bool = False
    """Whether the image's tokens are the last ones, after those of the text."""


def list_taps(unet_config: dict[str, Any], latent_size: int | None = None) -> list[Tap]:
    """Every tap of a UNet, in the order in which the forward pass reaches it.

    Args:
        unet_config (`dict`): A `UNet2DConditionModel` configuration.
        latent_size (`int`, *optional*): Height and width of the latents; default is the configuration's `sample_size`.
    """
    config = {"layers_per_block": 2, "transformer_layers_per_block": 1, **unet_config}
    down_types = config.get("down_block_types") or ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    up_types = config.get("up_block_types") or ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    channels = list(config.get("block_out_channels") or (320, 640, 1280, 1280))
    levels = len(channels)
    repeats = _per_level(config["layers_per_block"], levels)
    depths = _per_level(config["transformer_layers_per_block"], levels)
    up_depths = _per_level(config.get("reverse_transformer_layers_per_block") or depths[::-1], levels)
    sizes = [latent_size or config.get("sample_size") or 64]
    for _ in range(levels - 1):
        sizes.append((sizes[-1] + 1) // 2)

    taps: list[Tap] = []
    for level in range(levels):
        for repeat in range(repeats[level]):
            depth = _at(depths[level], repeat) if "CrossAttn" in down_types[level] else 0
            path = f"down_blocks.{level}"
            name, simple = f"D-L{level}-R{repeat}", "Simple" in down_types[level]
            taps += _repeat_taps(name, path, repeat, depth, sizes[level], channels[level], simple)
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if middle in ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn"):
        depth, simple = _at(depths[-1], 0), "Simple" in middle
        taps += _repeat_taps("M-L0-R0", "mid_block", 0, depth, sizes[-1], channels[-1], simple)
        taps += _repeat_taps("M-L0-R1", "mid_block", 1, 0, sizes[-1], channels[-1])
    for level in range(levels):
        size, width = sizes[levels - 1 - level], channels[levels - 1 - level]
        for repeat in range(repeats[levels - 1 - level] + 1):
            depth = _at(up_depths[level], repeat) if "CrossAttn" in up_types[level] else 0
            name, simple = f"U-L{level}-R{repeat}", "Simple" in up_types[level]
            taps += _repeat_taps(name, f"up_blocks.{level}", repeat, depth, size, width, simple)
        if level < levels - 1:
            larger = sizes[levels - 2 - level]
            taps.append(Tap(f"U-L{level}-Up-Out", f"up_blocks.{level}.upsamplers.0", larger, larger, width))
    return taps


def pixart_taps(transformer_config: Mapping[str, Any], latent_size: int) -> list[Tap]:
    """Every tap of a PixArt transformer, in the order in which the forward pass reaches it.

    Args:
        transformer_config: A `PixArtTransformer2DModel` configuration.
        latent_size: Height and width of the latents.
    """
    size = latent_size // transformer_config["patch_size"]
    channels = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    taps = []
    for block in range(transformer_config["num_layers"]):
        name, path = f"T-B{block}", f"transformer_blocks.{block}"
        taps.append(Tap(f"{name}-Norm", f"{path}.attn1", size, size, channels, is_input=True))
        for feature, suffix in _BLOCK_FEATURES.items():
            taps.append(Tap(f"{name}-{feature}", f"{path}{suffix}", size, size, channels))
    return taps


def sd3_taps(transformer_config: Mapping[str, Any], latent_size: int) -> list[Tap]:
    """Every tap of a Stable Diffusion 3 transformer, in the order in which the forward pass reaches it.

    Args:
        transformer_config: A `SD3Transformer2DModel` configuration.
        latent_size: Height and width of the latents.
    """
    size = latent_size // transformer_config["patch_size"]
    channels = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    dual = transformer_config.get("dual_attention_layers") or ()
    taps = []
    for block in range(transformer_config["num_layers"]):
        second = {"Self-Q": ".attn2.to_q", "Self-Out": ".attn2"} if block in dual else {}
        for feature, suffix in {"Norm": ".norm1", **_JOINT_FEATURES, **second, "Out": ""}.items():
            path = f"transformer_blocks.{block}{suffix}"
            # a block returns text and image, its attention image and text
            index = 1 if feature == "Out" else 0
            taps.append(Tap(f"T-B{block}-{feature}", path, size, size, channels, output_index=index))
    return taps


def flux_taps(transformer_config: Mapping[str, Any], latent_size: int) -> list[Tap]:
    """Every tap of a FLUX.1 transformer, in the order in which the forward pass reaches it.

    Blocks are counted through: FLUX.1-dev's `T-B0` to `T-B18` have a stream for the image and one for the text,
    `T-B19` to `T-B56` have one sequence of both.

    Args:
        transformer_config: A `FluxTransformer2DModel` configuration.
        latent_size: Height and width of the latents, before they are packed in squares of 2 by 2.
    """
    size = latent_size // 2
    channels = transformer_config["num_attention_heads"] * transformer_config["attention_head_dim"]
    doubles = transformer_config["num_layers"]
    taps = []
    for block in range(doubles + transformer_config["num_single_layers"]):
        is_single = block >= doubles
        path = f"single_transformer_blocks.{block - doubles}" if is_single else f"transformer_blocks.{block}"
        for feature, suffix in {"Norm": ".norm" if is_single else ".norm1", **_JOINT_FEATURES}.items():
            module = f"{path}{suffix}"
            taps.append(Tap(f"T-B{block}-{feature}", module, size, size, channels, after_text=is_single))
        taps.append(Tap(f"T-B{block}-Out", path, size, size, channels, output_index=1))
    return taps


def _per_level(value: Any, levels: int) -> list:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _at(value: Any, index: int) -> int:
    return value[index] if isinstance(value, list | tuple) else value


def _repeat_taps(
    prefix: str, path: str, repeat: int, depth: int, size: int, channels: int, simple: bool = False
) -> list[Tap]:
    """The taps of a ResNet and what follows it: transformer blocks, or the attention itself if that is all."""
    attention = f"{path}.attentions.{repeat}"
    taps = [Tap(f"{prefix}-Res-Out", f"{path}.resnets.{repeat}", size, size, channels)]
    if simple and depth:
        taps.append(Tap(f"{prefix}-B0-Cross-Q", f"{attention}.to_q", size, size, channels))
        return [*taps, Tap(f"{prefix}-Vit-Out", attention, size, size, channels)]
    for block in range(depth):
        for feature, suffix in _BLOCK_FEATURES.items():
            module = f"{attention}.transformer_blocks.{block}{suffix}"
            taps.append(Tap(f"{prefix}-B{block}-{feature}", module, size, size, channels))
    if depth:
        taps.append(Tap(f"{prefix}-Vit-Out", attention, size, size, channels))
    return taps


def canonical_tap_name(name: str) -> str:
    """The short form of a tap name given in short or in generic-diffusion-feature's long form, in any case."""
    if (match := _LONG_NAME.fullmatch(name.lower())) is None:
        return "-".join(part.capitalize() for part in name.split("-"))
    stage, level, repeat, block, module, feature = match.groups()
    parts = [_STAGES[stage], f"L{level or 0}", f"R{repeat or 0}"]
    if block is not None:
        parts.append(f"B{block}")
    if module or (block is None and feature == "out"):
        parts.append((module or "vit").capitalize())
    return "-".join([*parts, *(part.capitalize() for part in feature.split("-"))])


def resolve_taps(names: Sequence[str], known: Sequence[Tap]) -> list[Tap]:
    """Look tap names up, in short or long form.

    Args:
        names: Tap names.
        known: The taps of the denoiser, for example from `list_taps`.

    Raises:
        ValueError: A name does not exist there. The message names the nearest that do.
    """
    by_name = {tap.name: tap for tap in known}
    for name in names:
        short = canonical_tap_name(name)
        if short not in by_name:
            nearest = difflib.get_close_matches(short, by_name, n=3, cutoff=0.0)
            raise ValueError(f"There is no tap {name!r} in this denoiser. The nearest are {', '.join(nearest)}.")
    return [by_name[canonical_tap_name(name)] for name in names]
