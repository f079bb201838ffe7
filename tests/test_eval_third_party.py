"""easy-VQA, SHAPES and NLVR, read from hand-written sets in the published layouts, and their scores."""

import json
import sys

import numpy as np
import pytest
from fixtures_evaluation import make_image, write_parquet

from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.base import open_image, unit_means


def record(benchmark, sample, reply):
    parsed = benchmark.parse(sample, reply)
    return {"id": sample.id, "target": sample.target, "correct": benchmark.is_correct(sample, parsed), **sample.info}


def write_easy_vqa(folder, rows):
    (folder / "test" / "images").mkdir(parents=True)
    for number in {row[2] for row in rows}:
        make_image(number).save(folder / "test" / "images" / f"{number}.png")
    (folder / "test" / "questions.json").write_text(json.dumps(rows))
    return folder


def write_shapes(folder, split, rows):
    pixels = np.zeros((len(rows), 30, 30, 3), np.uint8)
    pixels[:, :10, :10] = (0, 0, 255)  # red, as OpenCV stores it
    np.save(folder / f"{split}.input.npy", pixels)
    (folder / f"{split}.query_str.txt").write_text("".join(f"{question}\n" for question, _ in rows))
    (folder / f"{split}.output").write_text("".join(f"{answer}\n" for _, answer in rows))
    return folder


def test_easy_vqa(tmp_path):
    rows = [["what shape is it?", "circle", 3], ["is there a red shape?", "yes", 3], ["what color is it?", "teal", 4]]
    benchmark = get_benchmark("easy_vqa")
    samples = benchmark.read(write_easy_vqa(tmp_path, rows))
    assert [(s.prompt, s.target, s.info["kind"]) for s in samples] == [
        ("what shape is it?", "circle", "shape"),
        ("is there a red shape?", "yes", "yes or no"),
        ("what color is it?", "teal", "colour"),
    ]
    assert open_image(samples[2].images[0]).tobytes() == make_image(4).tobytes()
    records = [record(benchmark, s, reply) for s, reply in zip(samples, ("Circle.", "no", "teal"), strict=True)]
    scores = benchmark.score(records)
    assert scores["accuracy"] == pytest.approx(200 / 3)
    assert (scores["shape"], scores["yes or no"], scores["colour"]) == (100, 0, 100)
    assert benchmark.chance([{"target": "no"}, {"target": "no"}, {"target": "red"}, {"target": "yes"}]) == {
        "accuracy": 50
    }
    assert get_benchmark("easy_vqa", "short").read(tmp_path)[0].prompt.endswith("using a single word or phrase.")


@pytest.mark.slow
def test_easy_vqa_reads_the_installed_package(monkeypatch):
    pytest.importorskip("easy_vqa")
    benchmark = get_benchmark("easy_vqa")
    assert len(benchmark.read(benchmark.default_folder())) == 9673
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    monkeypatch.setattr("sdllava.evaluation.benchmarks.easy_vqa.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install easy-vqa"):
        benchmark.default_folder()


def test_shapes(tmp_path):
    rows = [("is a square red", "true"), ("is a circle above a square", "false")]
    write_shapes(tmp_path, "test", rows)
    write_shapes(tmp_path, "val", rows[:1])
    benchmark = get_benchmark("shapes")
    samples = benchmark.read(tmp_path)
    assert [(s.prompt, s.target) for s in samples] == [
        ("is a square red?", True),
        ("is a circle above a square?", False),
    ]
    assert open_image(samples[0].images[0]).getpixel((2, 2)) == (255, 0, 0)
    assert [s.id for s in get_benchmark("shapes", "val").read(tmp_path)] == ["val-0"]
    describe = get_benchmark("shapes", "describe")
    assert [s.id for s in describe.read(tmp_path)] == [s.id for s in samples]
    assert (benchmark.generation["max_new_tokens"], describe.generation["max_new_tokens"]) == (8, 192)
    (tmp_path / "test.output").write_text("true\nmaybe\n")
    with pytest.raises(ValueError, match=r"'maybe' is neither 'true' nor 'false'"):
        benchmark.read(tmp_path)
    (tmp_path / "test.output").write_text("true\n")
    with pytest.raises(ValueError, match=r"2 images, 2 questions and 1 answers"):
        benchmark.read(tmp_path)


@pytest.mark.parametrize(
    ("pixels", "kept", "message"),
    [
        (np.zeros((2, 30, 30, 3), np.uint8), 200, r"test.input.npy' cannot be read \(.*\). Download it again"),
        (np.zeros((2, 30, 30, 3), np.uint8), 0, r"test.input.npy' cannot be read \(.*\). Download it again"),
        (np.zeros((2, 3, 30, 30), np.uint8), None, r"contains uint8 of shape \(2, 3, 30, 30\)"),
        (np.zeros((2, 30, 30, 3)), None, r"contains float64 of shape \(2, 30, 30, 3\)"),
    ],
)
def test_files_without_images_of_shapes(pixels, kept, message, tmp_path):
    write_shapes(tmp_path, "test", [("is a square red", "true")] * 2)
    np.save(tmp_path / "test.input.npy", pixels)
    content = (tmp_path / "test.input.npy").read_bytes()
    (tmp_path / "test.input.npy").write_bytes(content[:kept])
    with pytest.raises(ValueError, match=message):
        get_benchmark("shapes").read(tmp_path)


def write_nlvr(folder, rows):
    (folder / "images" / "7").mkdir(parents=True)
    for identifier, *_ in rows:
        for order in range(6):
            make_image(order).save(folder / "images" / "7" / f"dev-{identifier}-{order}.png")
    lines = [{"identifier": i, "sentence": s, "label": label, "directory": "7"} for i, s, label in rows]
    (folder / "dev.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("reply", "parsed"), [("yes", True), ("It is false, not true.", False), ("No.", False), ("blue", None), ("", None)]
)
def test_replies_to_statements(reply, parsed):
    assert get_benchmark("shapes").parse(None, reply) is parsed


def test_nlvr_both_layouts(tmp_path):
    rows = [("1572-0", "There is a blue box", "true"), ("31-2", "All boxes are black", "false")]
    original = write_nlvr(tmp_path / "o", rows)
    table = [
        {"identifier": i, "sentence": s, "label": label == "true", "permutation": order, "image": make_image(order)}
        for i, s, label in rows
        for order in range(6)
    ]
    write_parquet(tmp_path / "p" / "dev.parquet", table, ("image",))
    benchmark = get_benchmark("nlvr")
    first, second = (benchmark.read(folder) for folder in (original, tmp_path / "p"))
    for sample, other in zip(first, second, strict=True):
        assert (sample.id, sample.prompt, sample.target) == (other.id, other.prompt, other.target)
        assert open_image(sample.images[0]).size == open_image(other.images[0]).size
    assert first[5].id == "1572-0-5"
    assert first[0].prompt == "There is a blue box True or false?"
    assert {s.info["group"] for s in get_benchmark("nlvr", "even").read(original)} == {"1572"}
    replies = ["yes"] * 9 + ["no"] * 3  # of the second sentence's six, the last three are right
    records = [record(benchmark, s, reply) for s, reply in zip(first, replies, strict=True)]
    assert unit_means(benchmark.units(records)) == {"correct": 4.5, "samples": 6}
    assert benchmark.score(records) == {"accuracy": 75}


@pytest.mark.parametrize("name", ["shapes", "nlvr"])
def test_data_that_is_not_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=r"not on the Hub\. Give a folder of .*github\.com.* with --data"):
        get_benchmark(name).default_folder()
