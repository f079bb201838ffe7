"""`sdllava data`: addresses, unpacking, repairs and the check, on small sets in the published layout."""

import hashlib
import json
import shutil
import zipfile
from types import SimpleNamespace

import huggingface_hub
import pytest
from typer.testing import CliRunner

from sdllava.commands.main import app
from sdllava.data.published_sets import HUB, SETS, TEXT_ONLY, downloads, repair, unpack, verify

IMAGES = {
    "coco/train2017/1.jpg": "train2017.zip",
    "gqa/images/2.jpg": "gqa_images.zip",
    "ocr_vqa/images/3.jpg": "ocr_vqa_images_llava_v15.zip",
    "ocr_vqa/images/4.jpg": None,
    "textvqa/train_images/5.jpg": "train_val_images.zip",
    "vg/VG_100K/6.jpg": "vg_images.zip",
    "vg/VG_100K_2/7.jpg": "vg_images2.zip",
}


def write_archive(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"an image")


@pytest.fixture
def mixture(tmp_path):
    """Mix-665k with seven images and a text: one OCR-VQA image is a GIF file, another is missing."""
    samples = [{"id": name, "image": name, "conversations": []} for name in IMAGES]
    (tmp_path / "llava_v1_5_mix665k.json").write_text(json.dumps([*samples, {"id": "text", "conversations": []}]))
    folders = {source.name: source.unpacks_to for source in SETS["mix-665k"].sources}
    for image, archive in IMAGES.items():
        if archive is not None:
            inner = image.removeprefix(folders[image.split("/")[0]] + "/")
            write_archive(tmp_path / archive, inner.replace("3.jpg", "3.gif"))
    return tmp_path


def test_published_numbers_add_up():
    mixture = SETS["mix-665k"]
    assert sum(source.samples for source in mixture.sources) + mixture.text_only == mixture.samples == 665_298


def test_downloads_shrink_to_what_is_missing(tmp_path):
    assert [place.name for _, place, _ in downloads("llava-558k", tmp_path)] == [
        "blip_laion_cc_sbu_558k.json",
        "images.zip",
    ]
    write_archive(tmp_path / "images.zip", "00000/1.jpg")
    assert [place.name for _, place, _ in downloads("llava-558k", tmp_path)] == ["blip_laion_cc_sbu_558k.json"]
    assert unpack("llava-558k", tmp_path) == ["images.zip"]
    assert (tmp_path / "LLaVA-Pretrain" / "images" / "00000" / "1.jpg").read_bytes() == b"an image"
    (tmp_path / "images.zip").unlink()
    assert len(downloads("llava-558k", tmp_path)) == 1
    assert unpack("llava-558k", tmp_path) == []


def test_mixture_is_unpacked_repaired_and_checked_by_source(mixture):
    assert unpack("mix-665k", mixture) == [archive for archive in IMAGES.values() if archive]
    assert downloads("mix-665k", mixture) == []
    assert verify("mix-665k", mixture).missing == {"ocr_vqa": ["ocr_vqa/images/3.jpg", "ocr_vqa/images/4.jpg"]}
    assert repair("mix-665k", mixture) == {"ocr_vqa/images/3.gif": "ocr_vqa/images/3.jpg"}
    assert repair("mix-665k", mixture) == {}
    (mixture / "gqa" / "images" / "2.jpg").write_bytes(b"")
    found = verify("mix-665k", mixture)
    assert found.samples == {"coco": 1, "gqa": 1, "ocr_vqa": 2, "textvqa": 1, "vg": 2, TEXT_ONLY: 1}
    assert found.missing == {"ocr_vqa": ["ocr_vqa/images/4.jpg"]}
    assert found.empty == {"gqa": ["gqa/images/2.jpg"]}
    assert found.expected["coco"] == 364_100
    assert not found.complete


