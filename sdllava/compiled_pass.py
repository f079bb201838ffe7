"""A UNet's pass up to its taps as one compiled function: fused kernels, and CUDA graphs where that is asked for."""

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from transformers.utils import logging

from .taps import AllTapsRead, Tap, hook_shared_rows, hook_taps

logger = logging.get_logger(__name__)


class CompiledPass:
    """Reads taps as `StableDiffusionBackbone.read` does, compiled.

    The hooks that read and share are traced. They lie on a twin of the UNet around the same weights, so that the UNet
    itself stays as it is.

    Args:
        backbone: a `StableDiffusionBackbone`, on the device and in the dtype where it stays.
        taps: where its UNet is read.
        options: of `torch.compile`.
    """

    def __init__(self, backbone: Any, taps: Sequence[Tap], **options: Any):
        self._backbone, self.taps = backbone, list(taps)
        self._unet = copy.deepcopy(backbone.unet, memo={id(p): p for p in backbone.unet.parameters()})
        self._read: dict[str, torch.Tensor] = {}
        self._shared = {"rows": 0, "blocks": 0}
        hook_taps(self._unet, taps, self._read)
        hook_shared_rows(backbone.modules_before_prompts(self._unet), self._shared)
        self._compiled = torch.compile(self._pass, **{"fullgraph": True, **options})
        self._known_shapes: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()

    def __call__(self, latents: torch.Tensor, timestep: int, prompts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """See `StableDiffusionBackbone.read`."""
        on_device = torch.full((), timestep, device=latents.device)
        shape = (*latents.shape, *prompts["encoder_hidden_states"].shape)
        with self._lock:
            if shape not in self._known_shapes:
                logger.warning(f"compiling for latents of shape {tuple(latents.shape)}: this call takes longer")
            read = [x.clone() for x in self._compiled(latents, on_device, prompts)]  # the next call may reuse theirs
            self._known_shapes.add(shape)
        return read

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a tower has weights of its own, and is not compiled."""

    def _pass(self, latents, timestep, prompts) -> list[torch.Tensor]:
        rows = len(latents)
        blocks = len(prompts["encoder_hidden_states"]) // rows
        self._shared.update(rows=rows, blocks=blocks)
        try:
            self._backbone.denoise(self._unet, latents.repeat(blocks, 1, 1, 1), timestep, prompts)
        except AllTapsRead:
            pass
        read = [self._read[tap.module_path] for tap in self.taps]
        self._read.clear()
        return read
