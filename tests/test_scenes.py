"""The world of scenes. An independent reader checks captions, questions and answers against the scenes' records."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from sdllava.scenes.dataset import scene_dataset, write_examples
from sdllava.scenes.language import KINDS, ask, caption, sample_question
from sdllava.scenes.minimal_pairs import minimal_pair
from sdllava.scenes.render import looks_rendered, render, render_array
from sdllava.scenes.world import (
    FURTHER_COLOURS,
    FURTHER_SHAPES,
    HELD_OUT_PAIRS,
    PATTERNS,
    SPLITS,
    Scene,
    sample_scene,
)

RENDERED = "f0a9e5f3ee1918dcb9f6c346fd26f8b74e6a33853566063e5fdf5f9c2b889be6"
ANSWER_SETS = {
    "orientation": ({"up", "down", "left", "right"}, {"yes", "no"}),
    "presence": ({"yes", "no"},),
    "state": ({"whole", "broken"}, {"yes", "no"}),
    "count": ({"0", "1", "2", "3", "4"},),
    "position": ({"top left", "top right", "bottom left", "bottom right"}, {"left", "right"}, {"above", "below"}),
    "colour": ({"red", "green", "blue", "yellow", "purple"},),
    "structure": ({"circle", "square", "star", "triangle", "arrow"},),
    "text": ({"o", "v", "x", "z"},),
    "viewpoint": ({"above", "front", "below"},),
}
FURTHER_ANSWERS = {"colour": set(FURTHER_COLOURS), "structure": set(FURTHER_SHAPES)}


def find(record: dict, phrase: str) -> dict:
    """The one object that "red star", "red object" or "star" means."""
    found = [o for o in record["objects"] if set(phrase.split()) - {"object"} <= {o["colour"], o["shape"]}]
    assert len(found) == 1, phrase
    return found[0]


def read_answer(record: dict, question: str) -> str:
    """Answer a question from the scene's record, by the words of the question."""
    shapes = [o["shape"] for o in record["objects"]]
    at = {o["cell"]: o for o in record["objects"]}
    readers = {
        r"Which way does the (.+) point\?": lambda p: find(record, p)["direction"],
        r"Does the (.+) point (\w+)\?": lambda p, d: find(record, p)["direction"] == d,
        r"Does the (.+) have a border\?": lambda p: find(record, p)["border"],
        r"Is there an? (\w+)\?": lambda s: s in shapes,
        r"Is there an? (\w+) (\w+)\?": lambda c, s: any((o["colour"], o["shape"]) == (c, s) for o in record["objects"]),
        r"Is the (.+) whole or broken\?": lambda p: find(record, p)["state"],
        r"Is the (\w+ \w+) broken\?": lambda p: find(record, p)["state"] == "broken",
        r"How many objects are there\?": lambda: str(len(shapes)),
        r"How many (?!objects)(\w+?)(?:(?<=s)e)?s are there\?": lambda s: str(shapes.count(s)),
        r"Where is the (.+)\?": lambda p: find(record, p)["cell"],
        r"Is the (.+) (?:left or right|right or left) of the (.+)\?": lambda p, q: (
            "left" if "left" in find(record, p)["cell"] and "right" in find(record, q)["cell"] else "right"
        ),
        r"Is the (.+) (?:above or below|below or above) the (.+)\?": lambda p, q: (
            "above" if "top" in find(record, p)["cell"] and "bottom" in find(record, q)["cell"] else "below"
        ),
        r"What colour is the (\w+)\?": lambda s: find(record, s)["colour"],
        r"What colour is the object at the (.+)\?": lambda cell: at[cell]["colour"],
        r"What shape is the (\w+) object\?": lambda c: find(record, c)["shape"],
        r"What shape is the object at the (.+)\?": lambda cell: at[cell]["shape"],
        r"Is the (\w+) object an? (\w+) or an? (\w+)\?": lambda c, s, t: {s: s, t: t}[find(record, c)["shape"]],
        r"Which letter is on the (.+)\?": lambda p: find(record, p)["letter"],
        r"From where is the scene seen\?": lambda: record["viewpoint"],
    }
    fitting = [(read, match) for form, read in readers.items() if (match := re.fullmatch(form, question))]
    assert len(fitting) == 1, question
    answer = fitting[0][0](*fitting[0][1].groups())
    return answer if isinstance(answer, str) else "yes" if answer else "no"


