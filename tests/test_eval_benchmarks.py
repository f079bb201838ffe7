"""Reading every benchmark from its published layout, errors for other data, and the choice of diffusion prompts."""

import csv
import json
import shutil

import numpy as np
import pytest
from fixtures_evaluation import make_image, write_captions, write_mmvp, write_naturalbench, write_parquet
from PIL import Image

from sdllava.evaluation.benchmarks import BENCHMARKS, get_benchmark, get_matching_benchmark, mini
from sdllava.evaluation.benchmarks.base import inside, locate, open_image
from sdllava.evaluation.benchmarks.blink import DISCLAIMER
from sdllava.evaluation.benchmarks.groups import group_means, in_groups
from sdllava.evaluation.prompt_choices import derangement, prompts_for_samples
from sdllava.evaluation.runner import take


def test_mmvp_folder(tmp_path):
    samples = get_benchmark("mmvp").read(write_mmvp(tmp_path))
    assert [s.target for s in samples] == ["A", "B"] * 3
    assert samples[0].prompt == (
        "Is the dog one red?\nA. yes\nB. no\nAnswer with the option's letter from the given choices directly."
    )
    assert samples[0].question == "Is the dog one red?"
    assert [s.info["pair"] for s in samples] == [0, 0, 1, 1, 2, 2]
    assert open_image(samples[2].images[0]).size == (33, 24)  # image number = row + 1


def test_mmvp_official(tmp_path):
    benchmark = get_benchmark("mmvp", "official")
    sample = benchmark.read(write_mmvp(tmp_path))[1]
    assert sample.prompt == "Is the dog the dog one red? (a) yes (b) no"
    assert benchmark.generation == {"do_sample": True, "temperature": 0.2, "num_beams": 1, "max_new_tokens": 1024}
    system, user = benchmark.judge_prompt({"prompt": sample.prompt, "target": "B", "reply": "no"})
    assert system.endswith("Please answer in only yes or no.")
    assert "the correct answer is (b). Does the following answer correctly answers the question, answer:no?" in user
    for judgment, correct in (("Yes", True), ("no", False), ("Yes.", False), ("I think yes", False)):
        record = {}
        benchmark.apply_judgment(record, judgment)
        assert record["correct"] is correct


def test_mmvp_mirror(tmp_path):
    rows = [
        {"image": make_image(k), "Question": "Is it?", "Options": "(a) x (b) y", "Correct Answer": "(b)", "Index": k}
        for k in (1, 2)
    ]
    write_parquet(tmp_path / "data" / "train-0.parquet", rows, ("image",))
    samples = get_benchmark("mmvp").read(tmp_path)
    assert [s.target for s in samples] == ["B", "B"]
    assert open_image(samples[1].images[0]).size == (40, 30)


def test_naturalbench_order_and_suffix(tmp_path):
    folder = write_naturalbench(tmp_path)
    samples = get_benchmark("naturalbench").read(folder)
    assert [s.id for s in samples[:4]] == ["0-q0i0", "0-q0i1", "0-q1i0", "0-q1i1"]
    assert [s.target for s in samples] == [1, 0, 0, 1] * 3
    assert samples[0].prompt == "Is the dog red? Please answer Yes or No."
    assert samples[4].prompt.endswith("red? Please output the letter corresponding to the correct option.")
    assert get_benchmark("naturalbench", "official").read(folder)[0].prompt == "Is the dog red?Please answer Yes or No."
    assert open_image(samples[1].images[0]).tobytes() == make_image(1).tobytes()


