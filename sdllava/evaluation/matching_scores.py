"""What a denoiser says about image and text: pooled attention to text in two readings of the papers, and its error.

The released Discffusion code pools logits in each layer: mean over layers, heads and pixels of
log sum_k exp(q_p . k_k / sqrt(d)) (arXiv 2305.10722; S4 section 4 with all layers). S3 section 4.1 pools maps that are
summed over layers and timesteps. Diffusion Classifier (arXiv 2303.16203) uses the error of the prediction. Queries and
keys are read with hooks on unmodified diffusers modules.

Where positions attend to text and image in one softmax (Stable Diffusion 3, FLUX, DeepFloyd IF), logits are those of
the text's keys, and maps are the text's part of the softmax. The papers' models have no such layers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..attention_maps import hooked_scores
from ..attention_scores import AttentionScores, is_joint
from ..backbone import Prompts
from ..diffusion import SDLlavaDiffusionModel
from ..grids import as_map
from ..taps import Tap, resolve_taps

QUERIES = ("Cross-Q", "Joint-Q")


def attention_taps(tower: SDLlavaDiffusionModel, layers: str | Sequence[str]) -> list[Tap]:
    """The queries of the selected attentions to text, in the order of the forward pass.

    Args:
        tower: A tower that is not truncated.
        layers: "last" (in each stage, the last transformer block of each attention of the last block), "all", or names
            of Cross-Q or Joint-Q taps.

    Raises:
        ValueError: The choice is unknown, or a tap does not exist or is not the query of an attention to text.
    """
    known = tower.config.all_taps()
    every = [tap for tap in known if tap.name.endswith(QUERIES) and _attends_to_text(tower, tap)]
    if layers == "all":
        return every
    if layers == "last":
        stages = {tap.name[0]: [other for other in every if other.name[0] == tap.name[0]] for tap in every}
        return [tap for stage in stages.values() for tap in _last_block(stage)]
    if isinstance(layers, str):
        raise ValueError(f"Unknown layers {layers!r}. Choose last, all, or names of Cross-Q or Joint-Q taps.")
    taps = resolve_taps(list(layers), known)
    if wrong := [tap.name for tap in taps if tap not in every]:
        raise ValueError(
            f"The tap {wrong[0]!r} is not a query of an attention to text. Use Cross-Q or Joint-Q taps for matching."
        )
    return sorted(taps, key=known.index)


def _attends_to_text(tower: SDLlavaDiffusionModel, query: Tap) -> bool:
    """Whether keys are the text's, and not only the image's, as those of UNets with two self-attentions."""
    attention: Any = tower.backbone.denoiser.get_submodule(query.module_path.removesuffix(".to_q"))
    return is_joint(attention, query) or attention.is_cross_attention


def _last_block(stage: Sequence[Tap]) -> list[Tap]:
    """The last transformer block of each attention in the last block of a stage."""
    block, attention = (
        lambda tap: tap.module_path.split(".attentions.")[0],
        lambda tap: tap.module_path.split("transformer_blocks.")[0],
    )
    return list({attention(tap): tap for tap in stage if block(tap) == block(stage[-1])}.values())


class Score(ABC):
    """Values of pairs of image and text, from noisy latents and the text's conditioning. Higher is a better match.

    Args:
        tower: A tower that is not truncated.
    """

    per_timestep = True

    def __init__(self, tower: SDLlavaDiffusionModel):
        self.tower = tower

    @abstractmethod
    def values(
        self,
        latents: torch.Tensor,
        noises: Sequence[torch.Tensor],
        timesteps: Sequence[int],
        prompts: Prompts,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Values of n pairs.

        Args:
            latents: z0, `(n, channels, h, w)`.
            noises: For each timestep a map `(channels, h, w)` that all pairs share.
            timesteps: Noise levels.
            prompts: Conditioning of n texts.
            mask: `(n, tokens)`, True for the keys to pool. None pools all.

        Returns:
            `torch.FloatTensor` of shape `(timesteps, n)`, or `(1, n)` where `per_timestep` is False.
        """


class AttentionScore(Score):
    """Reads queries and keys of attentions to text.

    Args:
        tower: A tower that is not truncated.
        taps: From `attention_taps`.
    """

    def __init__(self, tower: SDLlavaDiffusionModel, taps: Sequence[Tap]):
        super().__init__(tower)
        self.taps = list(taps)

    def _read(
        self, latents: torch.Tensor, noise: torch.Tensor, timestep: int, prompts: Prompts
    ) -> list[AttentionScores]:
        """Scores of each layer before the softmax."""
        noisy, backbone, found = self.tower.add_noise(latents, timestep, noise), self.tower.backbone, []
        layers = {tap.name: tap for tap in self.taps}
        with hooked_scores(backbone.denoiser, layers, lambda layer, scores: found.append(scores)):
            backbone.read(noisy, timestep, prompts, self.taps[-1:])
        return found


