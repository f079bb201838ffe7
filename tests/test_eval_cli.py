"""`sdllava evaluate` and `sdllava match` from the shell, with this package's own model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from evaluation_fixtures import make_image, write_blink, write_captions, write_mmvp, write_winoground
from typer.testing import CliRunner

from sdllava.commands import evaluate as cli
from sdllava.evaluation.results import read_records

app = typer.Typer()
app.command()(cli.evaluate)
app.command()(cli.match)


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def mmvp_folder(tmp_path_factory):
    return write_mmvp(tmp_path_factory.mktemp("mmvp"), 4)


def settings(folder):
    return json.loads((folder / "results.json").read_text())


def results_in(output):
    (path,) = Path(output).glob("*/*/results.json")
    return path.parent


def test_what_the_diffusion_model_is_asked_and_how_strongly(composed, mmvp_folder, tmp_path):
    common = ("evaluate", "--model", composed, "--benchmark", "mmvp", "--data", mmvp_folder)
    output = run(*common, "--output", tmp_path / "a", "--limit", 4)
    a = results_in(tmp_path / "a")
    assert "| **" in output
    assert "LLaVA-v1.5-7B (S3 Table 2)" in output
    assert "chance" in output
    assert settings(a)["diffusion_prompt"]["choice"] == "question"
    assert settings(a)["guidance_scales"] == [4.0]
    assert read_records(a / "samples.jsonl")[0]["diffusion_prompts"] == ["Is the dog one red?"]
    run(*common, "--output", tmp_path / "b", "--limit", 4, "--diffusion-prompt", "none", "--guidance", 1)
    b = results_in(tmp_path / "b")
    assert read_records(b / "samples.jsonl")[0]["diffusion_prompts"] == [""]
    assert settings(b)["guidance_scales"] == [1.0]


def test_data_folder_with_one_folder_per_benchmark_compare_and_plot(composed, tmp_path):
    write_mmvp(tmp_path / "data" / "mmvp", 4)
    write_blink(tmp_path / "data" / "blink", 1)
    common = ("evaluate", "--model", composed, "--data", tmp_path / "data", "--benchmark", "mmvp,blink")
    for name, extra in (("one", ()), ("two", ("--diffusion-prompt", "none"))):
        run(*common, "--output", tmp_path / name, *extra)
    picture = tmp_path / "blink.svg"
    output = run("evaluate", "--compare", tmp_path / "one", tmp_path / "two", "--plot", picture)
    assert "two minus one, macro:" in output
    assert "(paired)" in output
    assert "CLIP-LLaVA-v1.5-7B (S4 Table 7)" in output
    assert "| Jigsaw |" in output
    assert "Visual Correspondence" in picture.read_text()  # labels are drawn as paths with their text in comments
    run("evaluate", "--compare", tmp_path / "nothing", code=1)


def test_pseudo_captions_are_written_and_used(composed, mmvp_folder, tmp_path):
    write_captions(tmp_path / "captions", 2)
    file = tmp_path / "pseudo.jsonl"
    common = ("evaluate", "--model", composed)
    run(*common, "--benchmark", "captions", "--data", tmp_path / "captions", "--write-pseudo-captions", file)
    rows = read_records(file)
    assert [row["image"] for row in rows] == ["0.png", "1.png"]
    assert not (tmp_path / "pseudo.jsonl.run").exists()
    run(*common, "--benchmark", "mmvp", "--data", mmvp_folder, "--write-pseudo-captions", tmp_path / "m.jsonl")
    captions = {row["image"]: row["caption"] for row in read_records(tmp_path / "m.jsonl")}
    options = ("--diffusion-prompt", "question+caption", "--captions", tmp_path / "m.jsonl")
    run(*common, "--benchmark", "mmvp", "--data", mmvp_folder, *options, "--output", tmp_path / "out")
    record = read_records(results_in(tmp_path / "out") / "samples.jsonl")[1]
    assert record["diffusion_prompts"] == [f"Is the dog the dog one red? {captions['2.jpg']}"]


def test_refinement_feeds_each_reply_into_the_next_pass(composed, tmp_path):
    write_captions(tmp_path / "captions", 3)
    common = ("evaluate", "--model", composed, "--benchmark", "captions", "--data", tmp_path / "captions")
    output = run(*common, "--passes", 2, "--diffusion-prompt", "none", "--output", tmp_path / "out")
    first, second = (sorted((tmp_path / "out").glob(f"*/captions/pass-{k}"))[0] for k in (1, 2))
    replies = {record["id"]: record["reply"] for record in read_records(first / "samples.jsonl")}
    assert all(r["diffusion_prompts"] == [replies[r["id"]]] for r in read_records(second / "samples.jsonl"))
    assert "pass-1" in output
    assert "pass-2 minus pass-1" in output
    run(*common[:-3], "mmvp", "--passes", 2, code=1)


def test_what_a_model_or_a_command_cannot_do_is_said_before_anything_is_written(published, composed, tmp_path):
    write_captions(tmp_path / "captions", 3)
    common = ("--benchmark", "captions", "--data", tmp_path / "captions", "--output", tmp_path / "out")
    for model, options, sentence in (
        (published["llava"], ("--passes", 2), "has no diffusion tower that a pass could ask"),
        (composed, ("--guidance", "0,4"), "--guidance takes 1 scale(s) for this model, not 2"),
        (composed, ("--leakage", "--guidance", 4), "--leakage sets prompts and scales itself"),
        (tmp_path / "no-model", (), "no-model' could not be loaded"),
    ):
        output = run("evaluate", "--model", model, *common, *options, code=1)
        assert sentence in " ".join(output.split())
    write_winoground(tmp_path / "winoground", 2)
    common = ("match", "--model", published["sd2"], "--benchmark", "winoground", "--data", tmp_path)
    for limit in (0, -2):
        output = run(*common, "--limit", limit, "--output", tmp_path / "out", code=1)
        assert f"at least 1, not {limit}" in output
    assert not (tmp_path / "out").exists()


def test_leakage_command(composed, tmp_path):
    write_captions(tmp_path / "captions", 3)
    common = ("evaluate", "--model", composed, "--benchmark", "captions", "--data", tmp_path / "captions")
    output = run(*common, "--leakage", "--scales", "0,4", "--output", tmp_path / "out")
    folder = tmp_path / "out" / "leakage"
    assert {"leakage.json", "leakage.md", "leakage.png"} <= {path.name for path in folder.iterdir()}
    assert (folder / "leakage.md").read_text() in output + "\n"
    result = json.loads((folder / "leakage.json").read_text())
    assert [row["scale"] for row in result["rows"]] == [0, 4]
    assert result["metric"] != "CIDEr" or "| SD 2.1; GT captions, s=4 (S3 4.3) | | | | 12.97 | | | |" in output


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
    ("args", "sentence"),
    [
        (("evaluate",), "Name at least one --model and one --benchmark"),
        (("evaluate", "--model", "x", "--benchmark", "mmpv"), "no benchmark 'mmpv'"),
        (("evaluate", "--model", "x", "--benchmark", "mmvp", "--guidance", "four"), "not 'four'"),
        (("evaluate", "somewhere", "--model", "x", "--benchmark", "mmvp"), "add --compare"),
        (("evaluate", "--model", "x", "--benchmark", "mmvp", "--judge-url", "http://h"), "add --judge"),
        (("evaluate", "--compare"), "Name the results folders"),
        (("match", "--model", "x", "--benchmark", "winoground", "--timesteps", "1.5"), "a whole number, not 1.5"),
        (("match", "--model", "x"), "Give a --benchmark, or"),
        (("match", "--model", "x", "--benchmark", "winoground", "--tokens", "some"), "not 'some'"),
    ],
)
def test_one_sentence_and_no_traceback(args, sentence):
    output = run(*args, code=1)
    assert sentence in " ".join(output.split())
    assert "Traceback" not in output


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['sdllava']\n"
        "import typer; from typer.testing import CliRunner; import sdllava.commands.evaluate as c\n"
        "app = typer.Typer(); app.command()(c.evaluate); app.command()(c.match)\n"
        "for name in ('evaluate', 'match'):\n"
        "    assert CliRunner().invoke(app, [name, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(composed, published, mmvp_folder, tmp_path):
    winoground = write_winoground(tmp_path / "winoground", 3)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\n"
        "from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate\n"
        "loaded = LoadedModel.load(sys.argv[1])\n"
        "evaluate(loaded, 'mmvp', sys.argv[3], EvaluationOptions(data=sys.argv[2], blind=True, batch_size=2))\n"
        "from sdllava.evaluation.match import load_matcher, match\n"
        "from sdllava.evaluation.matching import MatchingOptions\n"
        "options = MatchingOptions(timesteps=(489,), trials=1)\n"
        "matcher = load_matcher(sys.argv[4], options)\n"
        "match(matcher, 'winoground', sys.argv[3] + '/match', {}, options, sys.argv[5])\n"
        "from sdllava.evaluation.processes import leave_group\n"
        "leave_group()\n"
    )
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        command += ["--master_port", str(29500 + os.getpid() % 500), str(script)]
        command += [str(composed), str(mmvp_folder), str(tmp_path / str(processes))]
        command += [str(published["sd2"]), str(winoground)]
        subprocess.run(command, check=True, env=environment, timeout=400)
    for name in ("samples.jsonl", "blind/samples.jsonl", "match/samples.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    one, two = (settings(tmp_path / name) for name in ("1", "2"))
    assert {k: v for k, v in one.items() if k != "command"} == {k: v for k, v in two.items() if k != "command"}
    assert not list((tmp_path / "2").glob("*partial*"))
