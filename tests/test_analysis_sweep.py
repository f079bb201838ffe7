"""Sweeps equal single readings, resume byte by byte, and are shared by processes; similarity and CKA over them."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sdllava.analysis.images import open_images
from sdllava.analysis.loading import AnalysisModel, load_analysis_model
from sdllava.analysis.reading import read_features
from sdllava.analysis.similarity import MinibatchCKA, cka, pair_similarity, similarity_grid
from sdllava.analysis.sweep import (
    ComputedFeatures,
    FeatureSelection,
    Sweep,
    gather,
    image_path,
    select_features,
    write_sweep,
)
from sdllava.fingerprints import weights_hash
from sdllava.run_records import is_lock

TAPS = ["D-L2-R0-B0-Cross-Q", "U-L1-R1-B0-Out", "U-L1-R1-Res-Out"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for i in range(9):
        size = (20 + 3 * i, 30, 3)
        Image.fromarray(generator.integers(255, size=size, dtype=np.uint8)).save(path / f"{i}.png")
    (path / "notes.txt").write_text("no image")
    return path


@pytest.fixture(scope="module")
def model(published) -> AnalysisModel:
    return load_analysis_model(str(published["sd2"]))


@pytest.fixture(scope="module")
def selection(model) -> FeatureSelection:
    return select_features(model, True, TAPS, [10, 500], [0, 4])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"taps": [TAPS[1], TAPS[0], TAPS[1]]}, f"--taps has '{TAPS[1]}' more than once"),
        ({"taps": ["U-L1-R1-B0-Out", "up-level1-repeat1-vit-block0-out"]}, "--taps has 'U-L1-R1-B0-Out' more than"),
        ({"timesteps": [50, 50]}, "--timesteps has 50 more than once"),
        ({"guidance_scales": [4, 0, 4.0]}, r"--guidance-scales has 4\.0 more than once"),
    ],
)
def test_a_repeated_value_raises(model, chosen, message):
    """Both would be added into one cell of a grid of similarities."""
    with pytest.raises(ValueError, match=message):
        select_features(model, True, **chosen)


def sweep_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not is_lock(path)}


@pytest.fixture(scope="module")
def written(model, folder, selection, tmp_path_factory) -> Path:
    """An uninterrupted sweep over 9 images in batches of 4."""
    path = tmp_path_factory.mktemp("written")
    assert write_sweep(model, open_images([str(folder)], question="a dog"), selection, path, batch_size=4) == 9
    return path


def test_every_tap_of_a_sweep_equals_a_single_reading(model, folder, selection, tmp_path):
    images = open_images([str(folder)], question="a dog")
    assert write_sweep(model, images, selection, tmp_path / "sweep", batch_size=1) == 9
    sweep = Sweep(tmp_path / "sweep")
    joint = {feature.key: feature.values for feature in sweep.batch([3, 5])}
    assert list(joint) == selection.keys
    for row, index in enumerate((3, 5)):
        latents = model.latents([images[index].image])
        for tap, timestep, scale in selection.keys:
            arguments = (latents, model.prompts(["a dog"]), [tap], [timestep], [0, 4])
            single = {f.guidance_scale: f.values for f in read_features(model.tower, *arguments)}
            assert torch.equal(joint[tap, timestep, scale][row], single[scale][0])


def test_the_settings_and_the_images_of_a_sweep_are_recorded(model, written):
    settings = Sweep(written).settings
    assert settings["weights"] == weights_hash(model.tower.backbone)
    assert settings["threads"] == torch.get_num_threads()
    assert (settings["taps"], settings["num_images"], settings["batch_size"]) == (TAPS, 9, 4)
    with safe_open(image_path(written, 7), framework="pt") as file:
        assert file.metadata() == {"image": '{"name": "7.png", "question": "a dog"}'}  # entries have a random order


@pytest.mark.parametrize("lost", [[8], [1, 2], [0, 1, 2, 3, 5, 7]])
def test_a_resumed_sweep_equals_an_uninterrupted_one_byte_by_byte(model, folder, selection, written, lost, tmp_path):
    """Resuming computes the batches of the first run, since results depend on a batch's size by rounding errors."""
    resumed = shutil.copytree(written, tmp_path / "resumed")
    for index in lost:
        image_path(resumed, index).unlink()
    with pytest.raises(ValueError, match=f"lacks {len(lost)} of 9 images"):
        Sweep(resumed)
    kept = image_path(resumed, 4).stat().st_mtime_ns
    done = []
    images = open_images([str(folder)], question="a dog")
    assert write_sweep(model, images, selection, resumed, 4, progress=lambda *n: done.append(n)) == len(lost)
    assert done[-1] == (len(lost), len(lost))
    assert image_path(resumed, 4).stat().st_mtime_ns == kept
    assert sweep_files(resumed) == sweep_files(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": [10]}, r"timesteps is \[10, 500\] there and \[10\] here"),
        ({"question": "a cat"}, "source is '"),
        ({"batch_size": 8}, "batch_size is 4 there and 8 here"),
        ({"weights": 1.5}, "weights is '"),
    ],
)
def test_a_folder_with_another_sweep_raises_an_error(model, folder, selection, written, changes, message):
    images = open_images([str(folder)], question=changes.get("question", "a dog"))
    timesteps = changes.get("timesteps", selection.timesteps)
    selection = FeatureSelection(selection.taps, timesteps, selection.guidance_scales)
    weight = list(model.tower.backbone.vae.parameters())[-1]  # one value of a large part
    before, files = weight.data.clone(), sweep_files(written)
    weight.data.flatten()[-1] += changes.get("weights", 0)
    try:
        with pytest.raises(ValueError, match=f"was written with other settings: {message}"):
            write_sweep(model, images, selection, written, changes.get("batch_size", 4))
    finally:
        weight.data.copy_(before)
    assert sweep_files(written) == files