def test_blink_images_and_official_strip(blink_folder):
    samples = get_benchmark("blink").read(blink_folder)
    assert len(samples) == 28
    assert [len(s.images) for s in samples[:2]] == [1, 2]
    assert samples[1].prompt.startswith("Which one of Art_Style?\nSelect")
    official = get_benchmark("blink", "official").read(blink_folder)
    assert official[1].prompt == DISCLAIMER + samples[1].prompt
    assert official[2].prompt == samples[2].prompt
    strip = open_image(official[1].images[0])
    assert strip.size == (20 + 10 + 20, 20)
    assert strip.getpixel((25, 10)) == (0, 0, 0)
    assert strip.getpixel((3, 2)) == (0, 0, 0)  # the shorter image is centred vertically
    assert strip.getpixel((35, 7)) == open_image(samples[1].images[1]).getpixel((5, 7))


def test_gqa_both_layouts(tmp_path):
    questions = [{"id": "1001", "question": "Who?", "answer": "boy", "imageId": "n1", "fullAnswer": "x"}]
    write_parquet(tmp_path / "p" / "testdev_balanced_instructions" / "testdev-0.parquet", questions, ())
    images = [{"id": "n0", "image": make_image(0)}, {"id": "n1", "image": make_image(1)}]
    write_parquet(tmp_path / "p" / "testdev_balanced_images" / "testdev-0.parquet", images, ("image",))
    original = tmp_path / "o"
    (original / "images").mkdir(parents=True)
    make_image(1).save(original / "images" / "n1.jpg")
    row = {key: questions[0][key] for key in ("question", "answer", "imageId")}
    (original / "testdev_balanced_questions.json").write_text(json.dumps({"1001": row, "201": row}))
    benchmark = get_benchmark("gqa")
    assert [sample.id for sample in benchmark.read(original)] == ["201", "1001"]  # ordered as numbers, not as text
    for folder in (tmp_path / "p", original):
        *_, sample = benchmark.read(folder)
        assert sample.prompt == "Who?\nAnswer the question using a single word or phrase."
        assert open_image(sample.images[0]).size == (40, 30)
        assert benchmark.is_correct(sample, benchmark.parse(sample, "Boy."))
        assert not benchmark.is_correct(sample, benchmark.parse(sample, "a boy"))
    assert benchmark.chance([{"target": t} for t in ("yes", "yes", "no", "cat")]) == {"accuracy": 50.0}


def test_llava_bench(tmp_path):
    (tmp_path / "images").mkdir()
    make_image(0).save(tmp_path / "images" / "001.jpg")
    files = {
        "questions.jsonl": {"question_id": 0, "image": "001.jpg", "text": "What?", "category": "conv"},
        "context.jsonl": {"image": "001.jpg", "caption": ["A dog.", "It runs."]},
        "answers_gpt4.jsonl": {"question_id": 0, "text": "A dog runs."},
    }
    for name, row in files.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    benchmark = get_benchmark("llava_bench")
    (sample,) = benchmark.read(tmp_path)
    record = {"prompt": sample.prompt, "target": sample.target, "reply": "A cat.", **sample.info}
    _, message = benchmark.judge_prompt(record)
    assert message.startswith(
        "[Context]\nA dog.\nIt runs.\n\n[Question]\nWhat?\n\n[Assistant 1]\nA dog runs.\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nA cat.\n\n[End of Assistant 2]\n\n[System]\nWe would like to request your feedback"
    )


def test_captions_layouts(tmp_path):
    (sample, *_rest) = get_benchmark("captions").read(write_captions(tmp_path / "jsonl"))
    assert sample.target == ["a red dog number 0", "the dog 0 is red"]
    plain = get_benchmark("captions", "plain")
    assert plain.template == "plain"
    assert plain.read(tmp_path / "jsonl")[0].prompt == ""
    (tmp_path / "k" / "val2014").mkdir(parents=True)
    make_image(1).save(tmp_path / "k" / "val2014" / "x.jpg")
    image = {"filename": "x.jpg", "filepath": "val2014", "sentences": [{"raw": " A dog. "}]}
    karpathy = {"images": [{**image, "split": "test"}, {**image, "split": "train"}]}
    (tmp_path / "k" / "dataset_coco.json").write_text(json.dumps(karpathy))
    (sample,) = get_benchmark("captions").read(tmp_path / "k")
    assert sample.target == ["A dog."]
    hub = tmp_path / "hub"
    write_parquet(hub / "data" / "test-0.parquet", [{"filename": "x.jpg", "sentences": ["A dog.", "Dog"]}], ())
    benchmark = get_benchmark("captions")
    with pytest.raises(FileNotFoundError, match=r"'x.jpg' is missing.*--images"):
        benchmark.read(hub)
    benchmark.image_folder = tmp_path / "k" / "val2014"
    assert benchmark.read(hub)[0].target == ["A dog.", "Dog"]


