"""Pictures inside the page, as data addresses: nothing is written to a disk."""

import base64
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from ..analysis.attention import map_onto_image

SIDE = 512


def _colours(values: np.ndarray) -> np.ndarray:
    """Values in [0, 1] in viridis, uint8."""
    from matplotlib import colormaps

    return (colormaps["viridis"](values)[..., :3] * 255).astype(np.uint8)


def data_address(image: Image.Image) -> str:
    """A PNG as a `data:` address."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _shown(image: Image.Image) -> Image.Image:
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def picture_html(image: Image.Image, caption: str) -> str:
    """An image and its caption."""
    return (
        f'<figure class="look"><img alt="{escape(caption)}" src="{data_address(_shown(image))}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def heat_html(image: Image.Image, grid: np.ndarray, low: float, high: float, caption: str, unit: str) -> str:
    """A map over its grey image, with a colour bar.

    Args:
        grid (`np.ndarray` of shape `(side, side)`): over the padded square.
        low, high: values of the first and the last colour.
    """
    shown = _shown(image)
    span = max(high - low, float(np.finfo(np.float32).tiny))
    heat = _colours(np.clip((map_onto_image(grid, shown.size) - low) / span, 0, 1))
    blended = Image.blend(shown.convert("L").convert("RGB"), Image.fromarray(heat), 0.6)
    stops = ", ".join(f"rgb({r}, {g}, {b})" for r, g, b in _colours(np.linspace(0, 1, 9)))
    return (
        f'<figure class="look"><img alt="{escape(caption)}" src="{data_address(blended)}">'
        f'<div class="bar" style="background: linear-gradient(to right, {stops})"></div>'
        f'<div class="ends"><span>{low:.3g}</span><span>{escape(unit)}</span><span>{high:.3g}</span></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
