"""The `evaluate` module of the benchmarks, and the lmms-eval adapter."""

import json
from types import SimpleNamespace

import pytest
from fixtures_evaluation import make_image, write_blink, write_captions, write_mmvp, write_naturalbench

from sdllava.evaluation.benchmarks import BENCHMARKS, MATCHING_BENCHMARKS, get_benchmark
from sdllava.evaluation.benchmarks.base import Sample
from sdllava.evaluation.metrics import metric_path
from sdllava.evaluation.runner import make_record, summarise


@pytest.fixture
def load(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    return lambda name: evaluate.load(str(metric_path()), name, cache_dir=str(tmp_path))


def of_folder(name, write, *arguments):
    return lambda folder: get_benchmark(name).read(write(folder, *arguments))


def made(targets, **info):
    """Samples with given targets; `info` has one value for all, or a list with one for each."""
    entries = [{key: value[k] if type(value) is list else value for key, value in info.items()} for k in range(4)]
    return lambda _: [Sample(str(k), "?", (), target, "?", info=entries[k]) for k, target in enumerate(targets)]


OWN = {"answers": [["red"], ["blue"], ["2", "two"], ["no"]], "options": (), "category": ["a", "a", "b", "b"]}
SAMPLES = {
    "mmvp": (of_folder("mmvp", write_mmvp, 4), "A"),
    "naturalbench": (of_folder("naturalbench", write_naturalbench, 2), "Yes"),
    "blink": (of_folder("blink", write_blink, 2), "(A)"),
    "captions": (of_folder("captions", write_captions, 3), "a red dog"),
    "gqa": (made(["yes", "cat", "yes", "no"], image=list("aabb")), "Yes."),
    "easy_vqa": (made(["red", "red", "yes", "no"], image=list("aabc"), kind=["colour", "colour", "yes", "yes"]), "red"),
    "shapes": (made([True, False, True, True], group=list("aabb")), "Yes."),
    "nlvr": (made([True, False, True, True], group=list("aabb")), "true"),
    "own": (made(["red", "blue", "2", "no"], **OWN), "The answer is red"),
    "mini": (
        made(["red", "red", "a", "2"], part="questions", pattern=["colour"] * 2 + ["text", "count"], num_answers=6),
        "Red.",
    ),
    "mini_captions": (lambda _: get_benchmark("mini_captions").read(None)[:3], "a red circle"),
}


@pytest.mark.usefixtures("simple_tokens", "few_resamples")
@pytest.mark.parametrize("name", SAMPLES)
def test_the_scores_are_those_of_a_run(load, tmp_path, name):
    benchmark, (read, reply) = get_benchmark(name), SAMPLES[name]
    samples = read(tmp_path / name)
    replies = [f"{reply} {k}" if "captions" in name else reply for k in range(len(samples))]
    records = [make_record(benchmark, *pair, None) for pair in zip(samples, replies, strict=True)]
    lines = [json.dumps(record) for record in records]  # as in samples.jsonl
    expected = summarise(benchmark, records)["scores"]
    assert max(expected.values()) > 0
    assert load(name).compute(predictions=replies, references=lines) == pytest.approx(expected)


def test_matching(load):
    matrices = [[[2.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [3.0, 4.0]]]
    references = [json.dumps({"id": str(k), "pattern": "colour"}) for k in range(2)]
    found = load("winoground").compute(predictions=matrices, references=references)
    assert found == {"text": 50.0, "image": 100.0, "group": 50.0}
    assert load("mini_pairs").compute(predictions=matrices, references=references)["average"] == 100.0


def test_every_benchmark_has_a_configuration(load):
    for name in (*BENCHMARKS, *MATCHING_BENCHMARKS):
        assert load(name).config_name == name
    with pytest.raises(ValueError, match=r"Unknown benchmark 'bleu'\. Give one of mmvp, naturalbench"):
        load("bleu")


def test_lmms_eval_adapter(composed):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from sdllava.evaluation.lmms_eval_model import MANIFEST

    registry = ModelRegistryV2()
    registry.register_manifest(MANIFEST)
    model = registry.get_model_class("sdllava")(pretrained=str(composed), batch_size=2, guidance=1)
    documents = [{"text": "Is it red?", "image": make_image(k)} for k in range(3)]
    model.task_dict = {"t": {"test": documents}}

    def messages(doc):
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["text"]}]
        return [{"role": "user", "content": content}]

    options = {"max_new_tokens": 4, "temperature": 0, "until": ["\n"]}
    requests = [SimpleNamespace(args=("", messages, options, k, "t", "test")) for k in range(3)]
    replies = model.generate_until(requests)
    assert len(replies) == 3
    assert all(isinstance(reply, str) for reply in replies)
    with pytest.raises(ValueError, match="Unknown --model_args 'typo'"):
        type(model)(pretrained=str(composed), typo=1)
