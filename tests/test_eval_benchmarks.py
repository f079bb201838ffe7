"""Reading every benchmark from its published layout, and what happens to data that is not as published."""

import csv
import json
import shutil

import pytest
from evaluation_fixtures import make_image, write_blink, write_captions, write_mmvp, write_naturalbench, write_parquet

from sdllava.evaluation.benchmarks import BENCHMARKS, get_benchmark, get_matching_benchmark
from sdllava.evaluation.benchmarks.base import inside, locate, open_image
from sdllava.evaluation.benchmarks.blink import DISCLAIMER
from sdllava.evaluation.diffusion_prompts import derangement, diffusion_prompts
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


def test_blink_images_and_official_strip(tmp_path):
    folder = write_blink(tmp_path)
    samples = get_benchmark("blink").read(folder)
    assert len(samples) == 28
    assert [len(s.images) for s in samples[:2]] == [1, 2]
    assert samples[1].prompt.startswith("Which one of Art_Style?\nSelect")
    official = get_benchmark("blink", "official").read(folder)
    assert official[1].prompt == DISCLAIMER + samples[1].prompt
    assert official[2].prompt == samples[2].prompt
    strip = open_image(official[1].images[0])
    assert strip.size == (20 + 10 + 20, 20)
    assert strip.getpixel((25, 10)) == (0, 0, 0)
    assert strip.getpixel((3, 2)) == (0, 0, 0)  # the shorter image is centred vertically
    assert strip.getpixel((35, 7)) == open_image(samples[1].images[1]).getpixel((5, 7))


def test_gqa_both_layouts(tmp_path):
    questions = [{"id": "201", "question": "Who?", "answer": "boy", "imageId": "n1", "fullAnswer": "x"}]
    write_parquet(tmp_path / "p" / "testdev_balanced_instructions" / "testdev-0.parquet", questions, ())
    images = [{"id": "n0", "image": make_image(0)}, {"id": "n1", "image": make_image(1)}]
    write_parquet(tmp_path / "p" / "testdev_balanced_images" / "testdev-0.parquet", images, ("image",))
    original = tmp_path / "o"
    (original / "images").mkdir(parents=True)
    make_image(1).save(original / "images" / "n1.jpg")
    row = {key: questions[0][key] for key in ("question", "answer", "imageId")}
    (original / "testdev_balanced_questions.json").write_text(json.dumps({"201": row}))
    benchmark = get_benchmark("gqa")
    for folder in (tmp_path / "p", original):
        (sample,) = benchmark.read(folder)
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


def test_mini_and_its_pairs():
    pytest.importorskip("sdllava.scenes.language")
    from sdllava.scenes.language import PATTERNS

    samples = take(get_benchmark("mini").read(None), 400)
    parts = {sample.info["part"] for sample in samples}
    assert parts == {"questions", "compositions", "pairs"}
    assert {s.info["pattern"] for s in samples if s.info["part"] == "pairs"} == set(PATTERNS)
    benchmark = get_benchmark("mini")
    records = [{"id": s.id, "target": s.target, "correct": True, **s.info} for s in samples]
    assert benchmark.score(records)["questions"] == benchmark.score(records)["pairs"] == 100
    wrong_once = [{**record, "correct": not record["id"].endswith("-0")} for record in records]
    assert benchmark.score(wrong_once)["pairs"] == 0
    assert 10 < benchmark.chance(records)["questions"] < 60
    captions = get_benchmark("mini_captions").read(None)
    assert len(captions) == 500
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


def test_renamed_column(tmp_path):
    folder = write_mmvp(tmp_path)
    path = folder / "Questions.csv"
    path.write_text(path.read_text().replace("Correct Answer", "Answer"))
    with pytest.raises(ValueError, match=r"mmvp: the column 'Correct Answer' is missing \(found: .*--revision"):
        get_benchmark("mmvp").read(folder)


