"""The command line, as a user runs it."""

import json
import subprocess
import sys
import time

import pytest
from PIL import Image

from sdllava import SDLlavaForConditionalGeneration


def run(*arguments, timeout: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "sdllava", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.fixture
def photograph(tmp_path):
    Image.effect_noise((30, 20), 80).convert("RGB").save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_help_answers_without_torch():
    started = time.perf_counter()
    done = run("--help")
    assert done.returncode == 0
    assert "ask" in done.stdout
    assert "compose" in done.stdout
    assert time.perf_counter() - started < 5
    code = "import sys; sys.argv = ['sdllava']; import sdllava.commands.main; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_ask_prints_answers_and_json(composed, photograph):
    done = run("ask", photograph, "What?", "Where?", "--model", composed, "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    assert "What?" in done.stdout
    assert "Where?" in done.stdout
    done = run("ask", photograph, "What?", "--model", composed, "--json", "--guidance", 0, "--max-new-tokens", 3)
    record = json.loads(done.stdout)
    assert record["question"] == "What?"
    assert 0 < record["score"] < 1
    assert isinstance(record["answer"], str)


def test_compose_writes_a_model_that_answers(published, photograph, tmp_path):
    parts = ["--diffusion", published["sd2"], "--vision", published["clip"], "--language-model", published["llm"]]
    fields = ["--field", "image_size=64", "--field", "grid_size=4", "--field", "fusion_num_attention_heads=4"]
    options = ["--fusion", "concat", "--guidance", 0, "--guidance", 1, "--tap", "up-level1-repeat1-vit-block0-out"]
    done = run("compose", tmp_path / "model", *parts, *fields, *options)
    assert done.returncode == 0, done.stderr
    assert "diffusion_tower" in done.stderr
    assert "GiB" in done.stderr
    config = SDLlavaForConditionalGeneration.from_pretrained(tmp_path / "model").config
    assert config.fusion == "concat"
    assert config.diffusion_config.guidance_scales == [0.0, 1.0]
    assert run("ask", photograph, "What?", "--model", tmp_path / "model", "--max-new-tokens", 2).returncode == 0
    again = run("compose", tmp_path / "model", *parts)
    assert again.returncode == 1
    assert "exists: name a new folder" in again.stderr


def test_compose_upgrades_a_llava(published, tmp_path):
    fields = ["--field", "image_size=64", "--field", "grid_size=4", "--field", "fusion_num_attention_heads=4"]
    done = run("compose", tmp_path / "model", "--llava", published["llava"], "--diffusion", published["sd2"], *fields)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_a_failed_compose_leaves_nothing_behind(published, tmp_path):
    done = run("compose", tmp_path / "model", "--diffusion", published["clip"], "--language-model", published["llm"])
    assert done.returncode == 1
    assert "sdllava: cannot read the diffusion model" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_taps_lists_the_papers_model_and_any_folder(published, composed):
    lines = run("taps").stdout.splitlines()
    (line,) = [line for line in lines if line.split()[:1] == ["U-L1-R1-B0-Cross-Q"]]
    assert line.split()[1:4] == ["16", "16", "1280"]
    assert "U-L0-R0-B2-Out" in run("taps", published["sdxl"]).stdout
    assert "U-L1-R1-B0-Cross-Q" in run("taps", composed).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "missing.jpg", "What?"], "'missing.jpg' is no existing file"),
        (["ask", "PHOTO", "", "--model", "COMPOSED"], "the question '' is empty"),
        (["ask", "PHOTO", "PHOTO", "What?", "--model", "COMPOSED"], "is a file: one image is asked about at a time"),
        (["ask", "PHOTO", "What?", "--model", "EMPTY"], "EMPTY"),
        (["ask", "PHOTO", "What?", "--model", "PHOTO"], "is no folder and no repository's name"),
        (["ask", "PHOTO", "What?", "--model", "./missing"], "'./missing' is no folder and no repository's name"),
        (["compose", "OUT", "--field", "grid_size"], "has no '='"),
        (["taps", "EMPTY"], "EMPTY"),
    ],
)
def test_bad_input_gets_one_sentence(arguments, message, composed, photograph, tmp_path):
    (tmp_path / "EMPTY").mkdir()
    places = {"PHOTO": photograph, "COMPOSED": composed, "EMPTY": tmp_path / "EMPTY", "OUT": tmp_path / "OUT"}
    done = run(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
