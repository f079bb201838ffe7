"""`sdllava evaluate --sweep guidance=...`: one table, and each scale equals a single run."""

import json

import pytest
from typer.testing import CliRunner

from sdllava.commands.main import app
from sdllava.evaluation.evaluate import LoadedModel
from sdllava.evaluation.guidance_sweep import sweep_scores
from sdllava.evaluation.results import read_records
from sdllava.miniature import mini_path

SCALES = (0, 8)
EVALUATE = ("evaluate", "--model", "mini", "--benchmark", "mini", "--limit", "9")


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.mark.usefixtures("few_resamples")
def test_a_swept_run_equals_single_runs(monkeypatch, tmp_path):
    for name, count in (("QUESTIONS", 20), ("COMPOSITIONS", 4), ("PAIRS_PER_PATTERN", 1)):
        monkeypatch.setattr(f"sdllava.evaluation.benchmarks.mini.{name}", count)
    loaded = LoadedModel.load(str(mini_path()))
    monkeypatch.setattr(LoadedModel, "load", staticmethod(lambda *_, **__: loaded))
    scales = ",".join(map(str, SCALES))
    output = run(*EVALUATE, "--output", tmp_path / "swept", "--sweep", f"guidance={scales}").output
    (swept,) = (tmp_path / "swept").glob("*/mini")
    rows = [line for line in output.splitlines() if line.startswith("| **guidance-")]
    assert [row.split("**")[1] for row in rows] == [f"guidance-{scale}" for scale in SCALES]
    assert all("[" in row for row in rows)  # the interval
    assert "guidance-8 minus guidance-0, questions:" in output
    assert "(paired)" in output
    replies = []
    for scale in SCALES:
        run(*EVALUATE, "--output", tmp_path / "single" / str(scale), "--guidance", scale)
        (single,) = (tmp_path / "single" / str(scale)).glob("*/mini")
        one, many = (json.loads((p / "results.json").read_text()) for p in (single, swept / f"guidance-{scale}"))
        assert many["guidance_scales"] == [scale]
        assert {k: v for k, v in one.items() if k != "command"} == {k: v for k, v in many.items() if k != "command"}
        records = read_records(swept / f"guidance-{scale}" / "samples.jsonl")
        assert records == read_records(single / "samples.jsonl")
        replies.append([record["reply"] for record in records])
    assert replies[0] != replies[1]  # the scale changes an answer, so the equality above means something


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--sweep", "timesteps=10,50"), "'timesteps=10,50' is not a sweep. Write guidance="),
        (("--sweep", "guidance=2,2"), "'guidance=2,2' is not a sweep"),
        (("--sweep", "guidance=high"), "--sweep guidance= takes numbers separated by commas"),
        (("--sweep", "guidance=0,2", "--guidance", "1"), "Leave out --guidance, --passes"),
        (("--sweep", "guidance=0,2", "--leakage"), "--leakage needs one captioning benchmark: name captions or mini_"),
    ],
)
def test_wrong_sweeps_raise_before_a_model_is_loaded(options, reason):
    assert reason in " ".join(run(*EVALUATE, *options, code=1).output.split())


def test_a_run_that_was_not_judged_has_no_score_in_the_table_of_leakage(tmp_path):
    run = {"benchmark": "llava_bench", "model": {}, "metric": "score", "scores": {}, "guidance_scales": [0.0]}
    judged = {**run, "guidance_scales": [4.0], "scores": {"score": 60.0}, "intervals_95": {"score": [50.0, 70.0]}}
    for results in (run, judged):
        folder = tmp_path / f"guidance-{results['guidance_scales'][0]:g}"
        folder.mkdir()
        (folder / "results.json").write_text(json.dumps(results))
    expected = {4.0: {"llava_bench score": {"score": 60.0, "interval": [50.0, 70.0]}}}
    assert sweep_scores(sorted(tmp_path.iterdir())) == expected


def test_the_judge_reaches_the_runs_next_to_leakage(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("sdllava.evaluation.judge.make_judge", lambda *_: "the judge")
    monkeypatch.setattr(LoadedModel, "load", staticmethod(lambda *_, **__: None))
    monkeypatch.setattr("sdllava.evaluation.evaluate.load_samples", lambda *_: ())
    monkeypatch.setattr("sdllava.evaluation.leakage.LeakageSetting.make", lambda *_: None)
    monkeypatch.setattr("sdllava.evaluation.leakage.leakage_sweep", lambda *_: {})
    monkeypatch.setattr("sdllava.evaluation.guidance_sweep.guidance_sweep", lambda *args: seen.append(args[5]) or [])
    run("evaluate", "--model", "mini", "--benchmark", "llava_bench,captions", "--leakage", "--output", tmp_path)
    assert seen == ["the judge"]