@pytest.mark.parametrize(
    ("name", "files", "sentence"),
    [
        ("captions", {"dataset_coco.json": '{"pictures": []}'}, "the column 'images'"),
        ("captions", {"dataset_coco.json": '{"images": [{"split": "test", "raw": []}]}'}, "the column 'sentences'"),
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


def test_mmvp_vlm_id_that_is_no_number(tmp_path):
    (tmp_path / "MLLM_VLM Images").mkdir()
    (tmp_path / "Questions.csv").write_text("id,type,statement\none,a,b\n2,a,c\n")
    with pytest.raises(ValueError, match="an odd id and an even id, not one and 2"):
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
    with pytest.raises(FileNotFoundError, match=r"'no-one/nothing' .revision v1. could not be had.*--data"):
        locate("no-one/nothing", "MMVP/MMVP", "v1")


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if not name.startswith("mini")])
def test_empty_folder(name, tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        get_benchmark(name).read(tmp_path)


def test_unknown_names():
    with pytest.raises(ValueError, match="no benchmark 'mmpv'; there are mmvp"):
        get_benchmark("mmpv")
    with pytest.raises(ValueError, match="gqa has no protocol 'official'; it has default"):
        get_benchmark("gqa", "official")


# ---------------------------------------------------------------------------------------------- diffusion prompts


def test_what_the_diffusion_model_is_asked(tmp_path):
    samples = get_benchmark("blink").read(write_blink(tmp_path / "b"))
    asked = diffusion_prompts(samples, "question")
    assert asked["val_Counting_2"] == ["Which one of Counting?"] * 2
    assert set(map(tuple, diffusion_prompts(samples, "none").values())) == {("",), ("", "")}
    captions = {name: f"caption of {name}" for sample in samples for name in sample.image_ids}
    both = diffusion_prompts(samples, "question+caption", captions)
    assert both["val_Counting_2"][1] == "Which one of Counting? caption of val_Counting_2_2"
    other = diffusion_prompts(samples, "other", seed=3)
    assert all(
        other[s.id][0] != s.question or s.question in [t.question for t in samples if t is not s] for s in samples
    )
    assert other == diffusion_prompts(samples, "other", seed=3) != diffusion_prompts(samples, "other", seed=4)
    with pytest.raises(ValueError, match="no captions of its own; give a file with --captions"):
        diffusion_prompts(samples, "caption")
    with pytest.raises(ValueError, match="no caption for the image 'val_Art_Style_1_1'"):
        diffusion_prompts(samples, "caption", {"x": "y"})
    with pytest.raises(ValueError, match="not 'answer'"):
        diffusion_prompts(samples, "answer")


def test_other_captions_are_deranged(tmp_path):
    samples = get_benchmark("captions").read(write_captions(tmp_path, 7))
    other = diffusion_prompts(samples, "other", seed=1)
    assert all(other[s.id][0] not in s.target for s in samples)
    assert sorted(o[0] for o in other.values()) == sorted(s.target[0] for s in samples)
    assert diffusion_prompts(samples, "caption")["3.png"] == ["a red dog number 3"]


def test_derangement_is_uniform():
    from collections import Counter

    counts = Counter(tuple(derangement(4, seed)) for seed in range(9000))
    assert len(counts) == 9  # all derangements of four things
    assert max(counts.values()) < 1.15 * min(counts.values())
    with pytest.raises(ValueError, match="at least two"):
        derangement(1, 0)


def test_limit_spreads_and_keeps_pairs(tmp_path):
    samples = get_benchmark("mmvp").read(write_mmvp(tmp_path / "m", 20))
    taken = take(samples, 6)
    assert len(taken) == 6
    assert [a.info["pair"] == b.info["pair"] for a, b in zip(taken[::2], taken[1::2], strict=True)] == [True] * 3
    assert taken[-1].info["pair"] > 5
    blink = get_benchmark("blink").read(write_blink(tmp_path / "b"))
    assert len({sample.info["task"] for sample in take(blink, 14)}) == 14
    with pytest.raises(ValueError, match="not 0"):
        take(samples, 0)
