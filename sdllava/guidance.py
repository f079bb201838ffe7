"""Guidance on features, X = X_u + s (X_c - X_u) (S3, equation 1), and the ensemble of taps, timesteps and scales."""

from collections.abc import Sequence

import torch
from torch import nn

from .diffusion_configuration import SDLlavaDiffusionConfig


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


class ZeroLinear(nn.Linear):
    """A linear layer that begins at zero."""

    def reset_parameters(self) -> None:
        """Set all weights to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class FeatureEnsemble(nn.Module):
    """Several taps, timesteps and guidance scales as one map.

    Maps are concatenated on channels, averaged (`"mean"`, `"learned"`), or selected per token by a gate that reads all
    of them (`"select"`), softly or, with `ensemble_top_k`, sparsely. Guidance is linear, so an average with weights w_i
    over scales s_i equals the single scale sum(w_i s_i) / sum(w_i); a selection differs between tokens, which no single
    scale does. The gate begins as the mean.
    """

    def __init__(self, config: SDLlavaDiffusionConfig):
        super().__init__()
        self.mode = config.ensemble
        self.widths = [tap.channels for tap in config.resolved_taps() for _ in config.timesteps]
        if self.mode == "learned":
            self.weight = nn.Parameter(torch.zeros(config.num_maps))
        elif self.mode == "select":
            joined = config.num_maps * config.hidden_size
            self.top_k = config.ensemble_top_k
            self.gate_norm = nn.LayerNorm(joined)
            self.gate = ZeroLinear(joined, config.num_maps)

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
        if self.mode == "select":
            return torch.einsum("nts,sntc->ntc", self._selection(parts), torch.stack(parts))
        weight = self.weight.softmax(dim=0).to(parts[0].dtype)
        return torch.einsum("s,sntc->ntc", weight, torch.stack(parts))

    def _selection(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The weight of each map for each token, `(n, tokens, maps)`, with sum 1."""
        joined = torch.cat(list(parts), dim=-1).to(self.gate.weight.dtype)
        weights = self.gate(self.gate_norm(joined)).softmax(dim=-1)
        if self.top_k is not None:
            largest = weights.topk(self.top_k, dim=-1).indices
            kept = torch.zeros_like(weights).scatter(-1, largest, weights.gather(-1, largest))
            sparse = kept / kept.sum(dim=-1, keepdim=True)
            weights = weights + (sparse - weights).detach()  # gradients reach the maps that were not selected, too
        return weights.to(parts[0].dtype)
