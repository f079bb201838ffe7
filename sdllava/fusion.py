"""How static and diffusion features become one sequence, and its way into the language model (S3, 5.2 and A.2)."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration import SDLlavaConfig
from .diffusion import resize_grid


def resize_tokens(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """A square map of tokens `(n, side ** 2, channels)` resized to `(n, size ** 2, channels)`, bilinear, float32."""
    side = math.isqrt(tokens.shape[1])
    return resize_grid(tokens.transpose(1, 2).unflatten(2, (side, side)), size)


def sine_positions(size: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Fixed 2D positions `(size ** 2, channels)`: half of the channels for rows, half for columns."""
    frequencies = 10000.0 ** (-torch.arange(0, channels // 2, 2, device=like.device) / (channels // 2))
    angles = torch.arange(size, device=like.device, dtype=torch.float32)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = axis[:, None].expand(-1, size, -1)
    grid = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
    return F.pad(grid, (0, channels - grid.shape[-1])).to(like.dtype)


class CrossAttentionFusion(nn.Module):
    """Static tokens are queries, diffusion tokens keys and values: pre-norm multi-head attention with a residual.

    The output projection starts at zero, so a model built on a LLaVA gives LLaVA's own logits before the first step.
    """

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        width, diffusion_width = config.vision_hidden_size, config.diffusion_config.hidden_size
        self.num_heads = config.fusion_num_attention_heads
        self.query_size = config.token_grid_size
        self.query_norm = nn.LayerNorm(width)
        self.key_norm = nn.LayerNorm(diffusion_width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(diffusion_width, width)
        self.v_proj = nn.Linear(diffusion_width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, static: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """`(n, tokens, width)` and `(n, grid ** 2, diffusion width)` to `(n, query tokens, width)`."""
        if static.shape[1] != self.query_size**2:
            static = resize_tokens(static, self.query_size)
        keys = self.key_norm(diffusion)
        positions = sine_positions(math.isqrt(keys.shape[1]), keys.shape[2], keys)
        query = self._heads(self.q_proj(self.query_norm(static)))
        key = self._heads(self.k_proj(keys + positions))
        value = self._heads(self.v_proj(keys))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return static + self.out_proj(attended)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class ConcatFusion(nn.Module):
    """Both maps at one grid (16x16 as in S3, A.2), side by side on channels."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.size = config.token_grid_size

    def forward(self, static: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """`(n, tokens, a)` and `(n, grid ** 2, b)` to `(n, size ** 2, a + b)`."""
        maps = [x if x.shape[1] == self.size**2 else resize_tokens(x, self.size) for x in (static, diffusion)]
        return torch.cat([maps[0], maps[1].to(maps[0].dtype)], dim=-1)


class ConcatTokensFusion(nn.Module):
    """Static tokens, then diffusion tokens at the static encoder's width."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.size = config.token_grid_size
        self.norm = nn.LayerNorm(config.diffusion_config.hidden_size)
        self.proj = nn.Linear(config.diffusion_config.hidden_size, config.vision_hidden_size)

    def forward(self, static: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """`(n, a, width)` and `(n, b, diffusion width)` to `(n, a + b, width)`."""
        if static.shape[1] != self.size**2:
            static = resize_tokens(static, self.size)
        return torch.cat([static, self.proj(self.norm(diffusion))], dim=1)


class GatedFusion(nn.Module):
    """Static tokens plus gated diffusion tokens at the same grid; the gate reads both (an open question of S3).

    The output projection starts at zero, as in cross-attention.
    """

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        width, diffusion_width = config.vision_hidden_size, config.diffusion_config.hidden_size
        self.size = config.token_grid_size
        self.static_norm = nn.LayerNorm(width)
        self.diffusion_norm = nn.LayerNorm(diffusion_width)
        self.gate_proj = nn.Linear(width + diffusion_width, width)
        self.out_proj = nn.Linear(diffusion_width, width)

    def forward(self, static: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        """`(n, tokens, width)` and `(n, grid ** 2, diffusion width)` to `(n, size ** 2, width)`."""
        static, diffusion = (
            x if x.shape[1] == self.size**2 else resize_tokens(x, self.size) for x in (static, diffusion)
        )
        diffusion = self.diffusion_norm(diffusion)
        gate = self.gate_proj(torch.cat([self.static_norm(static), diffusion], dim=-1)).sigmoid()
        return static + gate * self.out_proj(diffusion)


FUSIONS = {
    "cross_attention": CrossAttentionFusion,
    "concat": ConcatFusion,
    "concat_tokens": ConcatTokensFusion,
    "gated": GatedFusion,
}


class ImplicitCaptioner(nn.Module):
    """The static encoder's global image feature as prompt tokens of the diffusion model (S4, 6.1)."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.num_tokens = config.implicit_caption_tokens
        self.width = config.diffusion_config.unet_config["cross_attention_dim"]
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, self.width)
        self.linear_2 = nn.Linear(self.width, self.num_tokens * self.width)

    def forward(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """`(n, static width)` to `(n, tokens, prompt width)`."""
        return self.linear_2(F.gelu(self.linear_1(image_embeds))).unflatten(1, (self.num_tokens, self.width))


class SDLlavaMultiModalProjector(nn.Module):
    """LLaVA's two-layer MLP, behind an optional joining of neighbouring tokens."""

    def __init__(self, config: SDLlavaConfig):
        super().__init__()
        self.merge_size = config.spatial_merge_size
        hidden_size, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        self.linear_1 = nn.Linear(config.fused_hidden_size * self.merge_size**2, hidden_size, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(n, tokens, channels)` to `(n, tokens / merge_size ** 2, hidden_size)`."""
        return self.linear_2(self.act(self.linear_1(merge_tokens(features, self.merge_size))))


def merge_tokens(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Join `size` x `size` tokens on channels: `(n, side ** 2, c)` to `(n, (side / size) ** 2, c * size ** 2)`."""
    if size == 1:
        return tokens
    side = math.isqrt(tokens.shape[1]) // size
    grid = tokens.unflatten(1, (side, size, side, size)).transpose(2, 3)
    return grid.reshape(len(tokens), side * side, -1)