def read_caption(text: str) -> tuple[str, list[dict]]:
    """The viewpoint and the objects that a caption describes."""
    *parts, seen = text.split(", ")
    objects = []
    form = (
        r"an? (broken )?(\w+) (\w+)(?: pointing (\w+))?( with a border)?(?: marked (\w))? "
        r"at the ((?:top|bottom) (?:left|right))"
    )
    for part in parts:
        broken, colour, shape, direction, border, letter, cell = re.fullmatch(form, part).groups()
        state = "broken" if broken else "whole"
        read = {"colour": colour, "shape": shape, "direction": direction or "", "cell": cell}
        objects.append(read | {"border": bool(border), "state": state, "letter": letter or ""})
    return re.fullmatch(r"seen from (?:the )?(\w+)", seen)[1], objects


@pytest.mark.parametrize("count", [150, pytest.param(800, marks=pytest.mark.slow)])
@pytest.mark.parametrize("split", SPLITS)
def test_captions_and_answers_agree_with_the_record(split, count):
    kinds = set()
    for seed in range(count):
        scene, rng = sample_scene(split, seed), random.Random(seed)
        record = scene.record()
        assert Scene.from_record(record) == scene
        assert read_caption(caption(scene)) == (
            record["viewpoint"],
            [{key: value for key, value in o.items() if key != "offset"} for o in record["objects"]],
        )
        assert len({o["colour"] for o in record["objects"]}) == len({o["cell"] for o in record["objects"]})
        for pattern in PATTERNS:
            if question := ask(scene, rng, (pattern,)):
                kinds.add(question.kind)
                assert question.answer == read_answer(record, question.text)
                further = FURTHER_ANSWERS.get(pattern, set()) if split == "varied" else set()
                assert any(question.answer in answers | further for answers in ANSWER_SETS[pattern])
    assert kinds == set(KINDS)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_minimal_pair_differs_only_in_its_pattern(pattern):
    field = {
        "orientation": "direction",
        "presence": "border",
        "position": "cell",
        "structure": "shape",
        "text": "letter",
    }.get(pattern, pattern)
    for seed in range(12):
        for split in ("train", "test", "varied"):
            pair = minimal_pair(pattern, split, seed)
            first, second = (scene.record() for scene in pair.scenes)
            assert [scene.split for scene in pair.scenes] == [split, split]
            assert pair.answers == (read_answer(first, pair.question), read_answer(second, pair.question))
            assert pair.answers[0] != pair.answers[1]
            if pattern == "viewpoint":
                assert first["objects"] == second["objects"]
                continue
            assert first["viewpoint"] == second["viewpoint"]
            if pattern == "count":
                fewer, more = sorted((first["objects"], second["objects"]), key=len)
                assert more[:-1] == fewer
                continue
            changes = [
                {key for key in one if one[key] != other[key]}
                for one, other in zip(first["objects"], second["objects"], strict=True)
            ]
            assert set.union(*changes) == {field}
            assert sum(map(bool, changes)) <= (2 if pattern == "position" else 1)


def content(scene: Scene) -> str:
    objects = [{key: value for key, value in o.items() if key != "offset"} for o in scene.record()["objects"]]
    return repr((scene.viewpoint, sorted(objects, key=lambda o: o["cell"])))


@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_splits_do_not_overlap_and_held_out_pairs_are_not_in_the_training_split(count):
    scenes = {split: [sample_scene(split, seed) for seed in range(count)] for split in SPLITS}
    contents = {split: {content(scene) for scene in found} for split, found in scenes.items()}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or contents[one].isdisjoint(contents[other])
    for split, found in scenes.items():
        held_out = [any(o.pair in HELD_OUT_PAIRS for o in scene.objects) for scene in found]
        assert all(held_out) if split == "composition" else not any(held_out)
    said = [sample_question("train", seed)[1].text for seed in range(count)] + [caption(s) for s in scenes["train"]]
    assert not any(f"{colour} {shape}" in text for text in said for colour, shape in HELD_OUT_PAIRS)


def test_rendering_is_repeatable_to_the_byte():
    scenes = [sample_scene("test", seed) for seed in range(200)]
    pixels = np.stack([render_array(scene) for scene in scenes])
    assert pixels.shape == (200, 64, 64, 3)
    assert pixels.dtype == np.uint8
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == RENDERED
    assert np.array_equal(np.asarray(render(scenes[7])), pixels[7])