def test_captions_reads_one_annotation_file_of_coco(tmp_path):
    for name in ("train2017", "val2017", "test2017"):
        make_image(0).save(tmp_path / f"{name}.jpg")
        contents = {
            "images": [{"id": 1, "file_name": f"{name}.jpg"}],
            "annotations": [{"image_id": 1, "caption": "A dog."}],
        }
        (tmp_path / f"captions_{name}.json").write_text(json.dumps(contents))
    (sample,) = get_benchmark("captions").read(tmp_path)
    assert sample.id == "val2017.jpg"
    (tmp_path / "captions_val2017.json").unlink()
    names = r"\['captions_test2017\.json', 'captions_train2017\.json'\]"
    with pytest.raises(ValueError, match=rf"has several annotation files: {names}\. Keep one of them\."):
        get_benchmark("captions").read(tmp_path)


@pytest.mark.slow
def test_mini_has_its_published_size():
    samples = get_benchmark("mini").read(None)
    parts = [sample.info["part"] for sample in samples]
    assert {part: parts.count(part) for part in mini.PARTS} == {"questions": 1800, "compositions": 900, "pairs": 900}
    assert len({sample.id for sample in samples}) == 3600
    assert len(get_benchmark("mini_captions").read(None)) == 500
    assert len(get_matching_benchmark("mini_pairs").read(None)) == 450


def test_mini_and_its_pairs(monkeypatch):
    for name, count in (("QUESTIONS", 150), ("COMPOSITIONS", 20), ("PAIRS_PER_PATTERN", 2), ("CAPTIONS", 5)):
        monkeypatch.setattr(mini, name, count)
    samples = get_benchmark("mini").read(None)
    parts = {sample.info["part"] for sample in samples}
    assert parts == {"questions", "compositions", "pairs"}
    assert {s.info["pattern"] for s in samples if s.info["part"] == "pairs"} == set(mini.PATTERNS)
    benchmark = get_benchmark("mini")
    records = [{"id": s.id, "target": s.target, "correct": True, **s.info} for s in samples]
    assert benchmark.score(records)["questions"] == benchmark.score(records)["pairs"] == 100
    wrong_once = [{**record, "correct": not record["id"].endswith("-0")} for record in records]
    assert benchmark.score(wrong_once)["pairs"] == 0
    assert 10 < benchmark.chance(records)["questions"] < 60
    captions = get_benchmark("mini_captions").read(None)
    assert len(captions) == 5
    assert len(captions[3].target) == 1
    assert open_image(captions[3].images[0]).tobytes() != open_image(captions[4].images[0]).tobytes()
    item = get_matching_benchmark("mini_pairs").read(None)[0]
    assert open_image(item.images[0]).tobytes() != open_image(item.images[1]).tobytes()
    assert item.texts[0] != item.texts[1]


