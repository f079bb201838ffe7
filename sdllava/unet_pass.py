"""Running a denoiser up to its taps: hooks, early exit, rows shared between prompts, cutting, compilation."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from .taps import Tap

logger = logging.get_logger(__name__)

_FOR_MAPS = ("to_k", "add_k_proj", "norm_q", "norm_k", "norm_added_k")
"""Modules of an attention, in addition to its query projection, that its map is computed with."""

Denoise = Callable[[nn.Module, torch.Tensor, int | torch.Tensor, dict[str, torch.Tensor]], Any]
"""Runs a denoiser: (module, noisy latents, timestep, prompts) to the module's output."""


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


def read_taps(model: nn.Module, taps: Sequence[Tap], forward: Callable[[], Any]) -> list[torch.Tensor]:
    """Run `forward` on `model` up to the last tap and return each tap's output.

    The taps are read by forward hooks on the stock modules, which are removed afterwards. Nothing after the last tap
    runs.

    Returns:
        `list[torch.Tensor]`: One `(n, channels, height, width)` or `(n, height * width, channels)` tensor per tap, as
        the module returns it.

    Raises:
        RuntimeError: A tap's module is compiled, or part of a compiled module.
    """
    read: dict[str, torch.Tensor] = {}
    with removed_at_exit(hook_taps(model, taps, read, threading.get_ident())), suppress(AllTapsRead):
        forward()
    if unread := [tap.name for tap in taps if tap.name not in read]:
        raise RuntimeError(
            f"Tap {unread[0]!r} was not read, because compiled code calls no hooks. Compile with the tower's "
            "compile_pass, which compiles the reading of its taps as well."
        )
    return [read[tap.name] for tap in taps]


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


def modules_up_to_taps(running: nn.Module, taps: Sequence[Tap], forward: Callable[[], Any]) -> frozenset[str]:
    """Paths of the modules that run before the last tap, and of the modules that hold them.

    The key projections of a tapped `Cross-Q` or `Joint-Q` are included, and the normalisation of queries and keys, so
    that its attention map can still be computed.

    Args:
        running: The module on which `forward` runs; on the meta device this needs no memory.
        taps: The taps to keep.
        forward: Runs `running` once.
    """
    queries = [tap.module_path.removesuffix("to_q") for tap in taps if tap.name.endswith(("Cross-Q", "Joint-Q"))]
    used = {attention + name for attention in queries for name in _FOR_MAPS}
    names = {module: name for name, module in running.named_modules()}
    handles = [m.register_forward_pre_hook(lambda module, args: used.add(names[module])) for m in running.modules()]
    with removed_at_exit(handles):
        read_taps(running, taps, forward)
    return frozenset(".".join(name.split(".")[:end]) for name in used for end in range(1, name.count(".") + 2))


def cut_away(model: nn.Module, needed: Set[str]) -> None:
    """Replace every module of `model` whose path is not in `needed` by `CutAway`, in place."""
    for name, module in list(model.named_modules()):
        for child_name, child in list(module.named_children()):
            if (f"{name}.{child_name}" if name else child_name) not in needed:
                is_list = isinstance(child, nn.ModuleList)
                module.register_module(child_name, nn.ModuleList(map(CutAway, child)) if is_list else CutAway(child))


class CompiledPass:
    """A denoiser's pass up to its taps as one compiled function.

    The hooks that read and share are traced. They are registered on a copy that shares the parameters, so the denoiser
    itself is not modified.

    Args:
        denoiser: On the device and in the dtype where it stays.
        taps: Where it is read.
        denoise: Runs it.
        shared: Gives the modules of a denoiser whose results no prompt has reached yet; see `hook_shared_rows`.
        options: Of `torch.compile`; `mode="reduce-overhead"` uses CUDA graphs on a GPU.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        taps: Sequence[Tap],
        denoise: Denoise,
        shared: Callable[[nn.Module], list[nn.Module]],
        **options: Any,
    ):
        self.taps = list(taps)
        self._denoiser = copy.deepcopy(denoiser, memo={id(p): p for p in denoiser.parameters()})
        self._denoise = denoise
        self._read: dict[str, torch.Tensor] = {}
        self._shared = {"rows": 0, "blocks": 0}
        hook_shared_rows(shared(self._denoiser), self._shared)  # first, so that a tap reads the repeated rows
        hook_taps(self._denoiser, taps, self._read)
        self._compiled = torch.compile(self._pass, **{"fullgraph": True, **options})
        self._known_shapes: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()

    def __call__(self, latents: torch.Tensor, timestep: int, prompts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """As `DiffusionBackbone.read` with the taps of this pass."""
        on_device = torch.full((), timestep, device=latents.device)
        shape = (*latents.shape, *prompts["encoder_hidden_states"].shape)
        with self._lock:
            if shape not in self._known_shapes:
                logger.warning(f"Compiling for latents of shape {tuple(latents.shape)}: this call takes longer.")
            read = [x.clone() for x in self._compiled(latents, on_device, prompts)]  # the next call may reuse theirs
            self._known_shapes.add(shape)
        return read

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a tower has weights of its own, and is not compiled."""

    def _pass(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompts: dict[str, torch.Tensor]
    ) -> list[torch.Tensor]:
        rows = len(latents)
        blocks = len(prompts["encoder_hidden_states"]) // rows
        self._shared.update(rows=rows, blocks=blocks)
        try:  # noqa: SIM105  # contextlib.suppress would break the compiled graph
            self._denoise(self._denoiser, latents.repeat(blocks, 1, 1, 1), timestep, prompts)
        except AllTapsRead:
            pass
        read = [self._read[tap.name] for tap in self.taps]
        self._read.clear()
        return read
