"""Guidance on features, X = X_u + s (X_c - X_u) (S3, equation 1), and the ensemble of taps, timesteps and scales."""

from collections.abc import Sequence

import torch
from torch import nn

from .configuration import SDLlavaDiffusionConfig


def guide(unconditional: torch.Tensor | None, conditional: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Guided features X_u + s (X_c - X_u), computed in float32.

    Args:
        unconditional: X_u; not needed at s = 1.
        conditional: X_c, of the same shape; not needed at s = 0. Without it the result is X_u.
        scale: The guidance scale s.

    Raises:
        ValueError: The scale needs features that are None.
    """
    if scale == 1 and conditional is not None:
        return conditional
    if unconditional is None:
        raise ValueError(f"Guidance scale {scale} needs unconditional features. Pass them, or use scale 1.")
    if conditional is None or scale == 0:
        return unconditional
    base = unconditional.float()
    return (base + scale * (conditional.float() - base)).to(conditional.dtype)


class FeatureEnsemble(nn.Module):
    """Several taps, timesteps and guidance scales as one map: concatenated on channels, averaged, or a learned mean."""

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__()
        self.mode = config.ensemble
        self.widths = [tap.channels for tap in config.resolved_taps() for _ in config.timesteps]
        if self.mode == "learned":
            self.weight = nn.Parameter(torch.zeros(len(self.widths) * len(config.guidance_scales)))

    def forward(self, by_scale: Sequence[torch.Tensor]) -> torch.Tensor:
        """Combine the features of each guidance scale.

        Args:
            by_scale: One `(n, tokens, channels)` tensor per guidance scale, taps and timesteps on channels.

        Returns:
            `torch.Tensor` of shape `(n, tokens, hidden_size)`, in the order tap, timestep, scale.
        """
        scales = [x.split(self.widths, dim=-1) for x in by_scale]
        parts = [part for parts in zip(*scales, strict=True) for part in parts]
        if self.mode == "concat":
            return torch.cat(parts, dim=-1)
        if self.mode == "mean":
            return torch.stack(parts).mean(dim=0)
        weight = self.weight.softmax(dim=0).to(parts[0].dtype)
        return torch.einsum("s,sntc->ntc", weight, torch.stack(parts))
