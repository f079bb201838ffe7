"""`sdllava evaluate` and `sdllava match` from the command line, with this package's own model."""

import functools
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from fixtures_evaluation import make_image, write_captions, write_mmvp, write_winoground
from ranks import run_ranks
from typer.testing import CliRunner

from sdllava.commands.main import app
from sdllava.evaluation import match as matching_run
from sdllava.evaluation.captioning import refine
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate, load_samples
from sdllava.evaluation.leakage import LeakageSetting, leakage_sweep
from sdllava.evaluation.match import load_matcher, match
from sdllava.evaluation.matching import MatchingOptions
from sdllava.evaluation.results import read_records

pytestmark = pytest.mark.usefixtures("few_tokens", "few_resamples", "simple_tokens", "load_once")
load_model_once = functools.cache(LoadedModel.load)
load_matcher_once = functools.cache(load_matcher)


@pytest.fixture
def load_once(monkeypatch):
    """Models stay loaded between the commands of this file."""
    monkeypatch.setattr(LoadedModel, "load", staticmethod(load_model_once))
    monkeypatch.setattr(matching_run, "load_matcher", load_matcher_once)


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


def stored(folder):
    return json.loads((folder / "results.json").read_text())


def results_in(output):
    (path,) = Path(output).glob("*/*/results.json")
    return path.parent


def test_diffusion_prompt_and_guidance(composed, mmvp_folder, tmp_path):
    common = ("evaluate", "--model", composed, "--benchmark", "mmvp", "--data", mmvp_folder)
    output = run(*common, "--output", tmp_path / "a", "--limit", 4)
    a = results_in(tmp_path / "a")
    assert "| **" in output
    assert "LLaVA-v1.5-7B (S3 Table 2)" in output
    assert "chance" in output
    assert stored(a)["samples"] == 4
    assert stored(a)["diffusion_prompt"]["choice"] == "question"
    assert stored(a)["guidance_scales"] == [4.0]
    (question,) = read_records(a / "samples.jsonl")[0]["diffusion_prompts"]
    assert question == read_records(a / "samples.jsonl")[0]["prompt"].split("\n")[0]
    run(*common, "--output", tmp_path / "b", "--limit", 4, "--diffusion-prompt", "none", "--guidance", 1)
    b = results_in(tmp_path / "b")
    assert read_records(b / "samples.jsonl")[0]["diffusion_prompts"] == [""]
    assert stored(b)["guidance_scales"] == [1.0]


