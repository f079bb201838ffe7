"""The language of scenes: captions, and questions with short answers, by pattern.

Answers are balanced: a question with a frequent answer is kept less often, so that guessing from the question scores
about the chance of its answer set.
"""

import functools
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .world import (
    DIRECTIONS,
    HELD_OUT_PAIRS,
    PATTERNS,
    Scene,
    SceneObject,
    sample_scene,
)

MAX_SHAPE_COUNT = 2
_BALANCE_SCENES = 4000

Wording = tuple[str, str, SceneObject | None]
"""Text, answer and subject of a question."""

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A question about a scene: pattern, kind of wording, text, answer, and the object that it is about."""

    pattern: str
    kind: str
    text: str
    answer: str
    subject: SceneObject | None = None


def article(noun: str) -> str:
    """A noun with its indefinite article."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def describe(item: SceneObject) -> str:
    """One object in words, for example "a broken red arrow pointing up with a border at the top left"."""
    adjectives = "broken " if item.state == "broken" else ""
    text = article(f"{adjectives}{item.colour} {item.shape}")
    text += f" pointing {item.direction}" if item.direction else ""
    text += " with a border" if item.border else ""
    text += f" marked {item.letter}" if item.letter else ""
    return f"{text} at the {item.cell}"


def caption(scene: Scene) -> str:
    """The caption of a scene: every attribute of every object, and the viewpoint."""
    viewpoint = "the front" if scene.viewpoint == "front" else scene.viewpoint
    return f"{', '.join(describe(item) for item in scene.objects)}, seen from {viewpoint}"


def describe_request(scene: Scene, item: SceneObject, rng: random.Random) -> tuple[str, str]:
    """A request to describe one object, by its colour, its cell, or a shape that only it has, and its description."""
    names = [f"{item.colour} object", f"{item.colour} {item.shape}", f"object at the {item.cell}"]
    names += [item.shape] if sum(o.shape == item.shape for o in scene.objects) == 1 else []
    return f"Describe the {rng.choice(names)}.", describe(item)


def _refer(item: SceneObject, rng: random.Random) -> str:
    """An object by its colour, which is unique in the scene, and with probability 0.5 by its shape."""
    return f"{item.colour} {item.shape if rng.random() < 0.5 else 'object'}"


def choose(items: Iterable[T], rng: random.Random) -> T | None:
    """One of the items, or None where there are none."""
    choices = list(items)
    return rng.choice(choices) if choices else None


def yes_no(value: bool) -> str:
    """A truth value as an answer."""
    return "yes" if value else "no"


# Each kind takes (scene, rng) and returns (text, answer, subject), or None where it does not fit the scene.


def _way(scene: Scene, rng: random.Random) -> Wording | None:
    if item := choose((o for o in scene.objects if o.direction), rng):
        return f"Which way does the {_refer(item, rng)} point?", item.direction, item
    return None


def _points(scene: Scene, rng: random.Random) -> Wording | None:
    if item := choose((o for o in scene.objects if o.direction), rng):
        way = item.direction if rng.random() < 0.5 else rng.choice([d for d in DIRECTIONS if d != item.direction])
        return f"Does the {_refer(item, rng)} point {way}?", yes_no(way == item.direction), item
    return None


def _border(scene: Scene, rng: random.Random) -> Wording | None:
    item = rng.choice(scene.objects)
    return f"Does the {_refer(item, rng)} have a border?", yes_no(item.border), item


def _exists(scene: Scene, rng: random.Random) -> Wording | None:
    shape = rng.choice(scene.shapes)
    item = next((o for o in scene.objects if o.shape == shape), None)
    return f"Is there {article(shape)}?", yes_no(item is not None), item


def _pair_exists(scene: Scene, rng: random.Random) -> Wording | None:
    present = [o.pair for o in scene.objects]
    pairs = [(c, s) for c in scene.colours for s in scene.shapes if (c, s) not in HELD_OUT_PAIRS or (c, s) in present]
    tempting = [p for p in pairs if any((p[0] == c) != (p[1] == s) for c, s in present)]
    pair = rng.choice(present if rng.random() < 0.5 else tempting)
    item = next((o for o in scene.objects if o.pair == pair), None)
    return f"Is there {article(' '.join(pair))}?", yes_no(item is not None), item


def _whole_or_broken(scene: Scene, rng: random.Random) -> Wording | None:
    if item := choose((o for o in scene.objects if not o.letter), rng):
        return f"Is the {_refer(item, rng)} whole or broken?", item.state, item
    return None


def _broken(scene: Scene, rng: random.Random) -> Wording | None:
    if item := choose((o for o in scene.objects if not o.letter), rng):
        return f"Is the {_refer(item, rng)} broken?", yes_no(item.state == "broken"), item
    return None


def _how_many(scene: Scene, rng: random.Random) -> Wording | None:
    return "How many objects are there?", str(len(scene.objects)), None


def _how_many_of(scene: Scene, rng: random.Random) -> Wording | None:
    shape = rng.choice(scene.shapes)
    number = sum(o.shape == shape for o in scene.objects)
    plural = f"{shape}es" if shape.endswith("s") else f"{shape}s"
    return (f"How many {plural} are there?", str(number), None) if number <= MAX_SHAPE_COUNT else None


def _where(scene: Scene, rng: random.Random) -> Wording | None:
    item = rng.choice(scene.objects)
    return f"Where is the {_refer(item, rng)}?", item.cell, item


def _left_or_right(scene: Scene, rng: random.Random) -> Wording | None:
    return _compare(scene, rng, ("left", "right"), "of ", side=1)


