"""Fine-tuning on the training sets of others: composed images for SHAPES, added words, and one run of the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

from research.miniature import shapes_scenes
from research.miniature.shapes_scenes import (
    PLACES,
    answer,
    compose_images,
    explain,
    name_cell,
    read_cells,
)
from sdllava import register
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render

RED_SQUARE, BLUE_CIRCLE = ("red", "square"), ("blue", "circle")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("is a red shape left of a circle", True),
        ("is a circle left of a red shape", False),
        ("is a circle right of a square", True),
        ("is a red shape above a circle", False),
        ("is a green shape above below a red shape", False),
        ("is a circle below right of a square", False),
        ("is a circle right of below a square", False),
        ("is a red shape left of right of a square", True),
        ("is a red shape a square", True),
        ("is a red shape blue", False),
    ],
)
def test_relations_are_between_neighbouring_cells(question, expected):
    cells = [RED_SQUARE, BLUE_CIRCLE, None, None, None, None, ("green", "triangle"), None, None]
    assert answer(cells, question) is expected


@pytest.mark.parametrize(
    ("questions", "answers", "message"),
    [
        ("is a circle red\nis a square red\n", "true\n", "2 questions and 1 answers"),
        ("is a blue shape red\n", "true\n", "'is a blue shape red' is never true of cells of train.small"),
    ],
)
def test_images_cannot_be_composed(questions, answers, message, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_scenes, "_TRIES", 20)
    np.save(tmp_path / "train.small.input.npy", np.zeros((1, 30, 30, 3), np.uint8))
    (tmp_path / "train.large.query_str.txt").write_text(questions)
    (tmp_path / "train.large.output").write_text(answers)
    with pytest.raises(ValueError, match=message):
        list(compose_images(tmp_path))


def seen(marked: str) -> str:
    """The description of the nine cells below, without the names of cells that are not marked."""
    contents = ["red square", "blue circle", *["nothing"] * 4, "green triangle", *["nothing"] * 2]
    pairs = zip(contents, PLACES, strict=True)
    return " ".join(f"{content} {place}" if place == marked else content for content, place in pairs)


@pytest.mark.parametrize(
    ("question", "steps"),
    [
        (
            "is a red shape left of a circle",
            f"1 red 2 left 3 circle 3 circle {seen('a2')} 2 left a1 1 red red square a1 yes",
        ),
        (
            "is a green shape above below a red shape",
            f"1 green 2 above 3 below 4 red 4 red {seen('a1')} 3 below b1 2 above a1 1 green red square no",
        ),
        (
            "is a circle below right of a green shape",
            f"1 circle 2 below 3 right 4 green 4 green {seen('c1')} 3 right c2 2 below 1 circle no",
        ),
        ("is a circle blue", f"1 circle 2 blue 2 blue {seen('a2')} 1 circle blue circle a2 yes"),
    ],
)
def test_the_steps_to_an_answer(question, steps):
    cells = [RED_SQUARE, BLUE_CIRCLE, None, None, None, None, ("green", "triangle"), None, None]
    reply = explain(cells, question).split()
    assert " ".join(part for part in reply if not part.startswith("_")) == steps
    named = [part.lstrip("_") for part in reply if part.lstrip("_") in PLACES]
    last = reply.index("1", 1)
    found = [part.lstrip("_") for part in reply[last:] if part.lstrip("_") in PLACES]
    assert found == [*PLACES][: len(found)]
    assert reply[-2:] == ([found[-1], "yes"] if answer(cells, question) else ["_c3", "no"])
    assert named[: -len(found)] == [*PLACES] * (max(int(part) for part in reply if part.isdecimal()) - 1)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("how many circles", "'how many circles' is not a question of SHAPES"),
        ("is a circle", "'is a circle' is not a question of SHAPES"),
        ("is a circle left of", "'is a circle left of' is not a question of SHAPES"),
        ("is a purple shape left of a circle", "has a word that SHAPES does not have: 'purple'"),
    ],
)
def test_another_question_of_shapes(question, message):
    with pytest.raises(ValueError, match=message):
        answer([None] * 9, question)


def paint(shape: str, channel: int) -> np.ndarray:
    """A cell of SHAPES with a shape of eight pixels."""
    rows, columns = np.mgrid[-4.5:5.5, -4.5:5.5]
    inside = {
        "square": (abs(rows) < 4) & (abs(columns) < 4),
        "circle": rows**2 + columns**2 < 18,
        "triangle": (abs(columns) < (rows + 4) / 2 + 0.6) & (abs(rows) < 4),
    }[shape]
    cell = np.zeros((10, 10, 3), np.uint8)
    cell[inside, channel] = 255
    return cell


@pytest.mark.parametrize("shape", ["square", "circle", "triangle"])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_cells_are_named(shape, channel):
    assert name_cell(paint(shape, channel)) == (("blue", "green", "red")[channel], shape)


def test_composed_images_have_the_published_answers(tmp_path):
    cells = [paint(shape, channel) for shape in ("square", "circle", "triangle") for channel in range(3)]
    image = np.stack(cells).reshape(3, 3, 10, 10, 3).transpose(0, 2, 1, 3, 4).reshape(1, 30, 30, 3)
    empty = np.zeros_like(image)
    np.save(tmp_path / "train.small.input.npy", np.concatenate([image, empty]))
    assert [name_cell(cell) for cell in read_cells(image)[0]] == [name_cell(cell) for cell in cells]
    rows = [("is a circle above a square", "true"), ("is a red shape a circle", "false")] * 10
    (tmp_path / "train.large.query_str.txt").write_text("".join(f"{question}\n" for question, _ in rows))
    (tmp_path / "train.large.output").write_text("".join(f"{truth}\n" for _, truth in rows))
    composed = list(compose_images(tmp_path))
    assert [(question, truth) for _, question, truth in composed] == [(q, t == "true") for q, t in rows]
    for picture, question, truth in composed:
        pixels = np.asarray(picture)[None, ..., ::-1]
        assert answer([name_cell(cell) for cell in read_cells(pixels)[0]], question) == truth
    assert len({picture.tobytes() for picture, *_ in composed}) > 15


def test_composed_cells_are_mirrored_and_get_other_colours(tmp_path):
    image = np.zeros((1, 3, 10, 3, 10, 3), np.uint8)
    image[0, 1, :, 1] = np.roll(paint("circle", 0), 1, axis=1)
    np.save(tmp_path / "train.small.input.npy", image.reshape(1, 30, 30, 3))
    colours = ("blue", "green", "red")
    (tmp_path / "train.large.query_str.txt").write_text(
        "".join(f"is a {name} shape a circle\n" for name in colours * 4)
    )
    (tmp_path / "train.large.output").write_text("true\n" * 12)
    pictures = [np.asarray(picture)[None, ..., ::-1] for picture, *_ in compose_images(tmp_path)]
    cells = [cell for pixels in pictures for cell in read_cells(pixels)[0] if cell.any()]
    assert {name_cell(cell) for cell in cells} == {(name, "circle") for name in colours}
    drawn = image[0, 1, :, 1].max(-1)
    assert {cell.max(-1).tobytes() for cell in cells} == {drawn.tobytes(), drawn[:, ::-1].tobytes()}


def test_the_baseline_of_the_repository_answers_with_only_clip():
    register()
    pipe = pipeline("visual-question-answering", model=str(Path(shapes_scenes.__file__).parent / "only-clip"))
    assert (pipe.model.config.diffusion_config, pipe.model.config.fusion) == (None, "none")
    for seed in range(4):
        scene, question = sample_question("test", seed, ["viewpoint"])
        (found,) = pipe(image=render(scene), question=question.text)
        assert found["answer"] == question.answer


@pytest.fixture
def shapes(tmp_path):
    """A folder of SHAPES with black images."""
    np.save(tmp_path / "train.large.input.npy", np.zeros((12, 30, 30, 3), np.uint8))
    np.save(tmp_path / "test.input.npy", np.zeros((2, 30, 30, 3), np.uint8))
    for split, count in (("train.large", 12), ("test", 2)):
        (tmp_path / f"{split}.query_str.txt").write_text("is a triangle left of a circle\n" * count)
        (tmp_path / f"{split}.output").write_text("false\n" * count)
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
def test_a_model_learns_new_words_and_is_scored(shapes, monkeypatch):
    pytest.importorskip("trl")
    from research.miniature import third_party
    from sdllava import SDLlavaProcessor, mini_path

    monkeypatch.setitem(third_party.TASKS, "shapes", third_party.Task(1, every=1))
    out = shapes / "out"
    found = third_party.train_and_score(out, "shapes", mini_path(), shapes)
    assert found["scores"]["accuracy"] in (0, 50, 100)
    assert found["blind"]["scores"].keys() == found["scores"].keys()
    run = out / "shapes" / "sdllava-mini"
    tokenizer = SDLlavaProcessor.from_pretrained(run / "trained").tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("_a1 star", add_special_tokens=False)["input_ids"]) == [
        "_a1",
        "star",
    ]
    config = json.loads((run / "trained" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == len(tokenizer)
    other = shapes / "other" / "sdllava-mini"
    with pytest.raises(FileNotFoundError, match="has no config"):
        third_party.train_and_score(out, "shapes", other, shapes)
    other.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(mini_path() / name, other)
    with pytest.raises(ValueError, match="base is "):
        third_party.train_and_score(out, "shapes", other, shapes)


@pytest.mark.slow
@pytest.mark.usefixtures("few_resamples")
def test_a_model_with_subwords_is_trained_by_lora(shapes, monkeypatch):
    pytest.importorskip("trl")
    from research.miniature import third_party
    from sdllava import mini_path

    assert third_party.knows_only_words(mini_path())
    monkeypatch.setattr(third_party, "knows_only_words", lambda checkpoint: False)
    monkeypatch.setitem(third_party.TASKS, "shapes", third_party.Task(1, every=1))
    monkeypatch.setattr(third_party, "LORA_LIMIT", 1)
    found = third_party.train_and_score(shapes / "out", "shapes", mini_path(), shapes)
    assert found["scores"]["accuracy"] in (0, 100)
    run = shapes / "out" / "shapes" / "sdllava-mini"
    assert not (run / "base").exists()
    before, after = load_file(mini_path() / "model.safetensors"), load_file(run / "trained" / "model.safetensors")
    changed = {name for name, value in after.items() if not torch.equal(value.half(), before[name].half())}
    assert any(name.startswith("model.language_model.layers.0") for name in changed)
    assert any(name.startswith("model.multi_modal_projector") for name in changed)
    assert not any(name.startswith(("lm_head", "model.diffusion_tower", "model.vision_tower")) for name in changed)