def test_data_folder_with_one_folder_per_benchmark_compare_and_plot(composed, mmvp_folder, blink_folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mmvp").symlink_to(mmvp_folder)
    (tmp_path / "data" / "blink").symlink_to(blink_folder)
    common = ("evaluate", "--model", composed, "--data", tmp_path / "data", "--benchmark", "mmvp,blink", "--limit", 14)
    for name, extra in (("one", ()), ("two", ("--diffusion-prompt", "none"))):
        run(*common, "--output", tmp_path / name, *extra)
    picture = tmp_path / "blink.svg"
    output = run("evaluate", "--compare", tmp_path / "one", tmp_path / "two", "--plot", picture)
    assert "two minus one, macro:" in output
    assert "two minus one, pair_accuracy:" in output
    assert "(paired)" in output
    assert "CLIP-LLaVA-v1.5-7B (S4 Table 7)" in output
    assert "| Jigsaw |" in output
    assert "Visual Correspondence" in picture.read_text()  # labels are drawn as paths with their text in comments
    assert "contains no finished run" in run("evaluate", "--compare", tmp_path / "nothing", code=1)


def test_pseudo_captions_are_written_and_used(composed, mmvp_folder, tmp_path):
    write_captions(tmp_path / "captions", 2)
    file = tmp_path / "pseudo.jsonl"
    common = ("evaluate", "--model", composed)
    run(*common, "--benchmark", "captions", "--data", tmp_path / "captions", "--write-pseudo-captions", file)
    rows = read_records(file)
    assert [row["image"] for row in rows] == ["0.png", "1.png"]
    assert not (tmp_path / "pseudo.jsonl.run").exists()
    common = (*common, "--benchmark", "mmvp", "--data", mmvp_folder, "--limit", 2)
    run(*common, "--write-pseudo-captions", tmp_path / "m.jsonl")
    captions = {row["image"]: row["caption"] for row in read_records(tmp_path / "m.jsonl")}
    options = ("--diffusion-prompt", "question+caption", "--captions", tmp_path / "m.jsonl")
    run(*common, *options, "--output", tmp_path / "out")
    records = read_records(results_in(tmp_path / "out") / "samples.jsonl")
    assert len(records) == len(captions) == 2
    for record in records:
        question = record["prompt"].split("\n")[0]
        assert record["diffusion_prompts"] == [f"{question} {captions[record['id'] + '.jpg']}"]


def test_refinement_conditions_each_pass_on_the_replies_of_the_one_before(composed, tmp_path):
    write_captions(tmp_path / "captions", 3)
    common = ("evaluate", "--model", composed, "--benchmark", "captions", "--data", tmp_path / "captions")
    output = run(*common, "--passes", 2, "--diffusion-prompt", "none", "--output", tmp_path / "out")
    first, second = (sorted((tmp_path / "out").glob(f"*/captions/pass-{k}"))[0] for k in (1, 2))
    assert all(r["diffusion_prompts"] == [""] for r in read_records(first / "samples.jsonl"))
    replies = {record["id"]: record["reply"] for record in read_records(first / "samples.jsonl")}
    assert all(r["diffusion_prompts"] == [replies[r["id"]]] for r in read_records(second / "samples.jsonl"))
    assert "pass-1" in output
    assert "pass-2 minus pass-1" in output
    run(*common[:-3], "mmvp", "--passes", 2, code=1)


def test_impossible_options_fail_before_anything_is_written(published, composed, tmp_path):
    write_captions(tmp_path / "captions", 3)
    common = ("--benchmark", "captions", "--data", tmp_path / "captions", "--output", tmp_path / "out")
    for model, options, message in (
        (published["llava"], ("--passes", 2), "has no diffusion tower to condition on captions"),
        (composed, ("--guidance", "0,4"), "--guidance has 2 scale(s), but this model has 1. Give 1."),
        (composed, ("--leakage", "--guidance", 4), "--leakage sets prompts and scales itself"),
        (composed, ("--diffusion-prompt", "caption", "--captions", "no.jsonl"), "'no.jsonl' does not exist"),
        (
            composed,
            ("--diffusion-prompt", "other", "--write-pseudo-captions", tmp_path / "c.jsonl"),
            "--diffusion-prompt 'other' cannot be used for captioning. Choose question or none.",
        ),
        (tmp_path / "no-model", (), "no-model' is neither a folder nor a repository id"),
    ):
        output = run("evaluate", "--model", model, *common, *options, code=1)
        assert message in " ".join(output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_leakage_command(composed, tmp_path):
    """The sweep's table has the leakage on captions next to the scores of the other benchmarks."""
    write_captions(tmp_path / "captions", 3)
    write_mmvp(tmp_path / "mmvp", 2)
    common = ("evaluate", "--model", composed, "--benchmark", "mmvp,captions", "--data", tmp_path)
    output = run(*common, "--leakage", "--sweep", "guidance=0,4", "--output", tmp_path / "out")
    folder = tmp_path / "out" / "leakage"
    assert {"leakage.json", "leakage.md", "leakage.png"} <= {path.name for path in folder.iterdir()}
    assert (folder / "leakage.md").read_text() in output + "\n"
    result = json.loads((folder / "leakage.json").read_text())
    assert [row["scale"] for row in result["rows"]] == [0, 4]
    (mmvp,) = (tmp_path / "out").glob("*/mmvp")
    for row in result["rows"]:
        single = stored(mmvp / f"guidance-{row['scale']:g}")
        expected = {"score": single["scores"]["pair_accuracy"], "interval": single["intervals_95"]["pair_accuracy"]}
        assert row["other_tasks"] == {"mmvp pair_accuracy": expected}
    assert "| mmvp pair_accuracy [95%] |" in output
    picture = tmp_path / "grid.png"
    assert f"Picture: {picture}" in run("evaluate", mmvp, "--compare", "--heatmap", picture).replace("\n", "")
    assert stored(mmvp / "guidance-4")["tower"] == {"taps": ["U-L1-R1-B0-Cross-Q"], "timesteps": [50]}
    assert result["rows"][0]["likelihood_gain"]["mean"] == pytest.approx(0, abs=1e-5)  # s = 0 ignores the prompt


def test_match_files_and_benchmark(published, tmp_path):
    for k in (1, 2):
        make_image(k).save(tmp_path / f"{k}.png")
    images = ("--image", tmp_path / "1.png", "--image", tmp_path / "2.png")
    common = ("match", "--model", published["sd2"], "--timesteps", "489", "--trials", 1)
    output = run(*common, *images, "--text", "a dog", "--text", "a cat")
    assert "| text | 1.png | 2.png |" in output
    assert output.count("±") == 4
    run(*common, *images, code=1)
    write_winoground(tmp_path / "winoground", 2)
    output = run(*common, "--benchmark", "winoground", "--data", tmp_path, "--output", tmp_path / "out")
    assert "| t = 489 |" in output
    assert "| ensemble |" in output
    assert "S3 Table 7" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("evaluate",), "Name at least one --model and one --benchmark"),
        (("evaluate", "--model", "x", "--benchmark", "mmpv"), "Unknown benchmark 'mmpv'"),
        (("evaluate", "--model", "x", "--benchmark", "mmvp", "--guidance", "four"), "'four'"),
        (("evaluate", "somewhere", "--model", "x", "--benchmark", "mmvp"), "add --compare"),
        (("evaluate", "--model", "x", "--benchmark", "mmvp", "--judge-url", "http://h"), "Add --judge"),
        (("evaluate", "--compare"), "Name the results folders"),
        (("match", "--model", "x", "--benchmark", "winoground", "--timesteps", "1.5"), "1.5"),
        (("match", "--model", "x"), "Give a --benchmark, or"),
        (("match", "--model", "x", "--benchmark", "winoground", "--tokens", "some"), "Unknown token mask 'some'"),
    ],
)
def test_errors_have_one_message_and_no_traceback(args, message):
    output = run(*args, code=1)
    assert message in " ".join(output.split())
    assert "Traceback" not in output


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner; from sdllava.commands.main import app\n"
        "for name in ('evaluate', 'match'):\n"
        "    assert CliRunner().invoke(app, [name, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", f"import sys; sys.argv = ['sdllava']\n{code}"], check=True)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(composed, published, mmvp_folder, tmp_path):
    winoground = write_winoground(tmp_path / "winoground", 3)
    options = EvaluationOptions(data=str(mmvp_folder), blind=True, batch_size=2)
    captions = EvaluationOptions(data=str(write_captions(tmp_path / "captions", 3)), batch_size=2)
    leakage = LeakageSetting.make(*load_samples("captions", captions), captions)
    matching = MatchingOptions(timesteps=(489,), trials=1)

    def measure(output: Path) -> None:
        loaded = LoadedModel.load(str(composed))
        evaluate(loaded, "mmvp", output, options)
        refine(loaded, "captions", output / "captions", 2, captions)
        leakage_sweep([("m", loaded)], leakage, output / "leakage", (4.0,))
        matcher = load_matcher(str(published["sd2"]), matching)
        match(matcher, "winoground", output / "match", {}, matching, winoground)

    measure(tmp_path / "1")
    run_ranks(partial(measure, tmp_path / "2"), tmp_path)
    exact = ["samples.jsonl", "blind/samples.jsonl", "match/samples.jsonl"]
    exact += [f"captions/pass-{number}/samples.jsonl" for number in (1, 2)]
    exact += [f"leakage/m/{run}/samples.jsonl" for run in ("no-text", "task-s4", "mismatched-s4")]
    for name in exact:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    (row,), (other,) = (json.loads((tmp_path / n / "leakage" / "leakage.json").read_text())["rows"] for n in ("1", "2"))
    gain, other_gain = (x.pop("likelihood_gain") for x in (row, other))
    assert row == other
    assert [gain["mean"], *gain["interval"]] == pytest.approx([other_gain["mean"], *other_gain["interval"]], abs=1e-5)
    one, two = (stored(tmp_path / name) for name in ("1", "2"))
    assert {k: v for k, v in one.items() if k != "command"} == {k: v for k, v in two.items() if k != "command"}
    assert not list((tmp_path / "2").glob("*partial*"))
