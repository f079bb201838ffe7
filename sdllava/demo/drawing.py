"""HTML of the demo page: pictures as data URLs, so that no file is written, captions, and answers."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image

from ..analysis.attention import map_onto_image

SIDE = 512
"""Longer side of a picture, in pixels."""
VEIL = (16, 20, 30)
VEIL_OPACITY = 0.75
"""Colour and largest opacity of the veil over what a map does not reach."""


@dataclass
class Answer:
    """An answer on the page.

    Args:
        who (`str`): The model and what it reads images with.
        text (`str`): The answer so far.
        is_right (`bool`, *optional*): None where the right answer is not known.
    """

    who: str
    text: str
    is_right: bool | None = None


def data_url(image: Image.Image) -> str:
    """An image as a PNG in a `data:` URL."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def pictures_html(images: Sequence[Image.Image], caption: str, warnings: Sequence[str] = ()) -> str:
    """Images side by side, their caption, and warnings."""
    alerts = "".join(f'<p class="warning" role="status">{escape(warning)}</p>' for warning in warnings)
    return f'<figure class="pictures">{_row(map(resize, images), caption)}{_caption(caption)}{alerts}</figure>'


def maps_html(
    images: Sequence[Image.Image], grids: Sequence[np.ndarray], high: float, caption: str, ends: str, details: str
) -> str:
    """Maps over their images: what a map does not reach lies under a dark veil. The colours below it stay visible.

    Args:
        images: Upright RGB, not padded.
        grids (sequence of `np.ndarray` of shape `(side, side)`): Over the padded squares, at least 0.
        high: The value without a veil. At 0 the veil has its full opacity.
        caption: Text below the pictures.
        ends: What `high` means, at the bright end of the scale.
        details: Technical description.
    """
    drawn = [veiled(image, grid, high) for image, grid in zip(images, grids, strict=True)]
    colour, dark = ", ".join(map(str, VEIL)), f"{VEIL_OPACITY:g}"
    scale = f"linear-gradient(to right, rgba({colour}, {dark}), rgba({colour}, 0)), #fff"
    return (
        f'<figure class="pictures">{_row(drawn, caption)}'
        f'<div class="scale"><span>0</span><span class="bar" style="background: {scale}"></span>'
        f"<span>{escape(ends)}</span></div>{_caption(caption)}"
        f"<details><summary>Details</summary>{escape(details)}</details></figure>"
    )


def veiled(image: Image.Image, grid: np.ndarray, high: float) -> Image.Image:
    """An image under a veil whose opacity falls from `VEIL_OPACITY`, where the map is 0, to 0, where it is `high`."""
    small = resize(image)
    light = np.clip(map_onto_image(grid, small.size) / max(high, float(np.finfo(np.float32).tiny)), 0, 1)
    opacity = (VEIL_OPACITY * (1 - light))[..., None]
    pixels = np.asarray(small) * (1 - opacity) + np.array(VEIL) * opacity
    return Image.fromarray(pixels.round().astype(np.uint8))


def answers_html(answers: Sequence[Answer], expected: str | None = None) -> str:
    """Answers, one below the other, and the right one where it is known.

    Args:
        answers: The most important first.
        expected: The right answer.
    """
    rows = ""
    for answer in answers:
        verdict = {None: "", True: "right", False: "wrong"}[answer.is_right]
        mark = f' <span class="verdict {verdict}">{verdict}</span>' if verdict else ""
        rows += f"<dt>{escape(answer.who)}</dt><dd>{escape(answer.text)}{mark}</dd>"
    truth = f'<p class="truth">Correct answer: {escape(expected)}</p>' if expected else ""
    return f'<dl class="answers">{rows}</dl>{truth}'


def problem_html(message: str) -> str:
    """What is wrong with the field above, or nothing."""
    return f'<p class="problem" role="alert">{escape(message)}</p>' if message else ""


def resize(image: Image.Image) -> Image.Image:
    """An image with a longer side of `SIDE` pixels."""
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def _row(images: Iterable[Image.Image], caption: str) -> str:
    drawn = "".join(f'<img alt="{escape(caption)}" src="{data_url(image)}">' for image in images)
    return f'<div class="row">{drawn}</div>'


def _caption(caption: str) -> str:
    return f"<figcaption>{escape(caption)}</figcaption>"
