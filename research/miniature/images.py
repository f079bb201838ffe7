"""Scenes as batches of pixels."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdllava.scenes.render import render_array
from sdllava.scenes.world import Scene


def to_pixels(scenes: list[Scene]) -> Tensor:
    """Rendered scenes `(n, 3, 64, 64)`, float32 in [-1, 1]."""
    arrays = torch.from_numpy(np.stack([render_array(scene) for scene in scenes]))
    return arrays.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def contact_sheet(pixels: Tensor, columns: int = 8) -> Image.Image:
    """Arrange images `(n, 3, height, width)` in [-1, 1] in rows of `columns`."""
    n, channels, height, width = pixels.shape
    rows = -(-n // columns)
    padded = torch.cat([pixels, pixels.new_ones(rows * columns - n, channels, height, width)])
    grid = padded.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    values = ((grid.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(values.reshape(rows * height, columns * width, channels).cpu().numpy())
