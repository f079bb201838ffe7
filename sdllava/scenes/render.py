"""Rendering of scenes. Only integer arithmetic and its own letters, so that a scene has the same bytes everywhere."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from .world import CELLS, DIRECTIONS, Scene, SceneObject

SIZE = 64
SPRITE = 24
_OVERSAMPLING = 8
_RGB = {
    "red": (222, 44, 44),
    "green": (36, 168, 74),
    "blue": (48, 92, 224),
    "yellow": (244, 204, 36),
    "purple": (152, 60, 196),
    "orange": (240, 130, 30),
    "pink": (246, 142, 192),
    "brown": (118, 70, 38),
    "teal": (20, 140, 140),
    "gray": (112, 112, 112),
}
_SKY, _FLOOR, _BLACK, _WHITE = (214, 226, 238), (178, 162, 142), (20, 20, 20), (250, 250, 250)
_HORIZON = {"above": 10, "front": 32, "below": 54}
_TOLERANCE = 12  # per channel, for JPEG's errors
_LEAST_GROUND = 0.45  # of the pixels: four objects cover half of a scene
_QUADRANT = SIZE // 2
_CENTRE = SPRITE / 2

# Corners in the sprite's pixels, pointing up.
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(2.5, 2.5), (21.5, 2.5), (21.5, 21.5), (2.5, 21.5)],
    "triangle": [(12, 0.5), (21, 22.5), (3, 22.5)],
    "arrow": [(12, 0.5), (22.5, 11.5), (16.5, 11.5), (16.5, 23), (7.5, 23), (7.5, 11.5), (1.5, 11.5)],
    "star": [
        (_CENTRE + r * math.sin(math.pi * k / 5), _CENTRE + 0.8 - r * math.cos(math.pi * k / 5))
        for k, r in enumerate((12.0, 5.6) * 5)
    ],
    "cross": [
        *[(8, 1), (16, 1), (16, 8), (23, 8), (23, 16), (16, 16)],
        *[(16, 23), (8, 23), (8, 16), (1, 16), (1, 8), (8, 8)],
    ],
    "diamond": [(12, 0.5), (21, 12), (12, 23.5), (3, 12)],
    "pentagon": [
        (_CENTRE + 12 * math.sin(k * math.pi / 2.5), 12.8 - 12 * math.cos(k * math.pi / 2.5)) for k in range(5)
    ],
    "heart": [
        (12, 23),
        (1.5, 11),
        (1.5, 5.5),
        (4.5, 2),
        (8.5, 2),
        (12, 6),
        (15.5, 2),
        (19.5, 2),
        (22.5, 5.5),
        (22.5, 11),
    ],
    "rectangle": [(0.5, 6), (23.5, 6), (23.5, 18), (0.5, 18)],
}
# Strokes of the letters, in pixels from the centre of the badge.
_STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "v": [[(-2.6, -3), (0, 3), (2.6, -3)]],
    "x": [[(-2.6, -3), (2.6, 3)], [(2.6, -3), (-2.6, 3)]],
    "z": [[(-2.6, -2.6), (2.6, -2.6), (-2.6, 2.6), (2.6, 2.6)]],
}
_CRACK: list[tuple[float, float]] = [(9.5, -1), (14, 6), (9, 12), (14.5, 18), (10.5, 25)]


def _scaled(points: list[tuple[float, float]], shift: float = 0.0) -> list[tuple[int, int]]:
    return [(round((x + shift) * _OVERSAMPLING), round((y + shift) * _OVERSAMPLING)) for x, y in points]


def _rotated(points: list[tuple[float, float]], quarter_turns: int) -> list[tuple[float, float]]:
    for _ in range(quarter_turns):
        points = [(SPRITE - y, x) for x, y in points]
    return points


def _draw_letter(draw: ImageDraw.ImageDraw, letter: str) -> None:
    draw.ellipse(_scaled([(-5.2, -5.2), (5.2, 5.2)], _CENTRE), fill=(*_WHITE, 255))
    width = round(1.7 * _OVERSAMPLING)
    if letter == "o":
        draw.ellipse(_scaled([(-3.2, -3.2), (3.2, 3.2)], _CENTRE), outline=(*_BLACK, 255), width=width)
    for stroke in _STROKES.get(letter, ()):
        draw.line(_scaled(stroke, _CENTRE), fill=(*_BLACK, 255), width=width, joint="curve")


@functools.cache
def _sprite(colour: str, shape: str, direction: str, border: bool, state: str, letter: str) -> tuple[np.ndarray, ...]:
    """Colour times coverage `(24, 24, 3)` and the background's weight `(24, 24, 1)`, both uint16 in [0, 255]."""
    image = Image.new("RGBA", (SPRITE * _OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(image)
    fill, width = (*_RGB[colour], 255), round(2.2 * _OVERSAMPLING)
    outline = (*_BLACK, 255) if border else None
    if shape == "circle":
        draw.ellipse(_scaled([(1, 1), (23, 23)]), fill=fill, outline=outline, width=width)
    else:
        turns = DIRECTIONS.index(direction) if direction else 0
        points = _scaled(_rotated(_POLYGONS[shape], turns))
        draw.polygon(points, fill=fill, outline=outline, width=width if border else 1)
    if state == "broken":
        draw.line(_scaled(_CRACK), fill=(0, 0, 0, 0), width=round(3 * _OVERSAMPLING), joint="curve")
    if letter:
        _draw_letter(draw, letter)
    pixels = np.asarray(image.convert("RGBa").reduce(_OVERSAMPLING), dtype=np.uint16)
    return pixels[..., :3], 255 - pixels[..., 3:]


def object_box(item: SceneObject) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of an object in a rendered scene, in pixels."""
    row, column = divmod(CELLS.index(item.cell), 2)
    margin = (_QUADRANT - SPRITE) // 2
    left, top = column * _QUADRANT + margin + item.offset[0], row * _QUADRANT + margin + item.offset[1]
    return left, top, left + SPRITE, top + SPRITE


def render_array(scene: Scene) -> np.ndarray:
    """Render a scene as RGB pixels `(64, 64, 3)`, uint8."""
    pixels = ground(SIZE, _HORIZON[scene.viewpoint])
    for item in scene.objects:
        left, top, _, _ = object_box(item)
        paint(pixels, item, left, top)
    return pixels.astype(np.uint8)


def ground(size: int, horizon: int) -> np.ndarray:
    """A square image of sky and floor, `(size, size, 3)`, uint16.

    Args:
        size: Pixels along one side.
        horizon: Rows of sky.
    """
    pixels = np.empty((size, size, 3), dtype=np.uint16)
    pixels[:horizon], pixels[horizon:] = _SKY, _FLOOR
    return pixels


def paint(pixels: np.ndarray, item: SceneObject, left: int, top: int) -> None:
    """Paint an object, 24 pixels wide and high, over an image `(height, width, 3)`, uint16, in place."""
    colour, background = _sprite(item.colour, item.shape, item.direction, item.border, item.state, item.letter)
    region = pixels[top : top + SPRITE, left : left + SPRITE]
    region[:] = colour + (region * background + 127) // 255


def render(scene: Scene) -> Image.Image:
    """Render a scene as a 64x64 RGB image."""
    return Image.fromarray(render_array(scene))


def looks_rendered(image: Image.Image) -> bool:
    """Whether an image of any size may be a rendered scene: about half of its pixels have the ground's colours."""
    pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.NEAREST), dtype=np.int16)
    grounds = (np.abs(pixels - np.array(ground)).max(axis=-1) <= _TOLERANCE for ground in (_SKY, _FLOOR))
    return bool(np.logical_or(*grounds).mean() >= _LEAST_GROUND)
