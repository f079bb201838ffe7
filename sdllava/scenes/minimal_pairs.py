"""Minimal pairs: two scenes that differ in one pattern, and a question whose answers differ."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from .language import choose, yes_no
from .world import (
    CELLS,
    DIRECTIONS,
    LETTERS,
    PATTERNS,
    STATES,
    VIEWPOINTS,
    Scene,
    SceneObject,
    random_object,
    sample_scene,
)

Edit = tuple[Scene, SceneObject | None]
"""The other scene of a minimal pair, and the object of this one that was changed."""


@dataclass(frozen=True)
class MinimalPair:
    """Two scenes that differ in only one pattern, and a question whose answers differ."""

    pattern: str
    scenes: tuple[Scene, Scene]
    question: str
    answers: tuple[str, str]


# Each edit takes (scene, rng) and returns (other scene, changed object), or None where it does not fit the scene.


def _with(scene: Scene, item: SceneObject, **changes: Any) -> Scene:
    return replace(scene, objects=tuple(replace(o, **changes) if o is item else o for o in scene.objects))


def _other(values: Iterable[str], value: str, rng: random.Random) -> str:
    return rng.choice([v for v in values if v != value])


def _edit_orientation(scene: Scene, rng: random.Random) -> Edit | None:
    if item := choose((o for o in scene.objects if o.direction), rng):
        return _with(scene, item, direction=_other(DIRECTIONS, item.direction, rng)), item
    return None


def _edit_presence(scene: Scene, rng: random.Random) -> Edit | None:
    item = rng.choice(scene.objects)
    return _with(scene, item, border=not item.border), item


def _edit_state(scene: Scene, rng: random.Random) -> Edit | None:
    if item := choose((o for o in scene.objects if not o.letter), rng):
        return _with(scene, item, state=_other(STATES, item.state, rng)), item
    return None


def _edit_count(scene: Scene, rng: random.Random) -> Edit | None:
    if len(scene.objects) == len(CELLS):
        return replace(scene, objects=scene.objects[:-1]), None
    colour = rng.choice([c for c in scene.colours if all(o.colour != c for o in scene.objects)])
    cell = rng.choice([c for c in CELLS if all(o.cell != c for o in scene.objects)])
    added = random_object(rng, colour, rng.choice(scene.shapes), cell)
    return replace(scene, objects=(*scene.objects, added)), None


def _edit_position(scene: Scene, rng: random.Random) -> Edit | None:
    item = rng.choice(scene.objects)
    cell = _other(CELLS, item.cell, rng)
    moved = {item.cell: cell, cell: item.cell}
    objects = tuple(replace(o, cell=moved.get(o.cell, o.cell)) for o in scene.objects)
    return replace(scene, objects=objects), item


def _edit_colour(scene: Scene, rng: random.Random) -> Edit | None:
    shapes = Counter(o.shape for o in scene.objects)
    if item := choose((o for o in scene.objects if shapes[o.shape] == 1), rng):
        colour = rng.choice([c for c in scene.colours if all(o.colour != c for o in scene.objects)])
        return _with(scene, item, colour=colour), item
    return None


def _edit_structure(scene: Scene, rng: random.Random) -> Edit | None:
    item = rng.choice(scene.objects)
    alike = [s for s in scene.shapes if (s in ("triangle", "arrow")) == bool(item.direction)]
    return _with(scene, item, shape=_other(alike, item.shape, rng)), item


def _edit_text(scene: Scene, rng: random.Random) -> Edit | None:
    if item := choose((o for o in scene.objects if o.letter), rng):
        return _with(scene, item, letter=_other(LETTERS, item.letter, rng)), item
    return None


def _edit_viewpoint(scene: Scene, rng: random.Random) -> Edit | None:
    return replace(scene, viewpoint=_other(VIEWPOINTS, scene.viewpoint, rng)), None


_EDITS: dict[str, tuple[Callable[[Scene, random.Random], Edit | None], Callable[[Any], str]]] = {
    "orientation": (_edit_orientation, lambda o: f"Which way does the {o.colour} {o.shape} point?"),
    "presence": (_edit_presence, lambda o: f"Does the {o.colour} {o.shape} have a border?"),
    "state": (_edit_state, lambda o: f"Is the {o.colour} {o.shape} whole or broken?"),
    "count": (_edit_count, lambda o: "How many objects are there?"),
    "position": (_edit_position, lambda o: f"Where is the {o.colour} {o.shape}?"),
    "colour": (_edit_colour, lambda o: f"What colour is the {o.shape}?"),
    "structure": (_edit_structure, lambda o: f"What shape is the {o.colour} object?"),
    "text": (_edit_text, lambda o: f"Which letter is on the {o.colour} {o.shape}?"),
    "viewpoint": (_edit_viewpoint, lambda o: "From where is the scene seen?"),
}
_ANSWERS: dict[str, Callable[[Scene, Any], str]] = {
    "orientation": lambda scene, o: o.direction,
    "presence": lambda scene, o: yes_no(o.border),
    "state": lambda scene, o: o.state,
    "count": lambda scene, o: str(len(scene.objects)),
    "position": lambda scene, o: o.cell,
    "colour": lambda scene, o: o.colour,
    "structure": lambda scene, o: o.shape,
    "text": lambda scene, o: o.letter,
    "viewpoint": lambda scene, o: scene.viewpoint,
}


def minimal_pair(pattern: str, split: str, seed: int) -> MinimalPair:
    """Pair number `seed` of a pattern. Both scenes belong to the split.

    Raises:
        ValueError: `pattern` or `split` is unknown.
    """
    if pattern not in _EDITS:
        raise ValueError(f"Pattern {pattern!r} is unknown. Use one of {', '.join(PATTERNS)}.")
    edit, ask_about = _EDITS[pattern]
    rng = random.Random(f"pair {pattern} {split} {seed}")
    while True:
        scene = sample_scene(split, rng.getrandbits(48))
        edited = edit(scene, rng)
        if not edited or edited[0].split != split:
            continue
        other, item = edited
        changed = item and other.objects[scene.objects.index(item)]
        answers = _ANSWERS[pattern](scene, item), _ANSWERS[pattern](other, changed)
        pair = [(scene, answers[0]), (other, answers[1])]
        rng.shuffle(pair)
        return MinimalPair(pattern, (pair[0][0], pair[1][0]), ask_about(item), (pair[0][1], pair[1][1]))