def _above_or_below(scene: Scene, rng: random.Random) -> Wording | None:
    return _compare(scene, rng, ("above", "below"), "", side=0)


def _compare(scene: Scene, rng: random.Random, words: tuple[str, str], joiner: str, side: int) -> Wording | None:
    """Compare the cells of two objects: their rows (`side` 0) or their columns (1)."""
    item = rng.choice(scene.objects)
    others = [o for o in scene.objects if o.cell.split()[side] != item.cell.split()[side]]
    if other := choose(others, rng):
        first = item.cell.split()[side] in ("left", "top")
        options = " or ".join(rng.sample(words, 2))
        return f"Is the {_refer(item, rng)} {options} {joiner}the {_refer(other, rng)}?", words[not first], item
    return None


def _colour_of(scene: Scene, rng: random.Random) -> Wording | None:
    shapes = Counter(o.shape for o in scene.objects)
    if item := choose((o for o in scene.objects if shapes[o.shape] == 1), rng):
        return f"What colour is the {item.shape}?", item.colour, item
    return None


def _colour_at(scene: Scene, rng: random.Random) -> Wording | None:
    item = rng.choice(scene.objects)
    return f"What colour is the object at the {item.cell}?", item.colour, item


def _shape_of(scene: Scene, rng: random.Random) -> Wording | None:
    item = rng.choice(scene.objects)
    return f"What shape is the {item.colour} object?", item.shape, item


def _shape_at(scene: Scene, rng: random.Random) -> Wording | None:
    item = rng.choice(scene.objects)
    return f"What shape is the object at the {item.cell}?", item.shape, item


def _which_shape(scene: Scene, rng: random.Random) -> Wording | None:
    item = rng.choice(scene.objects)
    others = [s for s in scene.shapes if s != item.shape and (item.colour, s) not in HELD_OUT_PAIRS]
    options = rng.sample([item.shape, rng.choice(others)], 2)
    return f"Is the {item.colour} object {' or '.join(map(article, options))}?", item.shape, item


def _letter(scene: Scene, rng: random.Random) -> Wording | None:
    if item := choose((o for o in scene.objects if o.letter), rng):
        return f"Which letter is on the {_refer(item, rng)}?", item.letter, item
    return None


def _seen_from(scene: Scene, rng: random.Random) -> Wording | None:
    return "From where is the scene seen?", scene.viewpoint, None


_KINDS: dict[str, dict[str, Callable[[Scene, random.Random], Wording | None]]] = {
    "orientation": {"way": _way, "points": _points},
    "presence": {"border": _border, "exists": _exists, "pair exists": _pair_exists},
    "state": {"whole or broken": _whole_or_broken, "broken": _broken},
    "count": {"how many": _how_many, "how many of": _how_many_of},
    "position": {"where": _where, "left or right": _left_or_right, "above or below": _above_or_below},
    "colour": {"colour of": _colour_of, "colour at": _colour_at},
    "structure": {"shape of": _shape_of, "shape at": _shape_at, "which shape": _which_shape},
    "text": {"letter": _letter},
    "viewpoint": {"seen from": _seen_from},
}
KINDS = tuple(kind for kinds in _KINDS.values() for kind in kinds)


def _ask(scene: Scene, rng: random.Random, pattern: str, kind: str) -> Question | None:
    found = _KINDS[pattern][kind](scene, rng)
    return Question(pattern, kind, *found) if found else None


@functools.cache
def _keep_probabilities(split: str) -> dict[tuple[str, str], float]:
    """The probability with which a (kind, answer) is kept, so that the answers of a kind become equally frequent."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for seed in range(_BALANCE_SCENES):
        rng, scene = random.Random(f"balance {seed}"), sample_scene(split, seed)
        for pattern, kinds in _KINDS.items():
            for kind in kinds:
                if question := _ask(scene, rng, pattern, kind):
                    counts[kind][question.answer] += 1
    return {(kind, a): min(c.values()) / n for kind, c in counts.items() for a, n in c.items()}


def ask(
    scene: Scene,
    rng: random.Random,
    patterns: Sequence[str] = PATTERNS,
    kinds: Sequence[str] = KINDS,
    held_out_only: bool = False,
) -> Question | None:
    """Draw one balanced question about a scene.

    Args:
        scene: The scene.
        rng: The source of every random choice.
        patterns: The patterns among which one is drawn first, uniformly.
        kinds: The kinds of wording that are allowed.
        held_out_only: Only ask about objects of a held-out colour-shape pair, or about the scene as a whole.

    Returns:
        `Question` or `None`: None where no question fits the scene.
    """
    keep = _keep_probabilities("varied" if scene.is_varied else "train")
    for pattern in rng.sample(patterns, len(patterns)):
        possible = [kind for kind in _KINDS[pattern] if kind in kinds]
        for kind in rng.sample(possible, len(possible)):
            question = _ask(scene, rng, pattern, kind)
            if question is None or rng.random() >= keep[kind, question.answer]:
                continue
            if not held_out_only or question.subject is None or question.subject.pair in HELD_OUT_PAIRS:
                return question
    return None


def sample_question(
    split: str, seed: int, patterns: Sequence[str] = PATTERNS, kinds: Sequence[str] = KINDS
) -> tuple[Scene, Question]:
    """Scene and question number `seed` of a split. Patterns are equally frequent."""
    rng = random.Random(f"question {split} {seed}")
    pattern = rng.choice(patterns)
    while True:
        scene = sample_scene(split, rng.getrandbits(48))
        if question := ask(scene, rng, (pattern,), kinds, held_out_only=split == "composition"):
            return scene, question