class PooledLogits(AttentionScore):
    """The released code's score: log-sum-exp over keys in each layer, then the mean over heads, pixels and layers."""

    def values(
        self,
        latents: torch.Tensor,
        noises: Sequence[torch.Tensor],
        timesteps: Sequence[int],
        prompts: Prompts,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Score.values`."""
        kept = _and(mask, prompts.get("encoder_attention_mask"))
        found = []
        for timestep, noise in zip(timesteps, noises, strict=True):
            layers = [
                _where(scores.text, kept).logsumexp(dim=-1).mean(dim=(1, 2))
                for scores in self._read(latents, noise, timestep, prompts)
            ]
            found.append(torch.stack(layers).mean(dim=0))
        return torch.stack(found)


class SummedMaps(AttentionScore):
    """S3's wording: log-sum-exp over pixels and tokens of the maps, summed over layers and timesteps.

    A map is the attention probability, averaged over heads, and over pixels to a quarter of the latents' height and
    width (16x16 for a 512 pixel image, as in S3's Figure 4).
    """

    per_timestep = False

    def values(
        self,
        latents: torch.Tensor,
        noises: Sequence[torch.Tensor],
        timesteps: Sequence[int],
        prompts: Prompts,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Score.values`."""
        size = max(1, latents.shape[-1] // 4)
        total: torch.Tensor | float = 0.0
        for timestep, noise in zip(timesteps, noises, strict=True):
            for scores in self._read(latents, noise, timestep, prompts):
                maps = as_map(scores.probabilities().mean(dim=1))  # (n, tokens, h, w)
                total = total + F.adaptive_avg_pool2d(maps, size)
        pooled = torch.as_tensor(total).flatten(2).logsumexp(dim=-1)  # (n, tokens)
        kept = _and(mask, prompts.get("encoder_attention_mask"))
        return (pooled if kept is None else pooled.masked_fill(~kept, -torch.inf)).logsumexp(dim=-1)[None]


class DenoisingScore(Score):
    """Diffusion Classifier: the negative mean squared error of the prediction (arXiv 2303.16203, equation 6)."""

    def values(
        self,
        latents: torch.Tensor,
        noises: Sequence[torch.Tensor],
        timesteps: Sequence[int],
        prompts: Prompts,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Score.values`."""
        errors = [self._error(latents, *pair, prompts) for pair in zip(noises, timesteps, strict=True)]
        return -torch.stack([error.square().mean(dim=1) for error in errors])

    def _error(self, latents: torch.Tensor, noise: torch.Tensor, timestep: int, prompts: Prompts) -> torch.Tensor:
        """Prediction minus target, `(n, channels * h * w)`."""
        backbone = self.tower.backbone
        predicted = backbone.predict(self.tower.add_noise(latents, timestep, noise), timestep, prompts)
        return (predicted - backbone.prediction_target(latents, noise.expand_as(latents), timestep)).flatten(1)


class NoiseDistance(DenoisingScore):
    """The released code's bias: the negative norm of the predicted noise minus the noise."""

    def values(
        self,
        latents: torch.Tensor,
        noises: Sequence[torch.Tensor],
        timesteps: Sequence[int],
        prompts: Prompts,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `Score.values`."""
        errors = [self._error(latents, *pair, prompts).norm(dim=1) for pair in zip(noises, timesteps, strict=True)]
        rates = [self._noise_per_target(timestep) for timestep in timesteps]
        return -torch.stack([rate * error for rate, error in zip(rates, errors, strict=True)])

    def _noise_per_target(self, timestep: int) -> float:
        """Error of the noise for an error of 1 in the prediction, which is linear in latents and noise, given x_t."""
        signal, spread = self.tower.backbone.noise_rates(timestep)
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        target = self.tower.backbone.prediction_target
        of_latents, of_noise = (float(target(*pair, timestep)) for pair in ((one, zero), (zero, one)))
        return abs(signal / (of_noise * signal - of_latents * spread))


def _where(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits with -inf where the mask `(n, tokens)` is false."""
    return logits if mask is None else logits.masked_fill(~mask.bool()[:, None, None, :], -math.inf)


def _and(first: torch.Tensor | None, second: torch.Tensor | None) -> torch.Tensor | None:
    given = [mask.bool() for mask in (first, second) if mask is not None]
    return torch.stack(given).all(dim=0) if given else None
