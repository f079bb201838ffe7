"""Intervals, paired differences, and the comparison with the papers' rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from sdllava.evaluation.benchmarks import get_matching_benchmark
from sdllava.evaluation.benchmarks.blink import BLINK, TASKS
from sdllava.evaluation.bootstrap import difference, intervals
from sdllava.evaluation.compare import compare, markdown
from sdllava.evaluation.plots import plot_parts, save
from sdllava.evaluation.runner import summarise


def test_interval_of_a_mean_is_the_binomial_one():
    generator = np.random.default_rng(0)
    units = {str(k): {"accuracy": 100.0 * value} for k, value in enumerate(generator.random(400) < 0.3)}
    low, high = intervals(units, dict)["accuracy"]
    mean = np.mean([unit["accuracy"] for unit in units.values()])
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(mean * (100 - mean) / 400), rel=0.08)
    assert intervals(units, dict) == intervals(units, dict)


def test_pairing_cancels_what_both_runs_share():
    generator = np.random.default_rng(0)
    hard = generator.random(300) * 100
    first = {str(k): {"x": float(v)} for k, v in enumerate(hard)}
    second = {k: {"x": unit["x"] + 1} for k, unit in reversed(first.items())}
    paired = difference(first, second, dict, "x")
    assert paired["paired"]
    assert paired["difference"] == pytest.approx(1)
    assert paired["interval"] == pytest.approx([1, 1])
    apart = difference(first, {f"other {k}": unit for k, unit in second.items()}, dict, "x")
    assert not apart["paired"]
    assert apart["interval"][0] < -3 < 5 < apart["interval"][1]


def test_resamples_without_a_unit_of_the_score_are_left_out():
    first = {"a": {"x": 1.0, "n": 1.0}, "b": {"x": 0.0, "n": 0.0}}
    second = {"a": {"x": 3.0, "n": 1.0}, "b": {"x": 0.0, "n": 0.0}}

    def scores(means):
        return {"x": means["x"] / means["n"]} if means["n"] else {}

    assert difference(first, second, scores, "x") == {"difference": 2.0, "interval": [2.0, 2.0], "paired": True}


def test_intervals_cover_the_truth(monkeypatch):
    """Of 200 samples of a coin with 40%, the 95% intervals contain 40 in about 95%."""
    monkeypatch.setattr("sdllava.evaluation.bootstrap.REPLICATES", 400)
    generator = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        units = {str(k): {"x": 100.0 * v} for k, v in enumerate(generator.random(60) < 0.4)}
        low, high = intervals(units, dict, seed)["x"]
        covered += low <= 40 <= high
    assert 180 <= covered <= 198


def blink_run(folder, right, model):
    records = [
        {
            "id": f"val_{task}_{k}",
            "task": task,
            "choices": ["x", "y"],
            "reply": "A",
            "parsed": "(A)",
            "correct": right(t, k),
        }
        for t, task in enumerate(TASKS)
        for k in range(10)
    ]
    folder.mkdir(parents=True)
    protocol = {"name": "default", "description": "greedy"}
    results = {"benchmark": "blink", "protocol": protocol, "model": {"id": model}}
    results |= summarise(BLINK(), records)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return results


def test_compare_with_the_papers(tmp_path):
    a = blink_run(tmp_path / "a", lambda t, k: k < 3, "A")
    blink_run(tmp_path / "b", lambda t, k: k < 3 or (t == 5 and k < 9), "B")
    assert a["scores"]["macro"] == pytest.approx(30)
    assert a["chance"]["macro"] == pytest.approx(50)
    (comparison,) = compare([tmp_path / "a", tmp_path / "b"])
    assert comparison.headline == ["macro", "micro"]
    assert sorted(comparison.parts) == sorted(TASKS)
    (found,) = comparison.differences
    assert found["paired"]
    assert found["difference"] == pytest.approx(60 / 14)
    assert 0 < found["interval"][0] < found["interval"][1] < 8
    text = markdown(comparison)
    assert "| **a** | 30.00 [" in text
    assert "| LLaVA-v1.5-7B (S3 Figure 3) | 36.60 |  |" in text
    assert "- b minus a, macro: +4.29 [" in text
    assert f"| {TASKS[5]} | 30.00 | 90.00 | 50.00 |" in text
    assert "- a, b: protocol: default: greedy" in text


def test_results_of_an_earlier_version_are_read(tmp_path):
    (comparison,) = compare([Path(__file__).parent / "data" / "earlier-evaluation"])
    assert comparison.headline == ["questions", "compositions", "pairs"]
    text = markdown(comparison)
    assert "| **mini** | 100.00 [100.00, 100.00] | 0.00 [0.00, 0.00] | 100.00 [100.00, 100.00] |" in text
    (run,) = comparison.runs
    scorer = run.scorer()
    assert scorer.score(run.records) == pytest.approx(run.results["scores"], rel=1e-12)
    assert scorer.chance(run.records) == pytest.approx(run.results["chance"], rel=1e-12)


def own_run(folder, protocol="default", **changed):
    folder.mkdir()
    records = [
        {
            "id": str(k),
            "prompt": f"Is {k} red?",
            "target": ["yes"],
            "reply": "yes",
            "correct": k < 2,
            "answers": ["yes"],
        }
        | {"options": [], "category": ""}
        for k in range(4)
    ]
    records[3] |= changed
    results = {"benchmark": "own", "protocol": {"name": protocol, "description": ""}, "model": {"id": folder.name}}
    results |= {"metric": "exact", "scores": {"exact": 50.0}}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(
    ("protocol", "changed", "paired"),
    [
        ("default", {}, True),
        ("default", {"reply": "no"}, True),
        ("default", {"prompt": "Is 3 blue?"}, False),
        ("short", {"prompt": "Is 3 red?\nAnswer shortly."}, True),
        ("short", {"target": ["no"]}, False),
        ("default", {"id": "4"}, False),
    ],
)
def test_only_runs_on_the_same_questions_are_paired(tmp_path, protocol, changed, paired):
    own_run(tmp_path / "a")
    own_run(tmp_path / "b", protocol, **changed)
    (comparison,) = compare([tmp_path / "a", tmp_path / "b"])
    assert comparison.differences[0]["paired"] is paired
    assert ("(not paired: different samples)" in markdown(comparison)) is not paired


@pytest.mark.usefixtures("few_resamples")
@pytest.mark.parametrize(("text", "paired"), [("a dog", True), ("a cat", False)])
def test_matching_runs_are_paired_by_their_texts(tmp_path, text, paired):
    for name, second in (("a", "a dog"), ("b", text)):
        (tmp_path / name).mkdir()
        results = {"benchmark": "winoground", "model": {"id": name}, "metric": "text", "scores": {"text": 100.0}}
        records = [{"id": "1", "texts": ["a cup", second], "verdicts": {"text": 1.0, "image": 0.0, "group": 0.0}}]
        results["metric"] = get_matching_benchmark("winoground").metric
        results["scores"] = {results["metric"]: 0.0}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        (tmp_path / name / "samples.jsonl").write_text(json.dumps(records[0]) + "\n")
    (comparison,) = compare([tmp_path / "a", tmp_path / "b"])
    assert comparison.differences[0]["paired"] is paired


@pytest.mark.usefixtures("few_resamples")
def test_a_first_run_without_the_score_has_no_differences(tmp_path):
    """Its reviews cannot be read, and an earlier version gave it a score."""
    for name, ratings in (("a", (-1.0, -1.0)), ("b", (8.0, 6.0))):
        (tmp_path / name).mkdir()
        protocol = {"name": "default", "description": ""}
        results = {"benchmark": "llava_bench", "protocol": protocol, "model": {"id": name}}
        results |= {"metric": "all", "scores": {"all": 100.0}}
        record = {"id": "1", "category": "conv", "ratings": ratings}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        (tmp_path / name / "samples.jsonl").write_text(json.dumps(record) + "\n")
    (comparison,) = compare([tmp_path / "a", tmp_path / "b"])
    assert comparison.differences == [{}]


@pytest.mark.usefixtures("few_resamples")
def test_labels_tell_runs_apart(tmp_path):
    runs = [tmp_path / name / model / "blink" for name in ("one", "two") for model in ("A", "B")]
    for folder in runs:
        blink_run(folder, lambda t, k: k < 3, folder.parent.name)

    def labels(*paths):
        (comparison,) = compare(paths)
        return [run.label for run in comparison.runs]

    assert labels(runs[0]) == ["A"]
    assert labels(runs[0], runs[1]) == ["A", "B"] == labels(tmp_path / "one")
    assert labels(tmp_path / "one", tmp_path / "two") == ["one: A", "one: B", "two: A", "two: B"]
    assert labels(runs[0], runs[2]) == ["blink: A (1)", "blink: A (2)"]


def test_caption_scores_of_other_tokens_are_not_subtracted(tmp_path, monkeypatch):
    """A run scored with Java is compared where there is none."""
    from sdllava.evaluation.benchmarks import captions

    records = [{"id": str(k), "reply": "a dog", "target": ["a dog", f"the cat {k}"], "parsed": "a"} for k in range(3)]
    monkeypatch.setattr(captions, "ptb_missing", lambda: "no Java")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        results = {"benchmark": "captions", "protocol": {"name": "default", "description": ""}, "model": {"id": name}}
        results |= {"metric": "CIDEr", "scores": {"CIDEr": 50.0}}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        (tmp_path / name / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (comparison,) = compare([tmp_path / "a", tmp_path / "b"])
    assert comparison.differences == [{}]
    assert "| **b** | 50.00 |" in markdown(comparison)


@pytest.mark.usefixtures("few_resamples")
def test_pictures(tmp_path):
    blink_run(tmp_path / "a", lambda t, k: k < 3, "A")
    (comparison,) = compare([tmp_path / "a"])
    plot_parts(comparison, tmp_path / "p.png")
    plot_parts(comparison, tmp_path / "p.svg")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"Unknown picture format 'p\.gif'"):
        save(None, tmp_path / "p.gif")


def test_no_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        compare([tmp_path])


@pytest.mark.parametrize("text", ['{"a"', "[]", '{"benchmark": "mmvp"}'])
def test_damaged_results(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json' is damaged"):
        compare([tmp_path])
