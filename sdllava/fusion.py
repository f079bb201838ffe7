"""How vision and diffusion features become one sequence, and the projector to the language model (S3, 5.2 and A.2)."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration import SDLlavaConfig
from .grids import merge_tokens, resize_tokens, sine_positions
from .guidance import ZeroLinear


class CrossAttentionFusion(nn.Module):
    """Vision tokens are queries, diffusion tokens keys and values: pre-norm multi-head attention with a residual.

    The output projection is initialised to zero, so a model built on a LLaVA gives LLaVA's own logits before the first
    training step.
    """

    def __init__(self, config: SDLlavaConfig, diffusion_width: int | None = None):
        super().__init__()
        width, diffusion_width = config.vision_hidden_size, diffusion_width or config.diffusion_config.hidden_size
        self.num_heads = config.fusion_num_attention_heads
        self.query_size = config.token_grid_size
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(diffusion_width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(diffusion_width, width)
        self.v_proj = nn.Linear(diffusion_width, width)
        self.out_proj = ZeroLinear(width, width)

    def forward(self, vision: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """Fuse `(n, tokens, width)` and `(n, grid ** 2, diffusion width)` to `(n, query tokens, width)`."""
        vision = resize_tokens(vision, self.query_size)
        keys, values = self._keys_and_values(diffusion)
        query = self._heads(self.q_proj(self.query_norm(vision)))
        key = self._heads(self.k_proj(keys))
        value = self._heads(self.v_proj(values))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return vision + self.out_proj(attended)

    def _keys_and_values(self, diffusion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.key_norm(diffusion)
        return values + sine_positions(math.isqrt(values.shape[1]), values.shape[2], values), values

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class AttentionOverMaps(CrossAttentionFusion):
    """Cross-attention whose keys and values are the tokens of all maps (an open question of S3, 6).

    Each map of the ensemble, for example each guidance scale, has a learned embedding that is added to its tokens' keys
    and values. A query can read one place at one scale and another place at another scale.
    """

    def __init__(self, config: SDLlavaConfig):
        num_maps = config.diffusion_config.num_maps
        width = config.diffusion_config.hidden_size // num_maps
        super().__init__(config, width)
        self.map_embedding = nn.Parameter(torch.zeros(num_maps, width))

    def _keys_and_values(self, diffusion: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = diffusion.chunk(len(self.map_embedding), dim=-1)
        values = torch.stack([self.key_norm(part) for part in maps], dim=1) + self.map_embedding[:, None]
        keys = values + sine_positions(math.isqrt(values.shape[2]), values.shape[3], values)
        return keys.flatten(1, 2), values.flatten(1, 2)


class MultiLevelFusion(nn.Module):
    """One cross-attention per tap, from the coarsest to the finest (an open question of S3, 6 and appendix E).

    What the vision tokens read at a coarse level decides what they read at the next. The tower resizes all taps to one
    grid: with `grid_size` of the finest tap nothing of it is lost.
    """

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        tower = config.diffusion_config
        taps, maps_per_tap = tower.resolved_taps(), len(tower.timesteps) * len(tower.guidance_scales)
        self.widths = [tap.channels * maps_per_tap for tap in taps]
        self.order = sorted(range(len(taps)), key=lambda i: taps[i].height)
        self.levels = nn.ModuleList(CrossAttentionFusion(config, width) for width in self.widths)

    def forward(self, vision: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """Fuse `(n, tokens, width)` and `(n, grid ** 2, diffusion width)` to `(n, query tokens, width)`."""
        parts = diffusion.split(self.widths, dim=-1)
        for i in self.order:
            vision = self.levels[i](vision, parts[i])
        return vision


class ConcatFusion(nn.Module):
    """Both maps at one grid (16x16 as in S3, A.2), concatenated on channels."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.size = config.token_grid_size

    def forward(self, vision: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """Fuse `(n, tokens, a)` and `(n, grid ** 2, b)` to `(n, size ** 2, a + b)`."""
        vision, diffusion = resize_tokens(vision, self.size), resize_tokens(diffusion, self.size)
        return torch.cat([vision, diffusion.to(vision.dtype)], dim=-1)


class ConcatTokensFusion(nn.Module):
    """Vision tokens, then diffusion tokens at the vision encoder's width.

    The vision tokens do not depend on the question, so a follow-up question reuses their keys and values; see
    [`~sdllava.prefix_cache.PrefixCache`].
    """

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.size = config.token_grid_size
        self.norm = nn.LayerNorm(config.diffusion_config.hidden_size)
        self.proj = nn.Linear(config.diffusion_config.hidden_size, config.vision_hidden_size)

    def forward(self, vision: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """Fuse `(n, a, width)` and `(n, b, diffusion width)` to `(n, a + b, width)`."""
        return torch.cat([self.vision_tokens(vision), self.diffusion_tokens(diffusion)], dim=1)

    def vision_tokens(self, vision: torch.Tensor) -> torch.Tensor:
        """The first part of the sequence, `(n, a, width)`."""
        return resize_tokens(vision, self.size)

    def diffusion_tokens(self, diffusion: torch.Tensor) -> torch.Tensor:
        """The second part of the sequence, `(n, b, width)`."""
        return self.proj(self.norm(diffusion))


class GatedFusion(nn.Module):
    """Vision tokens plus gated diffusion tokens at the same grid; the gate reads both (an open question of S3).

    The output projection is initialised to zero, as in cross-attention.
    """

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        width, diffusion_width = config.vision_hidden_size, config.diffusion_config.hidden_size
        self.size = config.token_grid_size
        self.static_norm = nn.LayerNorm(width)  # the name that checkpoints of 0.1 have
        self.diffusion_norm = nn.LayerNorm(diffusion_width)
        self.gate_proj = nn.Linear(width + diffusion_width, width)
        self.out_proj = ZeroLinear(diffusion_width, width)

    def forward(self, vision: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """Fuse `(n, tokens, width)` and `(n, grid ** 2, diffusion width)` to `(n, size ** 2, width)`."""
        vision, diffusion = resize_tokens(vision, self.size), resize_tokens(diffusion, self.size)
        diffusion = self.diffusion_norm(diffusion)
        gate = self.gate_proj(torch.cat([self.static_norm(vision), diffusion], dim=-1)).sigmoid()
        return vision + gate * self.out_proj(diffusion)


FUSIONS = {
    "cross_attention": CrossAttentionFusion,
    "concat": ConcatFusion,
    "concat_tokens": ConcatTokensFusion,
    "gated": GatedFusion,
    "attention_over_maps": AttentionOverMaps,
    "multi_level": MultiLevelFusion,
}
"""Fusions by the configuration's `fusion`."""


def build_fusion(config: SDLlavaConfig) -> nn.Module | None:
    """The fusion of a configuration, with initial weights; None where one encoder needs none."""
    return None if config.fusion in (None, "none") else FUSIONS[config.fusion](config)


class ImplicitCaptioner(nn.Module):
    """The vision encoder's global image feature as prompt tokens of the diffusion model (S4, introduction)."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.num_tokens = config.implicit_caption_tokens
        self.width = config.diffusion_config.prompt_width
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, self.width)
        self.linear_2 = nn.Linear(self.width, self.num_tokens * self.width)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """Turn `(n, vision width)` into prompt tokens `(n, tokens, prompt width)`."""
        return self.linear_2(F.gelu(self.linear_1(image_embeds))).unflatten(1, (self.num_tokens, self.width))


class SDLlavaMultiModalProjector(nn.Module):
    """LLaVA's two-layer MLP, after an optional merging of neighbouring tokens."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.merge_size = config.spatial_merge_size
        hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.fused_hidden_size * self.merge_size**2, hidden_size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project `(n, tokens, channels)` to `(n, tokens / merge_size ** 2, hidden_size)`."""
        return self.linear_2(self.act(self.linear_1(merge_tokens(features, self.merge_size))))
