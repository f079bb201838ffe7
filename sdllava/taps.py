"""Tap names: where a UNet is read, and how.

A name is `Stage-Level-Repeat-Block-Feature`, zero-based: `U-L1-R1-B0-Cross-Q` is
`up_blocks[1].attentions[1].transformer_blocks[0].attn2.to_q` with all heads joined (S3, Table 3). Stages: `D` (down),
`M` (middle), `U` (up). Features:

- `Cross-Q`: the cross-attention's query projection
- `Cross-Out`: the cross-attention's output, before its residual
- `Out`: the end of the transformer block, after its feed-forward
- `Vit-Out`: the attention module's output (no block in the name)
- `Res-Out`: the ResNet of that repeat (no block in the name)

The long names of generic-diffusion-feature (`up-level1-repeat1-vit-block0-cross-q`) are understood as well.
"""

import difflib
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

_BLOCK_FEATURES = {"Cross-Q": ".attn2.to_q", "Cross-Out": ".attn2", "Out": ""}
_STAGES = {"down": "D", "mid": "M", "up": "U"}
_LONG_NAME = re.compile(r"(down|mid|up)(?:-level(\d+))?(?:-repeat(\d+))?(?:-vit)?(?:-block(\d+))?-(?:(vit|res)-)?(.+)")


@dataclass(frozen=True)
class Tap:
    """One place where a UNet can be read: its name, module path, and the height, width and channels found there."""

    name: str
    module_path: str
    height: int
    width: int
    channels: int


