"""The checkpoint in the package: its answers, its size, and the warning about photographs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from sdllava import SDLlavaDiffusionModel, mini_path
from sdllava.commands.main import app
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render

STORED = json.loads((Path(__file__).parent / "data" / "miniature_answers.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pipe():
    from transformers import pipeline

    return pipeline("visual-question-answering", model=str(mini_path()))


@pytest.mark.parametrize("rows", [slice(6), pytest.param(slice(6, 20), marks=pytest.mark.slow)])
def test_stored_scenes_have_their_stored_answers(rows, pipe):
    assert len(STORED) == 20
    for stored in STORED[rows]:
        scene, question = sample_question("test", stored["seed"])
        assert question.text == stored["question"]
        (answer,) = pipe(image=render(scene), question=question.text, max_new_tokens=8)
        assert answer["answer"] == stored["answer"], stored


def test_it_is_small_and_loaded_as_float32(pipe):
    assert sum(file.stat().st_size for file in mini_path().rglob("*")) < 40e6
    assert pipe.model.dtype.is_floating_point
    assert str(pipe.model.dtype) == "torch.float32"


def test_in_bfloat16_its_diffusion_features_stay_within_a_hundredth(pipe):
    scene, question = sample_question("test", 0)
    pixels = pipe.processor(images=[render(scene)], return_tensors="pt")["diffusion_pixel_values"]
    ids = pipe.processor.tokenize_questions([question.text], return_tensors="pt")["diffusion_input_ids"]
    tower = SDLlavaDiffusionModel.from_pretrained(mini_path(), dtype=torch.bfloat16)
    with torch.no_grad():
        exact = pipe.model.model.diffusion_tower(pixels, ids).last_hidden_state
        rounded = tower(pixels, ids).last_hidden_state.float()
    assert 0 < (rounded - exact).norm() / exact.norm() < 1e-2


@pytest.mark.parametrize("photograph", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_command_warns_only_about_photographs(photograph, tmp_path):
    picture = render(sample_question("test", 0)[0])
    if photograph:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    result = CliRunner().invoke(app, ["ask", str(tmp_path / "picture.png"), "How many objects are there?"])
    assert result.exit_code == 0
    assert result.stdout.strip()
    assert ("the miniature only supports rendered scenes" in result.stderr) == photograph