def test_every_difference_between_scenes_is_visible():
    for pattern in PATTERNS:
        for seed in range(10):
            one, other = (render_array(scene).astype(int) for scene in minimal_pair(pattern, "train", seed).scenes)
            assert (np.abs(one - other).max(axis=-1) > 60).sum() >= 12, pattern


@pytest.mark.parametrize("count", [300, pytest.param(1500, marks=pytest.mark.slow)])
def test_guessing_from_the_question_is_near_chance(count):
    seen = defaultdict(Counter)
    for seed in range(3 * count):
        _, question = sample_question("train", seed)
        seen[question.text][question.answer] += 1
        seen[question.kind][question.answer] += 1
    guesses = {text: answers.most_common(1)[0][0] for text, answers in seen.items()}
    by_kind, sizes = defaultdict(list), defaultdict(set)
    for seed in range(count):
        _, question = sample_question("test", seed)
        by_kind[question.kind].append(guesses.get(question.text, guesses[question.kind]) == question.answer)
        sizes[question.kind].add(question.answer)
    # A held-out pair takes one colour from a shape and one shape from a colour; the last kind names two shapes.
    known = {"colour of": 1 / 4, "shape of": 1 / 4, "which shape": 1 / 2}
    for kind, right in by_kind.items():
        chance = known.get(kind, 1 / len(sizes[kind]))
        tolerance = 3.5 * (chance * (1 - chance) / len(right)) ** 0.5 + 0.02
        assert abs(np.mean(right) - chance) < tolerance, (kind, np.mean(right), chance)


def test_the_dataset_is_in_trls_format():
    rows = scene_dataset("test", 5, turns=3)
    assert {"images", "messages", "pattern", "scene"} == set(rows.column_names)
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert 2 <= len(roles) <= 6
        assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
        assert row["images"][0].size == (64, 64)
    captions = scene_dataset("train", 2, task="captions")
    assert captions[0]["messages"][0]["content"] == [{"type": "image"}]
    pairs = scene_dataset("validation", 9, task="pairs")
    assert pairs["pattern"][::2] == list(PATTERNS)
    assert pairs["pair"][:4] == [0, 0, 1, 1]
    assert scene_dataset("test", 5, turns=3)["scene"] == rows["scene"]
    assert scene_dataset("test", 5, seed=1, turns=3)["scene"] != rows["scene"]
    patterns = ("state", "count", "count")
    assert set(scene_dataset("train", 20, patterns=patterns)["pattern"]) == {"state", "count"}
    twice = [sample_question("train", seed, patterns)[1].pattern for seed in range(300)]
    assert twice.count("count") / 300 == pytest.approx(2 / 3, abs=0.08)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"split": "dev"}, "Split 'dev' is unknown. Use one of train, validation, test, composition, varied."),
        ({"task": "answers"}, "Task 'answers' is unknown. Use one of questions, captions, descriptions, pairs."),
        ({"count": 0}, "Count 0 with 1 turns gives no rows. Use positive numbers."),
        ({"turns": -1}, "Count 1 with -1 turns gives no rows. Use positive numbers."),
    ],
)
def test_unusable_arguments_raise_with_the_allowed_ones(arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        scene_dataset(**({"split": "test", "count": 1} | arguments))


def test_an_unknown_pattern_raises_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Pattern 'size' is unknown\. Use one of orientation, "):
        minimal_pair("size", "test", 0)


def test_the_page_of_examples_holds_every_pattern(tmp_path):
    write_examples(tmp_path / "scenes.html", pairs_per_pattern=1)
    page = (tmp_path / "scenes.html").read_text(encoding="utf-8")
    assert page.count("<img") == 2 * len(PATTERNS)
    assert all(f"<h2>{pattern}</h2>" in page for pattern in PATTERNS)
    assert minimal_pair("text", "train", 0).question in page


def test_scenes_are_distinguished_from_photographs_at_any_size():
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    others = [Image.fromarray(noise), Image.new("RGB", (64, 64), (127, 127, 127)), Image.new("L", (8, 8), 255)]
    assert not any(looks_rendered(image) for image in others)
    for seed in range(25):
        picture = render(sample_scene("test", seed))
        compressed = BytesIO()
        picture.resize((256, 256)).save(compressed, "JPEG", quality=60)
        assert looks_rendered(picture)
        assert looks_rendered(Image.open(compressed))