def test_a_sweep_over_exchanged_images_of_equal_size_raises_an_error(model, folder, selection, written, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    image = bytearray((other / "3.png").read_bytes())
    image[-20] ^= 1
    (other / "3.png").write_bytes(image)
    with pytest.raises(ValueError, match="was written with other settings: source is '"):
        write_sweep(model, open_images([str(other)], question="a dog"), selection, written, 4)


def test_processes_share_a_sweep(model, folder, selection, written, tmp_path):
    images = open_images([str(folder)], question="a dog")
    counts = [write_sweep(model, images, selection, tmp_path, 4, process, 2) for process in (1, 0)]
    assert counts == [4, 5]
    assert sweep_files(tmp_path) == sweep_files(written)
    with pytest.raises(ValueError, match=r"Process 2 of 2 does not exist. Use an index in 0\.\.1\."):
        write_sweep(model, images, selection, tmp_path, 4, 2, 2)


def test_a_sweep_resumes_with_the_number_of_threads_of_its_first_run(model, folder, selection, written, tmp_path):
    """Some convolutions of the VAE differ in their last bits between one and two threads."""
    resumed = shutil.copytree(written, tmp_path / "resumed")
    for path in resumed.glob("*.safetensors"):
        path.unlink()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert write_sweep(model, open_images([str(folder)], question="a dog"), selection, resumed, 4) == 9
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert sweep_files(resumed) == sweep_files(written)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not hold a sweep"),
        ("{", "is damaged"),
        ('{"taps": ["a"], "timesteps": [1]}', "is damaged"),
    ],
)
def test_a_folder_without_a_sweep_raises_an_error(text, message, tmp_path):
    if text is not None:
        (tmp_path / "sweep.json").write_text(text)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        Sweep(tmp_path)


def test_a_sweep_of_an_earlier_version_can_be_read(written, tmp_path):
    """Its record had a short hash of the weights and no batch size."""
    old = shutil.copytree(written, tmp_path / "old")
    settings = json.loads((old / "sweep.json").read_text())
    settings["weights"] = settings["weights"][:16]
    del settings["batch_size"]
    (old / "sweep.json").write_text(json.dumps(settings))
    for first, second in zip(Sweep(old).batch([0, 8]), Sweep(written).batch([0, 8]), strict=True):
        assert first.key == second.key
        assert torch.equal(first.values, second.values)


def test_similarity_and_cka_from_disk_equal_those_of_computed_features(model, folder, selection, tmp_path):
    images = open_images([str(folder / f"{i}.png") for i in range(8)], question="a dog")
    write_sweep(model, images, selection, tmp_path, batch_size=8)
    sources = (ComputedFeatures(model, images, selection), Sweep(tmp_path))
    whole = gather(sources[0], batch_size=3)
    assert [feature.key for feature in whole] == selection.keys
    assert len(whole[0].values) == 8
    for feature, stored in zip(whole, gather(sources[1], batch_size=8), strict=True):
        torch.testing.assert_close(feature.values, stored.values, rtol=1e-4, atol=1e-4)
    grids = [similarity_grid(source, batch_size=5) for source in sources]
    np.testing.assert_allclose(grids[0].positions, grids[1].positions, atol=1e-5)
    values = {f.key: f.values for f in Sweep(tmp_path).batch(range(8))}[TAPS[1], 500, 4.0]
    expected = pair_similarity(values[0::2], values[1::2])
    assert grids[1].positions[1, 1, 1] == pytest.approx(expected.positions.mean())
    assert grids[1].pooled[1, 1, 1] == pytest.approx(expected.pooled.mean())
    assert grids[1].num_pairs == 4

    found = [cka(source, batch_size=4) for source in sources]
    np.testing.assert_allclose(found[0].matrix, found[1].matrix, atol=1e-4)
    meter = MinibatchCKA(["a", "b"])
    for rows in (range(4), range(4, 8)):
        features = {f.key: f.values for f in Sweep(tmp_path).batch(rows)}
        meter.update({"a": features[TAPS[0], 10, 0.0], "b": features[TAPS[1], 10, 4.0]})
    keys = found[1].keys
    assert found[1].matrix[keys.index((TAPS[0], 10, 0.0)), keys.index((TAPS[1], 10, 4.0))] == pytest.approx(
        meter.matrix()[0, 1]
    )
    names, square = found[1].between_taps(10, 4.0)
    assert names == TAPS
    assert square.shape == (3, 3)
    scales, line = found[1].with_unconditional(TAPS[0], 500)
    assert scales == [0.0, 4.0]
    assert line[0] == pytest.approx(1)


