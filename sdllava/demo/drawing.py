"""HTML pictures of the demo page, embedded as data URLs: no file is written."""

import base64
from html import escape
from io import BytesIO

import numpy as np
from matplotlib import colormaps
from PIL import Image

from ..analysis.attention import map_onto_image

SIDE = 512
"""Longer side of a picture, in pixels."""


def data_url(image: Image.Image) -> str:
    """An image as a PNG in a `data:` URL."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture_html(image: Image.Image, caption: str) -> str:
    """An image and its caption."""
    return (
        f'<figure class="picture"><img alt="{escape(caption)}" src="{data_url(_resize(image))}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def heat_html(image: Image.Image, grid: np.ndarray, low: float, high: float, caption: str, unit: str) -> str:
    """A map over its image in grey, with a colour bar.

    Args:
        image: Upright RGB, not padded.
        grid (`np.ndarray` of shape `(side, side)`): Over the padded square.
        low: Value of the first colour.
        high: Value of the last colour.
        caption: Text below the picture.
        unit: Unit of the values, below the colour bar.
    """
    resized = _resize(image)
    span = max(high - low, float(np.finfo(np.float32).tiny))
    heat = _viridis(np.clip((map_onto_image(grid, resized.size) - low) / span, 0, 1))
    blended = Image.blend(resized.convert("L").convert("RGB"), Image.fromarray(heat), 0.6)
    stops = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in _viridis(np.linspace(0, 1, 9)))
    return (
        f'<figure class="picture"><img alt="{escape(caption)}" src="{data_url(blended)}">'
        f'<div class="bar" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="ends"><span>{low:.3g}</span><span>{escape(unit)}</span><span>{high:.3g}</span></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _viridis(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8 colours."""
    return (colormaps["viridis"](values)[..., :3] * 255).astype(np.uint8)


def _resize(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)
