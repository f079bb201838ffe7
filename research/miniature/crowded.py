"""Larger scenes with more objects: up to nine in images of 96x96 pixels, and questions about one of them."""

import random

import numpy as np
from PIL import Image

from sdllava.scenes.language import article, describe, yes_no
from sdllava.scenes.render import SPRITE, ground, paint
from sdllava.scenes.world import COLOURS, DIRECTIONAL, HELD_OUT_PAIRS, SHAPES, SceneObject, random_object

SIZE, ROWS = 96, 3
_CELL = SIZE // ROWS
_FEWEST = 5
_PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in HELD_OUT_PAIRS]


def crowded_example(split: str, seed: int) -> tuple[Image.Image, str, str, str]:
    """Image, caption, question and answer number `seed` of a split. The caption does not name places.

    Objects differ in colour or in shape, and a question names both.
    """
    rng = random.Random(f"crowded {split} {seed}")
    count = rng.randint(_FEWEST, ROWS**2)
    objects = [random_object(rng, *pair, "") for pair in rng.sample(_PAIRS, count)]
    pixels = ground(SIZE, SIZE // 2)
    for cell, item in zip(rng.sample(range(ROWS**2), count), objects, strict=True):
        row, column = divmod(cell, ROWS)
        margin = (_CELL - SPRITE) // 2
        paint(pixels, item, column * _CELL + margin + item.offset[0], row * _CELL + margin + item.offset[1])
    caption = ", ".join(describe(item).removesuffix(" at the ") for item in objects)
    return Image.fromarray(pixels.astype(np.uint8)), caption, *_question(rng, objects)


def _question(rng: random.Random, objects: list[SceneObject]) -> tuple[str, str]:
    """A question about one object whose answers are about equally frequent."""
    kind = rng.choice(("border", "state", "direction", "letter", "exists"))
    if kind == "exists":
        absent = [pair for pair in _PAIRS if pair not in [item.pair for item in objects]]
        present = rng.random() < 0.5
        pair = rng.choice([item.pair for item in objects] if present else absent)
        return f"Is there {article(' '.join(pair))}?", yes_no(present)
    suitable = {
        "border": objects,
        "state": [item for item in objects if not item.letter],
        "direction": [item for item in objects if item.shape in DIRECTIONAL],
        "letter": [item for item in objects if item.letter],
    }[kind]
    if not suitable:
        return _question(rng, objects)
    if kind == "state":
        state = rng.choice(sorted({item.state for item in suitable}))
        suitable = [item for item in suitable if item.state == state]
    item = rng.choice(suitable)
    name = " ".join(item.pair)
    return {
        "border": (f"Does the {name} have a border?", yes_no(item.border)),
        "state": (f"Is the {name} whole or broken?", item.state),
        "direction": (f"Which way does the {name} point?", item.direction),
        "letter": (f"Which letter is on the {name}?", item.letter),
    }[kind]