def test_mmvp_vlm_and_winoground(tmp_path):
    vlm = tmp_path / "vlm"
    with_type = vlm / "MLLM_VLM Images" / "Orientation"
    with_type.mkdir(parents=True)
    with (vlm / "Questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", "type", "statement"], [1, "Orientation", "left"], [2, "Orientation", "right"]]
        )
    for number in (1, 2):
        make_image(number).save(with_type / f"{number}.jpg")
    (item,) = get_matching_benchmark("mmvp_vlm").read(vlm)
    assert item.texts == ("left", "right")
    assert item.info["pattern"] == "Orientation and Direction"
    wino = tmp_path / "wino"
    row = {"id": 0, "caption_0": "a b", "caption_1": "b a"}
    write_parquet(
        wino / "test-0.parquet", [{**row, "image_0": make_image(0), "image_1": make_image(1)}], ("image_0", "image_1")
    )
    (item,) = get_matching_benchmark("winoground").read(wino)
    assert item.texts == ("a b", "b a")
    (tmp_path / "jsonl" / "images").mkdir(parents=True)
    for k in (0, 1):
        make_image(k).save(tmp_path / "jsonl" / "images" / f"ex_{k}.png")
    (tmp_path / "jsonl" / "examples.jsonl").write_text(json.dumps({**row, "image_0": "ex_0", "image_1": "ex_1"}))
    (item,) = get_matching_benchmark("winoground").read(tmp_path / "jsonl")
    assert open_image(item.images[1]).tobytes() == make_image(1).tobytes()
    shutil.make_archive(tmp_path / "jsonl" / "images", "zip", tmp_path / "jsonl", "images")
    shutil.rmtree(tmp_path / "jsonl" / "images")
    (item,) = get_matching_benchmark("winoground").read(tmp_path / "jsonl")
    assert open_image(item.images[1]).tobytes() == make_image(1).tobytes()


# ------------------------------------------------------------------------------------------------------ bad data


def test_missing_image(tmp_path):
    folder = write_mmvp(tmp_path)
    (folder / "MMVP Images" / "4.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"'4\.jpg' is missing"):
        get_benchmark("mmvp").read(folder)


def test_unreadable_image(tmp_path):
    folder = write_mmvp(tmp_path)
    (folder / "MMVP Images" / "1.jpg").write_bytes(b"no image")
    sample = get_benchmark("mmvp").read(folder)[0]
    with pytest.raises(ValueError, match=r"'1\.jpg' cannot be read"):
        open_image(sample.images[0], sample.image_ids[0])
    for missing_pixels in (None, 3):  # a null in parquet, a wrong type
        with pytest.raises(ValueError, match=r"'2\.jpg' cannot be read"):
            open_image(lambda value=missing_pixels: value, "2.jpg")


def transparent_image():
    """Opaque red on the left, transparent black on the right."""
    pixels = np.zeros((8, 8, 4), dtype=np.uint8)
    pixels[:, :4] = (255, 0, 0, 255)
    return Image.fromarray(pixels, "RGBA")


def on_white(image):
    return [image.getpixel((x, 4)) for x in (0, 7)] == [(255, 0, 0), (255, 255, 255)]


def test_transparent_images_are_laid_on_white(tmp_path):
    transparent = transparent_image()
    transparent.save(tmp_path / "image.png")
    transparent.quantize().save(tmp_path / "palette.png")
    for source in (tmp_path / "image.png", tmp_path / "palette.png", transparent, lambda: transparent):
        assert on_white(open_image(source))


def test_transparent_images_of_data_sets_are_laid_on_white(tmp_path):
    row = {"id": 0, "caption_0": "a b", "caption_1": "b a", "image_0": transparent_image(), "image_1": make_image(1)}
    write_parquet(tmp_path / "p" / "test-0.parquet", [row], ("image_0", "image_1"))
    archive = tmp_path / "z" / "images"
    archive.mkdir(parents=True)
    for name in ("ex_0", "ex_1"):
        transparent_image().save(archive / f"{name}.png")
    names = {"image_0": "ex_0", "image_1": "ex_1"}
    (tmp_path / "z" / "examples.jsonl").write_text(json.dumps({**row, **names}))
    shutil.make_archive(archive, "zip", archive)
    shutil.rmtree(archive)
    for folder in (tmp_path / "p", tmp_path / "z"):
        (item,) = get_matching_benchmark("winoground").read(folder)
        assert on_white(open_image(item.images[0]))


def test_renamed_column(tmp_path):
    folder = write_mmvp(tmp_path)
    path = folder / "Questions.csv"
    path.write_text(path.read_text().replace("Correct Answer", "Answer"))
    with pytest.raises(ValueError, match=r"mmvp: the column 'Correct Answer' is missing \(found: .*--revision"):
        get_benchmark("mmvp").read(folder)


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        (
            "captions",
            {"a.jpg": "", "c.jsonl": '{"image": "a.jpg", "captions": ["x"]}\n{"captions": ["x"]}'},
            "'filename'",
        ),
        ("llava_bench", {"questions.jsonl": "", "context.jsonl": '{"file": "x"}'}, "context.jsonl: the column 'image'"),
    ],
)
def test_renamed_field_of_a_later_or_nested_row(tmp_path, name, files, sentence):
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=f"{sentence}.* is missing"):
        get_benchmark(name).read(tmp_path)


