"""A backbone's pass up to its taps as one compiled function."""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from .backbone import DiffusionBackbone, Prompts
from .taps import Tap
from .unet_pass import AllTapsRead, hook_shared_rows, hook_taps

logger = logging.get_logger(__name__)


class CompiledPass:
    """A denoiser's pass up to its taps as one compiled function.

    The hooks that read and share are traced. They are registered on a copy that shares the parameters, so the denoiser
    itself is not modified.

    Args:
        backbone: On the device and in the dtype where it stays.
        taps: Where its denoiser is read.
        options: Of `torch.compile`; `mode="reduce-overhead"` uses CUDA graphs on a GPU.
    """

    def __init__(self, backbone: DiffusionBackbone, taps: Sequence[Tap], **options: Any):
        self.taps = list(taps)
        denoiser = backbone.denoiser
        self._denoiser = copy.deepcopy(denoiser, memo={id(p): p for p in denoiser.parameters()})
        self._denoise = backbone.denoise
        self._read: dict[str, torch.Tensor] = {}
        self._shared = {"rows": 0, "blocks": 0}
        shared = backbone.modules_before_prompts(self._denoiser)
        hook_shared_rows(shared, self._shared)  # first, so that a tap reads the repeated rows
        hook_taps(self._denoiser, taps, self._read)
        self._compiled = torch.compile(self._pass, **{"fullgraph": True, **options})
        self._known_shapes: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()

    def __call__(self, latents: torch.Tensor, timestep: int, prompts: Prompts) -> list[torch.Tensor]:
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

    def _pass(self, latents: torch.Tensor, timestep: torch.Tensor, prompts: Prompts) -> list[torch.Tensor]:
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