def list_taps(unet_config: dict[str, Any], latent_size: int | None = None) -> list[Tap]:
    """Every tap of a UNet, in the order in which the forward pass reaches it.

    Args:
        unet_config (`dict`): a `UNet2DConditionModel` configuration.
        latent_size (`int`, *optional*): height and width of the latents; default the configuration's `sample_size`.
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
            taps += _repeat_taps(f"D-L{level}-R{repeat}", path, repeat, depth, sizes[level], channels[level])
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn":
        taps += _repeat_taps("M-L0-R0", "mid_block", 0, _at(depths[-1], 0), sizes[-1], channels[-1])
        taps += _repeat_taps("M-L0-R1", "mid_block", 1, 0, sizes[-1], channels[-1])
    for level in range(levels):
        size, width = sizes[levels - 1 - level], channels[levels - 1 - level]
        for repeat in range(repeats[levels - 1 - level] + 1):
            depth = _at(up_depths[level], repeat) if "CrossAttn" in up_types[level] else 0
            taps += _repeat_taps(f"U-L{level}-R{repeat}", f"up_blocks.{level}", repeat, depth, size, width)
    return taps


def _per_level(value: Any, levels: int) -> list:
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def _at(value: Any, index: int) -> int:
    return value[index] if isinstance(value, list | tuple) else value


def _repeat_taps(prefix: str, path: str, repeat: int, depth: int, size: int, channels: int) -> list[Tap]:
    attention = f"{path}.attentions.{repeat}"
    taps = [Tap(f"{prefix}-Res-Out", f"{path}.resnets.{repeat}", size, size, channels)]
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


def resolve_taps(names: Sequence[str], unet_config: dict[str, Any], latent_size: int | None = None) -> list[Tap]:
    """Look tap names up in a UNet.

    Raises:
        ValueError: a name does not exist there; the sentence names the nearest that do.
    """
    known = {tap.name: tap for tap in list_taps(unet_config, latent_size)}
    for name in names:
        short = canonical_tap_name(name)
        if short not in known:
            nearest = difflib.get_close_matches(short, known, n=3, cutoff=0.0)
            raise ValueError(f"this UNet has no tap {name!r}: the nearest are {', '.join(nearest)}")
    return [known[canonical_tap_name(name)] for name in names]


class AllTapsRead(Exception):
    """Ends a forward pass whose last tap has been read."""


@contextmanager
def _hooks(handles: list) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_other_thread(reader: int | None) -> bool:
    return reader is not None and threading.get_ident() != reader


def hook_taps(
    model: nn.Module, taps: Sequence[Tap], read: dict[str, torch.Tensor], reader: int | None = None
) -> list[RemovableHandle]:
    """Let each tap's module put its output into `read`, by its path; once all are there, [`AllTapsRead`] is raised.

    Args:
        reader: the only thread whose passes are read; others may run the same model at the same time.
    """
    paths = {tap.module_path for tap in taps}

    def hook_for(path: str) -> Callable:
        def hook(module, args, output):
            if _is_other_thread(reader):
                return
            read[path] = getattr(output, "sample", output[0] if isinstance(output, tuple) else output)
            if len(read) == len(paths):
                raise AllTapsRead

        return hook

    return [model.get_submodule(path).register_forward_hook(hook_for(path)) for path in paths]


def hook_shared_rows(
    modules: Sequence[nn.Module], shared: dict[str, int], reader: int | None = None
) -> list[RemovableHandle]:
    """Let each module compute the first `shared["rows"]` rows of its batch and give the result `shared["blocks"]` times,
    for rows whose inputs are the same, block by block.
    """

    def first_block(module, args):
        return None if _is_other_thread(reader) else tuple(x[: shared["rows"]] for x in args)

    def repeat(module, args, output):
        return None if _is_other_thread(reader) else torch.cat([output] * shared["blocks"])

    before = [module.register_forward_pre_hook(first_block) for module in modules]
    return before + [module.register_forward_hook(repeat) for module in modules]


def read_taps(model: nn.Module, taps: Sequence[Tap], forward: Callable[[], Any]) -> list[torch.Tensor]:
    """Run `forward` on `model` up to the last tap and return each tap's output.

    The taps are read by forward hooks on the stock modules, which are removed afterwards; nothing behind the last tap
    runs.

    Returns:
        `list[torch.Tensor]`: one `(n, channels, height, width)` or `(n, height * width, channels)` tensor a tap, as
        the module gives it.

    Raises:
        RuntimeError: a tap's module was compiled, or lies in one that was.
    """
    read: dict[str, torch.Tensor] = {}
    with _hooks(hook_taps(model, taps, read, threading.get_ident())):
        try:
            forward()
        except AllTapsRead:
            pass
    if unread := [tap.name for tap in taps if tap.module_path not in read]:
        raise RuntimeError(
            f"{unread[0]} was not read, as compiled code calls no hooks: compile with the tower's compile_pass, which "
            "reads its taps inside"
        )
    return [read[tap.module_path] for tap in taps]


@contextmanager
def share_rows(modules: Sequence[nn.Module], rows: int, blocks: int) -> Iterator[None]:
    """Inside the context, `blocks` times `rows` rows share what is computed of the first `rows`."""
    with _hooks(hook_shared_rows(modules, {"rows": rows, "blocks": blocks}, threading.get_ident())):
        yield


class CutAway(nn.Module):
    """Stands, without weights, where a module behind the deepest tap was, and says so when it is used."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.reason = f"this {type(module).__name__} lies behind the deepest tap and was cut away: use truncate=False"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(self.__dict__.get("reason", str(error))) from None

    def forward(self, *args, **kwargs):
        raise RuntimeError(self.reason)


def cut_behind_taps(model: nn.Module, running: nn.Module, taps: Sequence[Tap], forward: Callable[[], Any]) -> None:
    """Replace in `model` every module that does not run before the last tap by [`CutAway`].

    `attn2.to_k` of a tapped `Cross-Q` stays, so that its attention map can still be drawn.

    Args:
        model: the module to cut, in place.
        running: a module of the same structure on which `forward` runs; on the meta device this costs nothing.
        taps: the taps to keep.
        forward: runs `running` once.
    """
    used = {tap.module_path[: -len("to_q")] + "to_k" for tap in taps if tap.name.endswith("Cross-Q")}
    names = {module: name for name, module in running.named_modules()}
    handles = [m.register_forward_pre_hook(lambda module, args: used.add(names[module])) for m in running.modules()]
    with _hooks(handles):
        read_taps(running, taps, forward)
    needed = {".".join(name.split(".")[:end]) for name in used for end in range(1, name.count(".") + 2)}
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if (f"{name}.{child_name}" if name else child_name) not in needed:
                is_list = isinstance(child, nn.ModuleList)
                module.register_module(child_name, nn.ModuleList(map(CutAway, child)) if is_list else CutAway(child))
