"""What conditioning on the question gains: rewritten questions, larger scenes, the table, and one pair of runs."""

import re
from collections import Counter

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from research.miniature.crowded import crowded_example
from research.miniature.rewriting import rewrite
from sdllava.scenes.language import KINDS, sample_question
from sdllava.scenes.world import HELD_OUT_PAIRS


@pytest.mark.parametrize(
    ("question", "caption"),
    [
        ("What shape is the object at the top left?", "an object at the top left"),
        ("Which way does the green arrow point?", "a green arrow pointing"),
        ("Does the green arrow point up?", "a green arrow pointing up"),
        ("Does the red object have a border?", "a red object with a border"),
        ("Is the red star whole or broken?", "a broken red star"),
        ("Is the red object an arrow or a circle?", "a red object"),
        ("Is the red object below or above the blue star?", "a red object, a blue star"),
        ("Which letter is on the red star?", "a red star marked"),
        ("Is there an arrow?", "an arrow"),
        ("How many squares are there?", "squares"),
        ("From where is the scene seen?", "seen from"),
    ],
)
def test_a_question_is_rewritten_as_a_caption(question, caption):
    assert rewrite(question) == caption


def test_every_kind_of_question_can_be_rewritten():
    captions = {}
    for seed in range(600):
        question = sample_question("train", seed)[1]
        captions[question.kind] = rewrite(question.text)
    assert set(captions) == set(KINDS)
    assert all(captions.values())
    assert not any("?" in text for text in captions.values())


def test_crowded_scenes_have_five_to_nine_objects_and_balanced_answers():
    drawn = [crowded_example("train", seed) for seed in range(400)]
    counts = Counter()
    for image, caption, question, answer in drawn:
        pairs = re.findall(r"(\w+) (circle|square|star|triangle|arrow)", caption)
        counts[len(pairs)] += 1
        assert image.size == (96, 96)
        assert len(set(pairs)) == len(pairs)
        assert not HELD_OUT_PAIRS & set(pairs)
        about = re.search(r"(\w+) (circle|square|star|triangle|arrow)", question).groups()
        assert (about in pairs) == (answer != "no" or "there" not in question)
        described = next((part for part in caption.split(", ") if " ".join(about) in part), "")
        if "border" in question:
            assert answer == ("yes" if "with a border" in described else "no")
        if answer in ("up", "down", "left", "right"):
            assert f"pointing {answer}" in described
    assert set(counts) == {5, 6, 7, 8, 9}
    answers = Counter(answer for *_, answer in drawn)
    assert abs(answers["yes"] - answers["no"]) < 50
    first, again, other = (crowded_example(*key)[0] for key in (("train", 0), ("train", 0), ("test", 0)))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_page_has_paired_differences_and_a_verdict(tmp_path):
    pytest.importorskip("trl")
    from research.miniature.asking import compare
    from research.miniature.asking_page import verdict, write_page

    without, conditioned = [True, False, False, False], [True, True, False, True]
    row = compare([(without, conditioned), (without, without)]) | {"budget": {"train": 9, "finetune": 5, "test": 4}}
    assert (row["without"], row["with"], row["difference"]) == (25, 50, 25)
    assert row["by_seed"] == [50, 0]
    assert row["interval"][0] <= 25 <= row["interval"][1]
    row["interval"] = [1.0, 37.5]
    write_page(tmp_path, {"1 token": row}, ["1 token", "9 tokens"])
    page = (tmp_path / "asking.md").read_text()
    assert "\n| 1 token | 25.0 | 50.0 | +25.0 [1.0, 37.5] | +50.0, +0.0 | 9, 5, 4 |\n" in page
    assert "No condition was found under which it helps. A row counts" in page  # one of the seeds shows no difference
    assert '\nNot run: "9 tokens".\n' in page
    assert (tmp_path / "figures" / "asking.png").stat().st_size > 1000
    helps, hurts = row | {"by_seed": [50, 1]}, row | {"by_seed": [-1, -2], "interval": [-9, -1]}
    assert verdict({"a": helps, "b": hurts}).startswith('The question helps with "a"; it hurts with "b". ')


def test_an_unknown_variant(tmp_path):
    pytest.importorskip("trl")
    from research.miniature.__main__ import app

    result = CliRunner().invoke(app, ["asking", "--out", str(tmp_path), "--variant", "2 tokens"])
    assert result.exit_code == 1
    assert "Unknown variant '2 tokens'. Use one of '16 tokens'" in result.output


@pytest.mark.slow
def test_stored_features_are_those_of_the_model_and_runs_resume(tmp_path):
    pytest.importorskip("trl")
    from research.miniature.asking import VARIANTS, AskingBudget, AskingPart, answer_questions, build
    from research.miniature.asking_features import draw, examples
    from research.miniature.unpack import unpack

    unpack(tmp_path / "parts")
    budget = AskingBudget(train=4, test=3, align=1, finetune=1)
    found = {name: answer_questions(tmp_path, VARIANTS[name], True, 0, budget) for name in ("1 token", "16 tokens")}
    assert [len(right) for right in found.values()] == [3, 3]
    again = answer_questions(tmp_path, VARIANTS["1 token"], True, 0, budget)
    assert again == found["1 token"]
    with pytest.raises(ValueError, match="finetune is 1 there and 2 here"):
        answer_questions(tmp_path, VARIANTS["1 token"], True, 0, AskingBudget(train=4, test=3, align=1, finetune=2))

    data = examples(tmp_path, "scenes", "test", 3)
    model, processor = build(tmp_path / "parts", VARIANTS["1 token"].reader, (1.0,))
    images, _, questions, _ = zip(*(draw("scenes", "test", seed) for seed in range(3)), strict=True)
    part = AskingPart("finetune", model, processor, data, "question")
    stored = part.inputs(range(3))
    pixels = processor(images=list(images), return_tensors="pt")
    prompts = processor.tokenize_questions(list(questions), return_tensors="pt")
    with torch.no_grad():
        expected = model.get_image_features(**pixels, **prompts).pooler_output
        features = model.get_image_features(image_encodings=stored["image_encodings"]).pooler_output
    torch.testing.assert_close(torch.stack(features), torch.stack(expected), atol=2e-2, rtol=2e-2)
