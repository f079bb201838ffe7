"""`sdllava inspect`: pictures that agree with the numbers, and numbers for notebooks."""

import functools
import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from sdllava.analysis.attention import HeatMap, map_onto_image, question_attention
from sdllava.analysis.loading import load_analysis_model
from sdllava.analysis.numbers import save_numbers
from sdllava.analysis.plots import draw_heatmap
from sdllava.commands.inspect import app
from sdllava.run_records import is_lock


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(generator.integers(255, size=(40 + 8 * i, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(autouse=True, scope="module")
def load_once():
    """Each model is loaded once for all commands of this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sdllava.analysis.loading.load_analysis_model", functools.cache(load_analysis_model))
        yield


def run(*arguments, fails: bool = False):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if not fails and result.exception is not None:
        raise result.exception
    return result


def picture_size(path) -> tuple[int, int]:
    with Image.open(path) as opened:
        assert len(set(opened.convert("RGB").resize((64, 64)).getdata())) > 100
        return opened.size


def test_attention_writes_a_picture_and_its_numbers(composed, images, tmp_path):
    options = ("--model", composed, "--timesteps", "50,500")
    outputs = ("-o", tmp_path / "a.png", "-o", tmp_path / "a.npz", "-o", tmp_path / "a.json")
    run("attention", images / "0.png", "red?", *options, *outputs)
    picture_size(tmp_path / "a.png")
    numbers = np.load(tmp_path / "a.npz")
    meta = json.loads(str(numbers["meta"]))
    model = load_analysis_model(str(composed))
    expected = question_attention(model.tower, model.processor, images / "0.png", "red?", timesteps=[500])
    np.testing.assert_allclose(numbers["t = 500"], expected.maps, atol=1e-6)
    assert [word["text"] for word in meta["words"]][:4] == ["<begin>", "red", "?", "<end>"]
    np.testing.assert_allclose(json.loads((tmp_path / "a.json").read_text())["t = 500"], expected.maps, atol=1e-6)


def test_attention_by_layer(published, images, tmp_path):
    layers = ("--layers", "U-L1-R0-B0,U-L1-R1-B0")
    output = ("-o", tmp_path / "a.svg", "-o", tmp_path / "a.npz")
    run("attention", images / "0.png", "red", "--model", published["sd2"], *layers, *output)
    assert set(np.load(tmp_path / "a.npz")) == {"meta", "U-L1-R0-B0", "U-L1-R1-B0"}
    assert "<svg" in (tmp_path / "a.svg").read_text()[:600]
    first = (tmp_path / "a.svg").read_bytes()
    run("attention", images / "0.png", "red", "--model", published["sd2"], *layers, *output)
    assert (tmp_path / "a.svg").read_bytes() == first


def test_features_delta_similarity_and_cka(published, images, tmp_path):
    model = ("--model", published["sd2"], "--taps", "D-L0-R0-B0-Out,U-L2-R1-B0-Cross-Q")
    result = run("features", images, *model, "--question", "red", "-o", tmp_path / "f.png", "-o", tmp_path / "f.npz")
    assert "registers per image" in result.stdout
    numbers = np.load(tmp_path / "f.npz")
    assert numbers["features|U-L2-R1-B0-Cross-Q|50|4"].shape == (4, 4, 4, 64)
    assert numbers["colours|D-L0-R0-B0-Out|50|0"].shape == (4, 8, 8, 3)
    registers = json.loads(str(numbers["meta"]))["registers"]
    assert len(registers) == 6
    assert registers[0]["tap"] == "D-L0-R0-B0-Out"

    run("delta", images / "1.png", "red", "blue", *model, "-o", tmp_path / "d.png", "-o", tmp_path / "d.npz")
    found = np.load(tmp_path / "d.npz")
    unconditional, conditional = (numbers[f"features|D-L0-R0-B0-Out|50|{s}"][1] for s in (0, 1))
    np.testing.assert_allclose(found["difference|D-L0-R0-B0-Out|50"][0], conditional - unconditional, atol=1e-4)

    references = ("--reference", published["clip"], "--reference", published["dinov2"])
    run("similarity", images, *model, *references, "-o", tmp_path / "s.png", "-o", tmp_path / "s.json")
    grid = json.loads((tmp_path / "s.json").read_text())
    assert np.shape(grid["positions"]) == (2, 1, 1)
    assert set(grid["references"]) == {"CLIP", "DINOv2"}

    outputs = ("-o", tmp_path / "c.png", "-o", tmp_path / "c.json")
    result = run("cka", images, *model, "--question", "red", "--guidance-scales", "0,4", *outputs)
    assert "Only 4 images: the estimate is noisy. Use at least 30." in result.stderr
    matrix = json.loads((tmp_path / "c.json").read_text())
    assert np.shape(matrix["matrix"]) == (4, 4)
    assert matrix["num_images"] == 4
    run("sweep", images, *model, "--question", "red", "--guidance-scales", "0,4", "-o", tmp_path / "sweep")
    run("cka", "--sweep", tmp_path / "sweep", "-o", tmp_path / "again.json")
    np.testing.assert_allclose(json.loads((tmp_path / "again.json").read_text())["matrix"], matrix["matrix"], atol=1e-4)
    for name in "fdsc":
        picture_size(tmp_path / f"{name}.png")


def test_a_process_of_several_computes_its_own_batches(published, images, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    run("sweep", images, "--model", published["sd2"], "--taps", "D-L0-R0-Res-Out", "--batch-size", "2", "-o", tmp_path)
    written = {path.name for path in tmp_path.iterdir() if not is_lock(path)}
    assert written == {"000002.safetensors", "000003.safetensors", "sweep.json"}


def test_pairs_of_a_folder_are_in_natural_order(published, tmp_path):
    """Images 1 and 2 are equal, as are 10 and 11. In the order of the text, 1 and 10 would form a pair."""
    (tmp_path / "pairs").mkdir()
    generator = np.random.default_rng(0)
    for names in (("1.png", "2.png"), ("10.png", "11.png")):
        pixels = generator.integers(255, size=(32, 32, 3), dtype=np.uint8)
        for name in names:
            Image.fromarray(pixels).save(tmp_path / "pairs" / name)
    model = ("--model", published["sd2"], "--taps", "D-L0-R0-Res-Out")
    run("similarity", tmp_path / "pairs", *model, "-o", tmp_path / "s.json")
    grid = json.loads((tmp_path / "s.json").read_text())
    assert grid["num_pairs"] == 2
    np.testing.assert_allclose(grid["positions"], [[[1]]], atol=1e-6)


def test_a_drawn_map_is_bright_where_its_numbers_are(tmp_path):
    image = Image.new("RGB", (80, 40), "gray")
    grid = np.zeros((8, 8), np.float32)
    grid[3, 6] = 1  # of the padded square: x 60..70, y 30..40, which is y 10..20 of the image
    heat = HeatMap(map_onto_image(grid, image.size), grid, image, "a word", "share of attention", "a place")
    draw_heatmap(heat, tmp_path / "heat.png")
    with Image.open(tmp_path / "heat.png") as opened:
        pixels = np.asarray(opened.convert("RGB")).astype(int)
    pixels = pixels[:, : pixels.shape[1] * 91 // 100]  # right of it is the colour bar
    yellowness = pixels[..., 0] - pixels[..., 2]
    row, column = (places.mean() for places in np.nonzero(yellowness > 0.9 * yellowness.max()))
    purple = np.argwhere(pixels[..., 2] > pixels[..., 1] + 20)
    (top, left), (bottom, right) = purple.min(axis=0), purple.max(axis=0)
    assert ((row - top) / (bottom - top), (column - left) / (right - left)) == pytest.approx(
        (15 / 40, 65 / 80), abs=0.03
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["attention", "0.png", "red", "-o", "x.bmp"],
            "'x.bmp' has an unknown suffix. Use one of .png, .svg, .npz, .json",
        ),
        (["attention", "no.png", "red", "-o", "x.png"], "'no.png' is not an existing file"),
        (["attention", "0.png", " ", "-o", "x.png"], "Question ' ' is empty"),
        (["attention", "0.png", "red", "-o", "x.png", "--layers", ","], "separated by commas or 'all'"),
        (
            ["features", "0.png", "-o", "x.png", "--taps", "U-L9-R0-B0-Out"],
            "There is no tap 'U-L9-R0-B0-Out' in this denoiser",
        ),
        (["features", "0.png", "-o", "x.png", "--timesteps", "5o"], "numbers separated by commas"),
        (["similarity", "0.png", "1.png", "-o", "x.png", "--timesteps", "50,50"], "--timesteps has 50 more than once"),
        (["features", "0.png", "-o", "x.png", "--fit-per", "head"], "takes tap, timestep and guidance_scale"),
        (["similarity", "-o", "x.png"], "Give images, or --sweep"),
        (["similarity", "0.png", "-o", "x.png"], "Give an even number of images"),
        (["cka", "0.png", "-o", "x.png"], "at least 4 images"),
        (["cka", "0.png", "-o", "x.png", "--prompt", "poem"], "question, caption or none"),
    ],
)
def test_bad_input_raises_an_error_with_a_message(published, images, arguments, message, monkeypatch):
    monkeypatch.chdir(images)
    result = run(*arguments, "--model", published["sd2"], fails=True)
    assert isinstance(result.exception, ValueError | OSError)
    assert message in str(result.exception)
    assert not (images / "x.png").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--model", "mini"),
        ("--question", "red"),
        ("--taps", "all"),
        ("--timesteps", "50"),
        ("--guidance-scales", "0"),
        ("--prompt", "none"),
        ("--image-folder", "images"),
        ("--device", "cpu"),
    ],
)
@pytest.mark.parametrize("command", ["similarity", "cka"])
def test_options_without_effect_on_a_sweep_raise(command, option, value, tmp_path):
    result = run(command, "--sweep", tmp_path, option, value, "-o", tmp_path / "x.json", fails=True)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception).startswith(f"{option} {value!r} does not change the features of --sweep. Remove it")


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    save_numbers(tmp_path / "n.json", {"x": np.array([[1.0, np.nan]])}, {"model": "m"})
    assert json.loads((tmp_path / "n.json").read_text()) == {"model": "m", "x": [[1.0, None]]}
    with pytest.raises(ValueError, match=r"Numbers cannot be written to 'n\.txt'\. Use a \.npz or \.json file\."):
        save_numbers(tmp_path / "n.txt", {}, {})
