"""The world of the scenes: what a scene contains, how one is sampled, and its split.

A scene is 64x64 pixels: one to four objects, each in its own quadrant, and a horizon that shows the viewpoint. Its
attributes follow the nine visual patterns of MMVP (arXiv 2401.06209, section 3.2), see `PATTERNS`.
"""

import hashlib
import random
from dataclasses import asdict, dataclass
from typing import Any

COLOURS = ("red", "green", "blue", "yellow", "purple")
SHAPES = ("circle", "square", "star", "triangle", "arrow")
FURTHER_COLOURS = ("orange", "pink", "brown", "teal", "gray")
FURTHER_SHAPES = ("cross", "diamond", "pentagon", "heart", "rectangle")
"""Colours and shapes only of the split "varied", so that most colours occur with most shapes there."""
DIRECTIONAL = ("triangle", "arrow")
DIRECTIONS = ("up", "right", "down", "left")
CELLS = ("top left", "top right", "bottom left", "bottom right")
STATES = ("whole", "broken")
LETTERS = ("o", "v", "x", "z")
VIEWPOINTS = ("above", "front", "below")
PATTERNS = ("orientation", "presence", "state", "count", "position", "colour", "structure", "text", "viewpoint")
SPLITS = ("train", "validation", "test", "composition", "varied")

HELD_OUT_PAIRS = frozenset(zip(COLOURS, ("star", "arrow", "circle", "square", "triangle"), strict=True))
MAX_OFFSET = 4
_OBJECT_COUNTS = ((1, 2, 3, 4), (10, 38, 34, 18))


@dataclass(frozen=True)
class SceneObject:
    """One object. Only triangles and arrows have a direction, and broken objects have no letter ("" for none)."""

    colour: str
    shape: str
    direction: str
    cell: str
    border: bool
    state: str
    letter: str
    offset: tuple[int, int]

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """A viewpoint and objects that differ in colour and in cell, in the order of the caption."""

    viewpoint: str
    objects: tuple[SceneObject, ...]

    def record(self) -> dict[str, Any]:
        """The scene as JSON values, for `from_record`."""
        return {"viewpoint": self.viewpoint, "objects": [asdict(o) | {"offset": list(o.offset)} for o in self.objects]}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Scene":
        """The scene of a `record()`."""
        objects = (SceneObject(**o | {"offset": tuple(o["offset"])}) for o in record["objects"])
        return cls(record["viewpoint"], tuple(objects))

    @property
    def is_varied(self) -> bool:
        """Whether an object has one of `FURTHER_COLOURS` or `FURTHER_SHAPES`."""
        return any(o.colour in FURTHER_COLOURS or o.shape in FURTHER_SHAPES for o in self.objects)

    @property
    def colours(self) -> tuple[str, ...]:
        """The colours among which those of this scene were drawn."""
        return COLOURS + FURTHER_COLOURS * self.is_varied

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes among which those of this scene were drawn."""
        return SHAPES + FURTHER_SHAPES * self.is_varied

    @property
    def split(self) -> str:
        """The split of this scene, computed from its content without the objects' offsets and order.

        "composition" holds every scene with a colour-shape pair of `HELD_OUT_PAIRS`, "varied" every other scene with
        further colours or shapes. Of the rest, one eighth is "test" and one eighth "validation". Held-out scenes are
        therefore not in the training split, not even with objects moved by some pixels.
        """
        if any(o.pair in HELD_OUT_PAIRS for o in self.objects):
            return "composition"
        if self.is_varied:
            return "varied"
        content = sorted((o.cell, o.colour, o.shape, o.direction, o.border, o.state, o.letter) for o in self.objects)
        bucket = hashlib.blake2b(repr((self.viewpoint, content)).encode(), digest_size=2).digest()[0] % 8
        return {0: "test", 1: "validation"}.get(bucket, "train")


def random_object(rng: random.Random, colour: str, shape: str, cell: str) -> SceneObject:
    """Draw the other attributes of an object."""
    mark = rng.randrange(3)
    return SceneObject(
        colour=colour,
        shape=shape,
        direction=rng.choice(DIRECTIONS) if shape in DIRECTIONAL else "",
        cell=cell,
        border=rng.random() < 0.5,
        state="broken" if mark == 1 else "whole",
        letter=rng.choice(LETTERS) if mark == 2 else "",
        offset=(rng.randint(-MAX_OFFSET, MAX_OFFSET), rng.randint(-MAX_OFFSET, MAX_OFFSET)),
    )


def _random_scene(rng: random.Random, split: str) -> Scene:
    count = rng.choices(*_OBJECT_COUNTS)[0]
    varied = split == "varied"
    known, shapes = COLOURS + FURTHER_COLOURS * varied, SHAPES + FURTHER_SHAPES * varied
    colours, cells = rng.sample(known, count), rng.sample(CELLS, count)
    pairs = [(c, rng.choice([s for s in shapes if (c, s) not in HELD_OUT_PAIRS])) for c in colours]
    if split == "composition":
        held_out = rng.randrange(count)
        pairs[held_out] = next(pair for pair in HELD_OUT_PAIRS if pair[0] == colours[held_out])
    objects = tuple(random_object(rng, *pair, cell) for pair, cell in zip(pairs, cells, strict=True))
    return Scene(rng.choice(VIEWPOINTS), objects)


def sample_scene(split: str, seed: int) -> Scene:
    """Scene number `seed` of a split. Equal arguments give equal scenes.

    Raises:
        ValueError: `split` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"Split {split!r} is unknown. Use one of {', '.join(SPLITS)}.")
    rng = random.Random(f"scene {split} {seed}")
    while (scene := _random_scene(rng, split)).split != split:
        pass
    return scene