@pytest.mark.parametrize("text", ['{"pictures": []}', '{"images": [{"split": "test", "raw": []}]}'])
def test_a_file_that_is_not_karpathys_raises(tmp_path, text):
    (tmp_path / "dataset_coco.json").write_text(text)
    with pytest.raises(ValueError, match=r"dataset_coco.json' has no images with sentences and split\. Use Karpathy"):
        get_benchmark("captions").read(tmp_path)


def test_mmvp_vlm_id_that_is_not_a_number(tmp_path):
    (tmp_path / "MLLM_VLM Images").mkdir()
    (tmp_path / "Questions.csv").write_text("id,type,statement\none,a,b\n2,a,c\n")
    with pytest.raises(ValueError, match=r"the ids 'one' and '2' of Questions\.csv are not an odd and an even number"):
        get_matching_benchmark("mmvp_vlm").read(tmp_path)


def test_answer_outside_options(tmp_path):
    folder = write_mmvp(tmp_path)
    path = folder / "Questions.csv"
    path.write_text(path.read_text().replace("(a) yes (b) no,(b)", "(a) yes (b) no,(c)"))
    with pytest.raises(ValueError, match="the answer 'C' of question 2 is not one of A, B"):
        get_benchmark("mmvp").read(folder)


def test_path_that_leaves_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"")
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg")):
        with pytest.raises(ValueError, match="leads out of"):
            inside(tmp_path / "in", name)
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(ValueError, match="leads out of"):
        inside(tmp_path / "in", "link.jpg")


def test_links_into_the_hub_cache_are_followed(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "sha"
    snapshot.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (tmp_path / "datasets--a--b" / "blobs" / "1f").write_bytes(b"x")
    (snapshot / "1.jpg").symlink_to("../../blobs/1f")
    assert inside(snapshot, "1.jpg").read_bytes() == b"x"


def test_no_such_folder():
    with pytest.raises(FileNotFoundError, match="neither a folder nor the id"):
        locate("/no/such/folder", "MMVP/MMVP", None)


def test_a_pinned_revision_from_the_hubs_cache_offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "datasets--MMVP--MMVP"
    (repository / "refs").mkdir(parents=True)
    commits = {"main": "a" * 40, "old": "b" * 40}
    for name, commit in commits.items():
        (repository / "refs" / name).write_text(commit)
        write_mmvp(repository / "snapshots" / commit, 2 if name == "old" else 4)
    for revision, expected in ((None, "main"), ("old", "old"), ("b" * 40, "old")):
        folder, source = locate(None, "MMVP/MMVP", revision)
        assert source == {"id": "MMVP/MMVP", "revision": commits[expected]}
        assert len(get_benchmark("mmvp").read(folder)) == (2 if expected == "old" else 4)


def test_no_such_data_set_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'no-one/nothing' \(revision v1\) could not be downloaded.*--data"):
        locate("no-one/nothing", "MMVP/MMVP", "v1")


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not name.startswith(("mini", "own"))])
def test_empty_folder(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        get_benchmark(name).read(tmp_path)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"Unknown benchmark 'mmpv'\. Choose one of mmvp, "):
        get_benchmark("mmpv")
    with pytest.raises(ValueError, match=r"gqa has no protocol 'official'\. Choose one of default with --protocol"):
        get_benchmark("gqa", "official")


