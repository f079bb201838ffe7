"""`sdllava inspect` reads the layouts that `sdllava evaluate` reads: COCO's captions, MMVP and MMVP-VLM."""

import csv
import json

import pytest
from fixtures_evaluation import make_image, write_mmvp

from sdllava.analysis.images import open_images
from sdllava.evaluation.benchmarks import get_benchmark, get_matching_benchmark


def coco_folder(folder, names):
    (folder / "val2017").mkdir()
    for seed, name in enumerate(names):
        make_image(seed).save(folder / "val2017" / name)
    return folder


NAMES = ["2.jpg", "10.jpg"]


def karpathy_rows(folder):
    rows = [{"filename": name, "sentences": [f"photo {name}", "other"]} for name in NAMES]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def karpathy_file(folder):
    rows = [{"filename": name, "split": "test", "sentences": [{"raw": f"photo {name}"}]} for name in NAMES]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": rows}))
    return folder / "dataset_coco.json"


def annotations(folder):
    images = [{"id": k, "file_name": name} for k, name in enumerate(NAMES)]
    captions = [{"image_id": k, "caption": f"photo {name}"} for k, name in reversed(list(enumerate(NAMES)))]
    (folder / "captions_val2017.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return folder / "captions_val2017.json"


@pytest.mark.parametrize("write", [karpathy_rows, karpathy_file, annotations])
def test_coco_captions(tmp_path, write):
    file = write(coco_folder(tmp_path, NAMES))
    captioned = open_images([str(file)], prompt="caption")
    assert [entry.name for entry in captioned] == NAMES
    assert [entry.question for entry in captioned] == ["photo 2.jpg", "photo 10.jpg"]
    assert captioned[0].image.tobytes() == make_of(tmp_path, "2.jpg").tobytes()
    assert captioned.has_questions
    assert not open_images([str(file)], prompt="question").has_questions
    assert not open_images([str(file)], prompt="none").has_questions
    assert [entry.question for entry in open_images([str(file)], question="red?")] == ["red?"] * 2
    benchmark = get_benchmark("captions")
    benchmark.image_folder = tmp_path / "val2017"
    assert [(s.id, s.target[0]) for s in benchmark.read(tmp_path)] == [(n, f"photo {n}") for n in NAMES]


def make_of(folder, name):
    from sdllava.image_loading import load_rgb

    return load_rgb(folder / "val2017" / name)


def test_images_elsewhere_and_missing_ones(tmp_path):
    coco_folder(tmp_path, NAMES[:1])
    (tmp_path / "captions").mkdir()
    file = karpathy_rows(tmp_path / "captions")
    with pytest.raises(FileNotFoundError, match=r"The image '10\.jpg' is missing from .* with --image-folder"):
        open_images([str(file)], image_folder=str(tmp_path / "val2017"))


def test_mmvp_has_its_questions_in_the_order_of_its_file(tmp_path):
    folder = write_mmvp(tmp_path / "mmvp", 12)
    found = open_images([str(folder)])
    samples = get_benchmark("mmvp").read(folder)
    assert [entry.name for entry in found] == [f"{k}.jpg" for k in range(1, 13)]
    assert [entry.question.strip() for entry in found] == [sample.question for sample in samples]
    assert [path for _, path in found.files] == [sample.images[0] for sample in samples]


def test_mmvp_vlm_has_its_statements_as_captions(tmp_path):
    with (tmp_path / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["Question ID", "Type", "Statement"]])
        for number in range(1, 13):
            kind = f"Kind {number // 7}"
            folder = tmp_path / "MLLM_VLM Images" / kind
            folder.mkdir(parents=True, exist_ok=True)
            make_image(number).save(folder / f"{number}.jpg")
            writer.writerow([number, kind, f"statement {number}"])
    found = open_images([str(tmp_path)], prompt="caption")
    items = get_matching_benchmark("mmvp_vlm").read(tmp_path)
    assert [path for _, path in found.files] == [image for item in items for image in item.images]
    assert [entry.question for entry in found] == [text for item in items for text in item.texts]
    assert not open_images([str(tmp_path)]).has_questions
