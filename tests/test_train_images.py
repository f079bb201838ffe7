"""A data set without its images stops a run before it begins, and skipping samples has a limit."""

import shutil

import pytest
from train_fixtures import COLOURS, command, write_colours

from sdllava.data import image_files
from sdllava.data.image_files import check_image_files
from sdllava.data.sources import DataSource, load_data
from sdllava.processors import SDLlavaProcessor
from sdllava.train import collator as collating
from sdllava.train.arguments import DataArguments
from sdllava.train.collator import SDLlavaCollator
from sdllava.train.run import cache, train


@pytest.fixture
def colours(tmp_path):
    """A source of ten images, and one of ten whose first image is missing."""
    sources = [DataSource(str(write_colours(tmp_path / name))) for name in ("whole", "partial")]
    (tmp_path / "partial" / "images" / "0.png").unlink()
    return sources


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_that_lacks_images_raises(colours, streaming):
    data = load_data(colours, streaming=streaming)
    check_image_files(data, colours, 0.1)
    with pytest.raises(
        FileNotFoundError, match=r"1 of 10 sampled images of '.*partial/colours\.json' are not in"
    ) as error:
        check_image_files(data, colours, 0.09)
    assert "'images/0.png'; allowed are 9%" in str(error.value)
    assert str(error.value).count("partial'") == 1  # the folder


def test_rows_are_sampled_per_source(colours, monkeypatch):
    monkeypatch.setattr(image_files, "SAMPLED_ROWS", 4)
    checked = []
    monkeypatch.setattr(image_files, "_exists", lambda path, folder: checked.append((folder[-5:], path)) or True)
    check_image_files(load_data(colours), colours, 0.0)
    assert [folder for folder, _ in checked] == ["whole"] * 4 + ["rtial"] * 4
    assert len(set(checked)) == 8


def test_images_inside_the_data_need_no_folder(tmp_path):
    import datasets

    rows = [{"images": [{"bytes": b"x", "path": None}], "messages": []}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    source = DataSource(str(tmp_path / "a.parquet"))
    check_image_files(load_data([source]), [source], 0.0)


@pytest.mark.parametrize("run", ["train", "cache"])
@pytest.mark.parametrize("bad_samples", ["skip", "fatal"])
def test_a_run_without_its_image_folder_raises_before_the_model_is_built(
    training_parts, tmp_path, monkeypatch, run, bad_samples
):
    monkeypatch.setattr("sdllava.train.run.build_model", None)
    data = tmp_path / "data" / "colours.json"
    data.parent.mkdir()
    shutil.copy(training_parts / "data" / "colours.json", data)
    arguments = command(training_parts, "unused", train_data=data, bad_samples=bad_samples)
    arguments[arguments.index("--output_dir") + 1] = str(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=rf"{len(COLOURS)} of {len(COLOURS)} sampled images .*'{data.parent}'"):
        train(arguments) if run == "train" else cache(arguments, str(tmp_path / "cache"), "latents", "float32", 2)
    assert not (tmp_path / "run").exists()


def test_skipping_has_a_limit(training_parts, monkeypatch):
    monkeypatch.setattr(collating, "AT_LEAST_SAMPLES", 10)
    good = {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}], "images": []}
    processor = SDLlavaProcessor.from_pretrained(training_parts / "trained")
    collator = SDLlavaCollator(processor, skip_bad_samples=True, max_bad_samples=0.2)
    collator([{"error": "is broken"}, good, good, {"error": "is broken"}])  # 2 of at least 10
    with pytest.raises(ValueError, match=r"3 of 6 samples were skipped .* more than 20\.00%\. List them"):
        collator([good, {"error": "is broken"}])
    collator.check_skipped(20, 100)
    with pytest.raises(ValueError, match="21 of 100 samples"):
        collator.check_skipped(21, 100)


def test_the_share_is_checked():
    with pytest.raises(ValueError, match=r"max_bad_samples is 5\. Use a share in 0\.\.1"):
        DataArguments(max_bad_samples=5)
    assert DataArguments().max_bad_samples == 0.01