def test_images_are_compared_with_their_archives_also_after_a_repair(mixture):
    unpack("mix-665k", mixture)
    repair("mix-665k", mixture)
    (mixture / "vg" / "VG_100K" / "6.jpg").write_bytes(b"an im")
    (mixture / "ocr_vqa" / "images" / "3.jpg").write_bytes(b"AN IMAGE")
    assert verify("mix-665k", mixture).damaged == {"vg": ["vg/VG_100K/6.jpg"]}
    expected = {"vg": ["vg/VG_100K/6.jpg"], "ocr_vqa": ["ocr_vqa/images/3.jpg"]}
    assert verify("mix-665k", mixture, hashes=True).damaged == expected


def test_set_without_published_numbers_is_complete_with_all_images(tmp_path):
    folder = tmp_path / "LLaVA-Pretrain"
    (folder / "images" / "00000").mkdir(parents=True)
    (folder / "images" / "00000" / "1.jpg").write_bytes(b"an image")
    (folder / "blip_laion_cc_sbu_558k.json").write_text(json.dumps([{"image": "00000/1.jpg"}]))
    assert verify("llava-558k", tmp_path).complete


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no annotations at .*Download https"), ("{", "are not JSON"), ("{}", "are not a list of samples")],
)
def test_unusable_annotations(tmp_path, content, message):
    if content is not None:
        (tmp_path / "llava_v1_5_mix665k.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        verify("mix-665k", tmp_path)


def test_damaged_and_hostile_archives(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match=r"images\.zip' is damaged .* Download it again"):
        unpack("llava-558k", tmp_path)
    write_archive(tmp_path / "images.zip", "../../outside.jpg")
    with pytest.raises(ValueError, match=r"'\.\./\.\./outside\.jpg', which leaves its folder"):
        unpack("llava-558k", tmp_path)


def test_commands(mixture):
    run = CliRunner().invoke
    prepared = run(app, ["data", "prepare", "mix-665k", str(mixture)])
    assert prepared.exit_code == 0, prepared.output
    assert "1 images renamed" in prepared.output
    checked = run(app, ["data", "verify", "mix-665k", str(mixture)])
    assert checked.exit_code == 1
    assert "ocr_vqa: 2 samples (published: 80,000), 2 images, 1 missing, 0 empty, 0 not as" in checked.output
    assert "  ocr_vqa/images/4.jpg" in checked.output
    empty = run(app, ["data", "prepare", "llava-558k", str(mixture / "other")])
    assert empty.exit_code == 1
    assert "not downloaded: https://huggingface.co" in empty.output
    assert "huggingface.co/datasets/liuhaotian/LLaVA-Pretrain" in empty.output


def test_files_of_the_hub_are_downloaded_and_their_hash_is_compared(tmp_path, monkeypatch):
    """A folder stands for the Hub."""
    hub, annotations = tmp_path / "hub", json.dumps([{"image": "00000/1.jpg"}]).encode()
    hub.mkdir()
    (hub / "blip_laion_cc_sbu_558k.json").write_bytes(annotations)
    write_archive(hub / "images.zip", "00000/1.jpg")

    def download(repo_id, filename, repo_type, local_dir):
        assert f"{HUB}/{repo_id}/resolve/main/{filename}" in [url for url, _, _ in downloads("llava-558k", folder)]
        local_dir.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub / filename, local_dir)

    def paths_info(self, repo_id, paths, repo_type):
        return [SimpleNamespace(lfs=SimpleNamespace(sha256=hashlib.sha256(annotations).hexdigest()))]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "get_paths_info", paths_info)
    folder, run = tmp_path / "data", CliRunner().invoke
    assert run(app, ["data", "prepare", "llava-558k", str(folder), "--no-download"]).exit_code == 1
    prepared = run(app, ["data", "prepare", "llava-558k", str(folder)])
    assert (prepared.exit_code, prepared.output.count("downloaded"), "Nothing to" in prepared.output) == (0, 2, True)
    checked = run(app, ["data", "verify", "llava-558k", str(folder), "--hashes"])
    assert (checked.exit_code, "as on the Hub" in checked.output) == (0, True)
    (folder / "LLaVA-Pretrain" / "blip_laion_cc_sbu_558k.json").write_bytes(annotations + b" ")
    assert run(app, ["data", "verify", "llava-558k", str(folder)]).exit_code == 1
