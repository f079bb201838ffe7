"""Square grids of tokens: resizing, merging and positions."""

import math

import torch
from torch.nn import functional as F


def resize_grid(features: torch.Tensor, size: int) -> torch.Tensor:
    """Maps `(n, channels, h, w)` resized to `size` (bilinear, float32), as tokens `(n, size ** 2, channels)`."""
    if features.shape[-2:] != (size, size):
        resized = F.interpolate(features.float(), (size, size), mode="bilinear", align_corners=False)
        features = resized.to(features.dtype)
    return features.flatten(2).transpose(1, 2)


def resize_tokens(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """A square map of tokens `(n, side ** 2, channels)` resized to `(n, size ** 2, channels)`, bilinear, float32."""
    return tokens if tokens.shape[1] == size**2 else resize_grid(as_map(tokens), size)


def as_map(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens `(n, side ** 2, channels)` in row-major order as a map `(n, channels, side, side)`."""
    side = math.isqrt(tokens.shape[1])
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def merge_tokens(tokens: torch.Tensor, size: int) -> torch.Tensor:
    """Join `size` x `size` tokens on channels: `(n, side ** 2, c)` to `(n, (side / size) ** 2, c * size ** 2)`."""
    if size == 1:
        return tokens
    side = math.isqrt(tokens.shape[1]) // size
    grid = tokens.unflatten(1, (side, size, side, size)).transpose(2, 3)
    return grid.reshape(len(tokens), side * side, -1)


def sine_positions(size: int, channels: int, like: torch.Tensor) -> torch.Tensor:
    """Fixed 2D positions `(size ** 2, channels)`: half of the channels for rows, half for columns.

    Args:
        size: Height and width of the grid, in tokens.
        channels: Channels of the positions.
        like: A tensor whose device and dtype the positions get.
    """
    frequencies = 10000.0 ** (-torch.arange(0, channels // 2, 2, device=like.device) / (channels // 2))
    angles = torch.arange(size, device=like.device, dtype=torch.float32)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows = axis[:, None].expand(-1, size, -1)
    grid = torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
    return F.pad(grid, (0, channels - grid.shape[-1])).to(like.dtype)
