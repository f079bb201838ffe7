"""The command line: results and errors in process, and two real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import sdllava
from sdllava import SDLlavaConfig, SDLlavaForConditionalGeneration
from sdllava.commands.main import app
from sdllava.commands.options import check_device, parse_integers, parse_numbers
from sdllava.commands.reporting import require_packages


def run(*arguments: object) -> Result:
    """Run `sdllava` in this process; an exception that is not reported as an error fails the test."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    Image.effect_noise((30, 20), 80).convert("RGB").save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_help_and_errors_of_a_real_process_import_nothing_heavy():
    code = """
import runpy, sys
commands = ("ask", "compose", "taps", "merge", "cache", "evaluate", "match", "push", "serve", "demo", "mini", "inspect")
for command in ([], *([name] for name in commands), ["mini", "scene"], ["inspect", "attention"]):
    sys.argv = ["sdllava", *command, "--help"]
    try:
        runpy.run_module("sdllava", run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, command
sys.argv = ["sdllava", "ask", "photo.jpg", "What?", "--guidance", "nan"]
try:
    runpy.run_module("sdllava", run_name="__main__")
except SystemExit as end:
    assert end.code == 1
heavy = {"torch", "transformers", "diffusers", "datasets", "trl", "matplotlib", "gradio", "httpx"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(f" {name} " in done.stdout for name in ("ask", "compose", "inspect", "attention"))
    assert done.stderr == "sdllava: --guidance takes finite numbers, not nan.\n"


@pytest.mark.slow
def test_a_real_process_answers(composed, photograph):
    command = [sys.executable, "-m", "sdllava", "ask", str(photograph), "What?", "--model", str(composed)]
    done = subprocess.run([*command, "--max-new-tokens", "3", "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["question"] == "What?"


def test_ask_prints_answers_and_json_and_draws_a_heat_map(composed, photograph, tmp_path):
    options = ("--model", composed, "--max-new-tokens", 3)
    done = run("ask", photograph, "What?", "Where?", *options, "--heatmap", tmp_path / "h.png")
    assert done.exit_code == 0, done.stderr
    with Image.open(tmp_path / "h.png") as opened:
        assert min(opened.size) > 100
    assert "What?" in done.stdout
    assert "Where?" in done.stdout
    done = run("ask", photograph, "What?", *options, "--json", "--guidance", 0)
    record = json.loads(done.stdout)
    assert record["question"] == "What?"
    assert 0 < record["score"] < 1
    assert isinstance(record["answer"], str)


def test_ask_answers_with_another_vision_language_model(published, photograph):
    done = run("ask", photograph, "What?", "--model", published["llava"], "--max-new-tokens", 2, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["question"] == "What?"


@pytest.mark.slow
def test_compose_writes_a_model_that_answers(published, photograph, tmp_path):
    parts = ["--diffusion", published["sd2"], "--vision", published["clip"], "--language-model", published["llm"]]
    fields = ["--field", "image_size=64", "--field", "grid_size=4", "--field", "fusion_num_attention_heads=4"]
    options = ["--fusion", "concat", "--guidance", 0, "--guidance", 1, "--tap", "up-level1-repeat1-vit-block0-out"]
    done = run("compose", tmp_path / "model", *parts, *fields, *options)
    assert done.exit_code == 0, done.stderr
    assert "diffusion_tower" in done.stderr
    assert "GiB" in done.stderr
    config = SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").config
    assert config.fusion == "concat"
    assert config.diffusion_config.guidance_scales == [0.0, 1.0]
    assert run("ask", photograph, "What?", "--model", tmp_path / "model", "--max-new-tokens", 2).exit_code == 0


def test_compose_upgrades_a_llava(published, tmp_path):
    fields = ["--field", "image_size=64", "--field", "grid_size=4", "--field", "fusion_num_attention_heads=4"]
    done = run("compose", tmp_path / "model", "--llava", published["llava"], "--diffusion", published["sd2"], *fields)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()
    again = run("compose", tmp_path / "model", "--llava", published["llava"])
    assert again.exit_code == 1
    assert "exists. Name a new folder." in again.stderr


def test_a_failed_compose_leaves_no_output(published, tmp_path):
    done = run("compose", tmp_path / "model", "--diffusion", published["clip"], "--language-model", published["llm"])
    assert done.exit_code == 1
    assert "cannot read the diffusion model" in done.stderr.lower()
    assert not list(tmp_path.iterdir())


def test_taps_lists_the_papers_model_and_any_folder(published, composed):
    lines = run("taps").stdout.splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["U-L1-R1-B0-Cross-Q"]]
    assert line.split()[1:4] == ["16", "16", "1280"]
    assert "U-L0-R0-B2-Out" in run("taps", published["sdxl"]).stdout
    assert "U-L1-R1-B0-Cross-Q" in run("taps", composed).stdout


def test_presets_are_listed_and_used(published, tmp_path):
    listed = run("taps", "--presets").stdout
    assert "T-B28-Norm" in listed
    assert "arXiv 2505.18584" in listed
    assert "None of these was tested here with real weights." in listed
    parts = ("--diffusion", published["sd1"], "--language-model", published["llm"])
    fields = ("--field", "fusion=none", "--field", "image_size=64", "--field", "grid_size=4")
    done = run("compose", tmp_path / "model", "--preset", "cleandift-sd15", *parts, *fields)
    assert done.exit_code == 0, done.stderr
    tower = SDLlavaConfig.from_pretrained(tmp_path / "model").diffusion_config
    assert (tower.taps, tower.timesteps, tower.add_noise) == (["U-L1-Up-Out"], [261], False)
    assert "There is no preset 'x'. Use one of sd21" in run("compose", tmp_path / "y", "--preset", "x").stderr


def test_the_version_is_printed():
    assert run("--version").stdout.strip() == sdllava.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "missing.jpg", "What?"], "missing.jpg"),
        (["ask", "PHOTO", "", "--model", "COMPOSED"], "Question '' is empty"),
        (["ask", "PHOTO", "PHOTO", "What?", "--model", "COMPOSED"], "is a file. Give one image, then the questions"),
        (["ask", "PHOTO", "What?", "--model", "EMPTY"], "EMPTY"),
        (["ask", "PHOTO", "What?", "--model", "PHOTO"], "is neither a folder nor a repository id"),
        (["ask", "PHOTO", "What?", "--model", "./missing"], "'./missing' is neither a folder nor a repository id"),
        (["ask", "PHOTO", "What?", "--model", "LLM"], "is a model of type 'llama', which does not answer questions"),
        (["ask", "PHOTO", "What?", "--model", "CLIP"], "is a model of type 'clip_vision_model', which does not answer"),
        (["ask", "PHOTO", "What?", "--model", "COMPOSED", "--device", "tpu:x"], "--device 'tpu:x' is not a device"),
        (["ask", "PHOTO", "What?", "--guidance", "nan"], "--guidance takes finite numbers, not nan"),
        (["ask", "PHOTO", "What?", "--heatmap", "OUT/heat.png"], "--heatmap names the folder"),
        (["ask", "PHOTO", "What?", "--heatmap", "heat.gif"], "'heat.gif' has an unknown suffix. Use one of .png, .svg"),
        (["compose", "OUT", "--field", "grid_size"], "has no '='"),
        (["compose", "OUT", "--guidance", "inf"], "--guidance takes finite numbers, not inf"),
        (["compose", "OUT", "--diffusion", "./missing"], "'./missing' is neither a folder nor a repository id"),
        (["compose", "OUT", "--llava", "a/b", "--vision", "c/d"], "Leave out --vision and --language-model"),
        (["taps", "EMPTY"], "EMPTY"),
        (["evaluate", "--model", "x", "--benchmark", "mmvp", "--guidance", "nan"], "finite numbers, not nan"),
        (["inspect", "features", "PHOTO", "-o", "x.png", "--guidance-scales", "nan"], "finite numbers, not nan"),
        (["inspect", "delta", "PHOTO", "What?", "-o", "OUT/x.png"], "--output names the folder"),
        (["train", "--config", "own-data/ful"], "Recipe 'own-data/ful' does not exist"),
        (["train", "--config=own-data/ful"], "Recipe 'own-data/ful' does not exist"),
        (["train", "--config", "own-data/full", "--per_device_train_batch_size", "0"], "batch_size is 0. Use at least"),
        (["push", "OUT", "me/model"], "is not a folder"),
        (["mini", "scenes", "s.parquet", "--split", "dev"], "'dev'"),
        (["mini", "scenes", "OUT"], "Use one of .parquet"),
    ],
)
def test_errors_name_the_value_and_the_fix(arguments, message, composed, published, photograph, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    places = {"PHOTO": photograph, "COMPOSED": composed, "EMPTY": tmp_path / "EMPTY", "OUT": tmp_path / "OUT"}
    places |= {"LLM": published["llm"], "CLIP": published["clip"], "OUT/x.png": tmp_path / "OUT" / "x.png"}
    places |= {"OUT/heat.png": tmp_path / "OUT" / "heat.png", "s.parquet": tmp_path / "s.parquet"}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.exit_code == 1
    assert message in done.stderr
    assert done.stderr.startswith(("sdllava: ", "Warning: the miniature"))
    assert not (tmp_path / "OUT").exists()
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve", "mini", "--port", "70000"],
        ["demo", "--port", "0"],
        ["cache", "--output", "x", "--kind", "latents", "--batch-size", "0"],
        ["evaluate", "--batch-size", "0"],
        ["ask", "p.png", "What?", "--max-new-tokens", "0"],
        ["train"],
    ],
)
def test_values_out_of_range_are_usage_errors(arguments):
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage:" in done.stderr


def test_train_takes_the_miniature_by_name(monkeypatch):
    from sdllava.train import run as train_run

    given = []
    monkeypatch.setattr(train_run, "train", given.extend)
    assert run("train", "--config", "own-data/full", "--init_from", "mini").exit_code == 0
    assert run("train", "--config=own-data/full", "--init_from=mini").exit_code == 0
    assert given == ["--config", "own-data/full", "--init_from", "mini"] * 2


def test_other_exceptions_are_defects_and_keep_their_traceback(monkeypatch):
    from sdllava.train import run as train_run

    monkeypatch.setattr(train_run, "train", lambda arguments: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        run("train", "--seed", "1")


def test_numbers_are_read_from_lists():
    assert parse_numbers("0, 1.5,4", "--x") == [0.0, 1.5, 4.0]
    assert parse_integers("50,500", "--x") == [50, 500]
    assert parse_integers(None, "--x") is None
    for wrong in ("1,two", ",", "1,inf"):
        with pytest.raises(ValueError, match="--x takes"):
            parse_numbers(wrong, "--x")
    with pytest.raises(ValueError, match=r"--x takes whole numbers, not 1\.5"):
        parse_integers("1.5", "--x")


def test_devices_and_extras_are_checked(monkeypatch):
    assert check_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="'cuda:1' is not available"):
        check_device("cuda:1")
    require_packages("Drawing", "eval", "json")
    with pytest.raises(ImportError, match=r'Drawing needs no_such_package. Run: pip install "sdllava\[eval\]"'):
        require_packages("Drawing", "eval", "json", "no_such_package")