def test_an_odd_number_of_images_and_too_few_raise_errors(model, folder, selection):
    source = ComputedFeatures(model, open_images([str(folder)]), selection)
    with pytest.raises(ValueError, match=r"9 images do not form pairs\. Give an even number of images"):
        similarity_grid(source)
    with pytest.raises(ValueError, match="at least 4 images, not 1"):
        cka(ComputedFeatures(model, open_images([str(folder / "0.png")]), selection))


@pytest.fixture
def data(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise."}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "a", "image": "3.png", "conversations": turns}]))
    return path


def test_a_sweep_over_a_dataset_with_another_prompt_raises_an_error(model, folder, selection, data, tmp_path):
    def opened(prompt):
        return open_images([str(data)], prompt=prompt, image_folder=str(folder))

    assert write_sweep(model, opened("question"), selection, tmp_path / "sweep") == 1
    assert write_sweep(model, opened("question"), selection, tmp_path / "sweep") == 0
    with pytest.raises(ValueError, match="other settings: source is"):
        write_sweep(model, opened("caption"), selection, tmp_path / "sweep")


@pytest.mark.parametrize("prompt", ["question", "caption", "none"])
def test_a_question_replaces_those_of_a_dataset(folder, data, prompt):
    own, given, other = (
        open_images([str(data)], question, prompt, image_folder=str(folder)) for question in (None, "red?", "blue?")
    )
    assert given[0].question == "red?"
    assert given.has_questions
    assert len({images.fingerprint() for images in (own, given, other)}) == 3
    recorded = repr((own.rows._fingerprint, prompt))  # by sweeps of earlier versions
    assert own.fingerprint() == hashlib.sha256(recorded.encode()).hexdigest()


def test_images_of_a_dataset_have_their_own_question(folder, data, tmp_path):
    for prompt, expected in (("question", "What is this?"), ("caption", "Noise."), ("none", None)):
        images = open_images([str(data)], prompt=prompt, image_folder=str(folder))
        assert len(images) == 1
        assert images[0].question == expected
        assert images[0].image.size == (30, 29)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has neither images .* nor a dataset"):
        open_images([str(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match=r"The image '.*missing\.png' does not exist"):
        open_images([str(folder / "missing.png")])
    with pytest.raises(FileNotFoundError, match=r"is neither an image file .* nor a folder of image files"):
        open_images([str(folder), str(data)])


def test_a_folder_is_read_with_its_subfolders_in_natural_order(tmp_path):
    names = ["1.png", "2.png", "10.png", "11.png", "01.png", "pair 2/b.png", "pair 10/a.PNG", "pair 10/deeper/c.png"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4 + i, 4)).save(tmp_path / name)
    images = open_images([str(tmp_path)])
    expected = ["01.png", "1.png", "2.png", "10.png", "11.png", "pair 2/b.png", "pair 10/a.PNG", "pair 10/deeper/c.png"]
    assert [image.name for image in images] == expected
    assert [image.image.width - 4 for image in images] == [names.index(name) for name in expected]
    nested = open_images([str(tmp_path / "pair 10"), str(tmp_path / "2.png")], question="red")
    assert [(image.name, image.question) for image in nested] == [
        ("a.PNG", "red"), ("deeper/c.png", "red"), ("2.png", "red")
    ]  # fmt: skip


def test_a_folder_with_data_files_and_images_only_in_subfolders_is_a_dataset(folder, data, tmp_path):
    root = tmp_path / "dataset"
    shutil.copytree(folder, root / "images")
    shutil.copy(data, root / "data.json")
    with pytest.raises(FileNotFoundError, match="is neither an image file"):
        open_images([str(root), str(folder)])
    assert len(open_images([str(root / "images")])) == 9


def test_a_transparent_image_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.save(tmp_path / "a.png")
    assert np.asarray(open_images([str(tmp_path)])[0].image).min() == 255
