"""Running a denoiser up to its taps: hooks, early exit, rows shared between prompts, cutting."""

import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .taps import Tap

_FOR_MAPS = ("to_k", "add_k_proj", "norm_q", "norm_k", "norm_added_k")
"""Modules of an attention, in addition to its query projection, that its map is computed with."""


class AllTapsRead(Exception):
    """Ends a forward pass whose last tap has been read."""


@contextmanager
def removed_at_exit(handles: list[RemovableHandle]) -> Iterator[None]:
    """Remove hooks when the context ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_taps(
    model: nn.Module, taps: Sequence[Tap], read: dict[str, torch.Tensor], reader: int | None = None
) -> list[RemovableHandle]:
    """Let each tap's module put its output into `read`, by its path. Once all are there, `AllTapsRead` is raised.

    Args:
        model: The denoiser.
        taps: Where it is read.
        read: Filled with one tensor per tap, by tap name.
        reader: Only passes of this thread are read; others may run the same model at the same time. Default: all.
    """
    by_name = {tap.name: tap for tap in taps}

    def keep(tap: Tap, found: Any) -> None:
        if _is_other_thread(reader):
            return
        found = found[tap.output_index] if isinstance(found, tuple) else getattr(found, "sample", found)
        read[tap.name] = found[:, -tap.height * tap.width :] if tap.after_text else found
        if len(read) == len(by_name):
            raise AllTapsRead

    def hook_for(tap: Tap) -> RemovableHandle:
        module = model.get_submodule(tap.module_path)
        if tap.is_input:
            return module.register_forward_pre_hook(lambda module, args: keep(tap, args[0]))
        return module.register_forward_hook(lambda module, args, output: keep(tap, output))

    return [hook_for(tap) for tap in by_name.values()]


def hook_shared_rows(
    modules: Sequence[nn.Module], shared: dict[str, int], reader: int | None = None
) -> list[RemovableHandle]:
    """Let modules compute the first block of rows and repeat it, for blocks of rows whose inputs are the same.

    Args:
        modules: Each computes the first `shared["rows"]` rows of its batch and repeats them `shared["blocks"]` times.
        shared: `rows` and `blocks`, read at each pass.
        reader: As in `hook_taps`.
    """

    def first_block(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        return None if _is_other_thread(reader) else tuple(x[: shared["rows"]] for x in args)

    def repeat(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return None if _is_other_thread(reader) else torch.cat([output] * shared["blocks"])

    before = [module.register_forward_pre_hook(first_block) for module in modules]
    return before + [module.register_forward_hook(repeat) for module in modules]


def _is_other_thread(reader: int | None) -> bool:
    return reader is not None and threading.get_ident() != reader


@contextmanager
def reading_taps(model: nn.Module, taps: Sequence[Tap]) -> Iterator[list[torch.Tensor]]:
    """Read the taps of a pass of `model` that the context runs, and end the pass after the last one.

    The taps are read by forward hooks on the stock modules, which are removed afterwards. Nothing after the last tap
    runs, and nothing after the pass in the context's block.

    ```python
    >>> with reading_taps(unet, taps) as read:
    ...     unet(latents, timestep, encoder_hidden_states)
    >>> read[0].shape
    ```

    Yields:
        `list[torch.Tensor]`: Filled when the context ends, with one `(n, channels, height, width)` or
        `(n, height * width, channels)` tensor per tap, as the module returns it.

    Raises:
        RuntimeError: A tap's module is compiled, or part of a compiled module.
    """
    by_name: dict[str, torch.Tensor] = {}
    read: list[torch.Tensor] = []
    with removed_at_exit(hook_taps(model, taps, by_name, threading.get_ident())), suppress(AllTapsRead):
        yield read
    if unread := [tap.name for tap in taps if tap.name not in by_name]:
        raise RuntimeError(
            f"Tap {unread[0]!r} was not read, because compiled code calls no hooks. Compile with the tower's "
            "compile_pass, which compiles the reading of its taps as well."
        )
    read += [by_name[tap.name] for tap in taps]


@contextmanager
def share_rows(modules: Sequence[nn.Module], rows: int, blocks: int) -> Iterator[None]:
    """Inside the context, `blocks` blocks of `rows` rows share what is computed for the first block."""
    with removed_at_exit(hook_shared_rows(modules, {"rows": rows, "blocks": blocks}, threading.get_ident())):
        yield


class CutAway(nn.Module):
    """Weightless placeholder for a module after the last tap. Raises `RuntimeError` when called."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.reason = f"{type(module).__name__} comes after the last tap and was cut away. Load with truncate=False."

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(self.__dict__.get("reason", str(error))) from None

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Raise `RuntimeError`."""
        raise RuntimeError(self.reason)


@contextmanager
def modules_up_to_taps(running: nn.Module, taps: Sequence[Tap]) -> Iterator[set[str]]:
    """Find the modules that run before the last tap, and those that hold them, in a pass that the context runs.

    The key projections of a tapped `Cross-Q` or `Joint-Q` are included, and the normalisation of queries and keys, so
    that its attention map can still be computed.

    Args:
        running: The denoiser that runs once; on the meta device this needs no memory.
        taps: The taps to keep.

    Yields:
        `set[str]`: Filled with the paths of the modules when the context ends.
    """
    queries = [tap.module_path.removesuffix("to_q") for tap in taps if tap.name.endswith(("Cross-Q", "Joint-Q"))]
    used = {attention + name for attention in queries for name in _FOR_MAPS}
    names = {module: name for name, module in running.named_modules()}
    handles = [m.register_forward_pre_hook(lambda module, args: used.add(names[module])) for m in running.modules()]
    found: set[str] = set()
    with removed_at_exit(handles), reading_taps(running, taps):
        yield found
    found |= {".".join(name.split(".")[:end]) for name in used for end in range(1, name.count(".") + 2)}


def cut_away(model: nn.Module, needed: Set[str]) -> None:
    """Replace every module of `model` whose path is not in `needed` by `CutAway`, in place."""
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if (f"{name}.{child_name}" if name else child_name) not in needed:
                is_list = isinstance(child, nn.ModuleList)
                module.register_module(child_name, nn.ModuleList(map(CutAway, child)) if is_list else CutAway(child))
