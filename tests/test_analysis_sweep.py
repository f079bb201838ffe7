"""Sweeps: equal to single readings, resumable, shared by processes; what is computed from them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sdllava.analysis.images import open_images
from sdllava.analysis.loading import Subject, load_subject
from sdllava.analysis.reading import read_features
from sdllava.analysis.similarity import MinibatchCKA, pair_similarity
from sdllava.analysis.sweep import (
    LiveFeatures,
    Places,
    Sweep,
    choose_places,
    cka,
    gather,
    image_path,
    similarity_grid,
    write_sweep,
)

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
def subject(published) -> Subject:
    return load_subject(str(published["sd2"]))


@pytest.fixture(scope="module")
def places(subject) -> Places:
    return choose_places(subject, True, TAPS, [10, 500], [0, 4])


def test_every_tap_of_a_sweep_equals_the_tap_taken_alone(subject, folder, places, tmp_path):
    images = open_images([str(folder)], question="a dog")
    assert write_sweep(subject, images, places, tmp_path / "sweep", batch_size=1) == 9
    sweep = Sweep(tmp_path / "sweep")
    joint = {feature.key: feature.values for feature in sweep.batch([3, 5])}
    assert list(joint) == places.keys
    for row, index in enumerate((3, 5)):
        latents = subject.latents([images[index].image])
        for tap, timestep, scale in places.keys:
            arguments = (latents, subject.prompts(["a dog"]), [tap], [timestep], [0, 4])
            alone = {f.guidance_scale: f.values for f in read_features(subject.tower, *arguments)}
            assert torch.equal(joint[tap, timestep, scale][row], alone[scale][0])


def test_an_interrupted_sweep_goes_on_and_another_one_is_refused(subject, folder, places, tmp_path):
    images = open_images([str(folder)], question="a dog")

    def stop(done, todo):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sweep(subject, images, places, tmp_path, batch_size=4, progress=stop)
    with pytest.raises(ValueError, match="lacks 5 of 9 images"):
        Sweep(tmp_path)
    first = image_path(tmp_path, 0).stat().st_mtime_ns
    assert write_sweep(subject, images, places, tmp_path, batch_size=4) == 5
    assert image_path(tmp_path, 0).stat().st_mtime_ns == first
    assert not list(tmp_path.glob("*.tmp"))
    assert write_sweep(subject, images, places, tmp_path) == 0
    other = Places(TAPS, [10], [0.0, 4.0])
    with pytest.raises(ValueError, match=r"another timesteps \(\[10, 500\] instead of \[10\]\)"):
        write_sweep(subject, images, other, tmp_path)
    with pytest.raises(ValueError, match="another source"):
        write_sweep(subject, open_images([str(folder)], question="a cat"), places, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no sweep"):
        Sweep(folder)


def test_processes_share_a_sweep(published, subject, folder, places, tmp_path):
    script = (
        "import sys; from sdllava.analysis.sweep import *; from sdllava.analysis.loading import load_subject\n"
        "from sdllava.analysis.images import open_images\n"
        "s = load_subject(sys.argv[1]); images = open_images([sys.argv[2]], question='a dog')\n"
        "places = choose_places(s, True, sys.argv[5].split(','), [10, 500], [0, 4])\n"
        "print(write_sweep(s, images, places, sys.argv[3], 4, int(sys.argv[4]), 2))\n"
    )
    arguments = [str(published["sd2"]), str(folder), str(tmp_path / "two")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments, str(process), ",".join(TAPS)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        )
        for process in range(2)
    ]  # fmt: skip
    assert [int(process.communicate()[0].split()[-1]) for process in running] == [5, 4]
    write_sweep(subject, open_images([str(folder)], question="a dog"), places, tmp_path / "one", batch_size=4)
    for i in range(9):
        one, two = (load_file(image_path(tmp_path / name, i)) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


def test_similarity_and_cka_from_disk_equal_those_computed_at_once(subject, folder, places, tmp_path):
    images = open_images([str(folder / f"{i}.png") for i in range(8)], question="a dog")
    write_sweep(subject, images, places, tmp_path, batch_size=8)
    sources = (LiveFeatures(subject, images, places), Sweep(tmp_path))
    whole = gather(sources[0], batch_size=3)
    assert [feature.key for feature in whole] == places.keys
    assert len(whole[0].values) == 8
    for feature, stored in zip(whole, gather(sources[1], batch_size=8)):
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


def test_odd_images_and_too_few_are_refused(subject, folder, places):
    source = LiveFeatures(subject, open_images([str(folder)]), places)
    with pytest.raises(ValueError, match="even number of images"):
        similarity_grid(source)
    with pytest.raises(ValueError, match="at least 4 images, not 1"):
        cka(LiveFeatures(subject, open_images([str(folder / "0.png")]), places))


@pytest.fixture
def data(tmp_path):
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "Noise."}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "a", "image": "3.png", "conversations": turns}]))
    return path


def test_a_datasets_sweep_with_another_prompt_is_refused(subject, folder, places, data, tmp_path):
    def opened(prompt):
        return open_images([str(data)], prompt=prompt, image_folder=str(folder))

    assert write_sweep(subject, opened("question"), places, tmp_path / "sweep") == 1
    assert write_sweep(subject, opened("question"), places, tmp_path / "sweep") == 0
    with pytest.raises(ValueError, match="another source"):
        write_sweep(subject, opened("caption"), places, tmp_path / "sweep")


def test_images_of_a_dataset_bring_their_own_question(folder, data, tmp_path):
    for prompt, expected in (("question", "What is this?"), ("caption", "Noise."), ("none", None)):
        images = open_images([str(data)], prompt=prompt, image_folder=str(folder))
        assert len(images) == 1
        assert images[0].question == expected
        assert images[0].image.size == (30, 29)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no images"):
        open_images([str(tmp_path / "empty")])
    with pytest.raises(FileNotFoundError, match="there is no image"):
        open_images([str(folder / "missing.png")])