# ---------------------------------------------------------------------------------------------- diffusion prompts


def test_choices_of_the_diffusion_prompt(blink_folder):
    samples = get_benchmark("blink").read(blink_folder)
    questions = prompts_for_samples(samples, "question")
    assert questions["val_Counting_2"] == ["Which one of Counting?"] * 2
    assert prompts_for_samples(samples, "prompt")["val_Counting_1"] == [
        "Which one of Counting?\nSelect from the following choices.\n(A) no\n(B) A\n"
    ]
    assert set(map(tuple, prompts_for_samples(samples, "none").values())) == {("",), ("", "")}
    captions = {name: f"caption of {name}" for sample in samples for name in sample.image_ids}
    both = prompts_for_samples(samples, "question+caption", captions)
    assert both["val_Counting_2"][1] == "Which one of Counting? caption of val_Counting_2_2"
    other = prompts_for_samples(samples, "other", seed=3)
    assert all(
        other[s.id][0] != s.question or s.question in [t.question for t in samples if t is not s] for s in samples
    )
    assert other == prompts_for_samples(samples, "other", seed=3) != prompts_for_samples(samples, "other", seed=4)
    with pytest.raises(ValueError, match=r"no captions of its own\. Give a file with --captions"):
        prompts_for_samples(samples, "caption")
    with pytest.raises(ValueError, match="no caption for the image 'val_Art_Style_1_1'"):
        prompts_for_samples(samples, "caption", {"x": "y"})
    with pytest.raises(ValueError, match=r"Unknown --diffusion-prompt 'answer'\. Choose one of question, prompt, "):
        prompts_for_samples(samples, "answer")


def test_other_captions_are_deranged(tmp_path):
    samples = get_benchmark("captions").read(write_captions(tmp_path, 7))
    other = prompts_for_samples(samples, "other", seed=1)
    assert all(other[s.id][0] not in s.target for s in samples)
    assert sorted(o[0] for o in other.values()) == sorted(s.target[0] for s in samples)
    assert prompts_for_samples(samples, "caption")["3.png"] == ["a red dog number 3"]


def test_derangement_is_uniform():
    from collections import Counter

    counts = Counter(tuple(derangement(4, seed)) for seed in range(9000))
    assert len(counts) == 9  # all derangements of four things
    assert max(counts.values()) < 1.15 * min(counts.values())
    with pytest.raises(ValueError, match="at least two"):
        derangement(1, 0)


def test_numbers_by_group():
    unit = in_groups(["Jigsaw", "all"], correct=1.0)
    assert unit == {"correct Jigsaw": 1.0, "count Jigsaw": 1.0, "correct all": 1.0, "count all": 1.0}
    means = {"correct Jigsaw": 0.2, "count Jigsaw": 0.4, "correct Multi-view": 0.1, "count Multi-view": 0.1}
    assert group_means(means, "correct") == {"Jigsaw": 0.5, "Multi-view": 1.0}
    assert group_means({"correct a": 0.0, "count a": 0.0}, "correct") == {}  # a resample without a unit of the group


def test_limit_spreads_and_keeps_pairs(tmp_path, blink_folder):
    samples = get_benchmark("mmvp").read(write_mmvp(tmp_path / "m", 20))
    taken = take(samples, 6)
    assert len(taken) == 6
    assert [a.info["pair"] == b.info["pair"] for a, b in zip(taken[::2], taken[1::2], strict=True)] == [True] * 3
    assert taken[-1].info["pair"] > 5
    blink = get_benchmark("blink").read(blink_folder)
    assert len({sample.info["task"] for sample in take(blink, 14)}) == 14
    with pytest.raises(ValueError, match="--limit 0 is too small"):
        take(samples, 0)
