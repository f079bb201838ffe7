"""What a newcomer asks the command line: versions, recipes, help on one screen, completion, quiet output."""

import functools
import os
import re
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from sdllava.commands.doctor import cache_report, missing_packages
from sdllava.commands.main import app
from sdllava.commands.recipes import matches, summarise, train_help
from sdllava.commands.reporting import QUIET
from sdllava.train.recipe_loading import list_recipes
from sdllava.version import __version__

HEAVY = ("torch", "transformers", "diffusers", "datasets", "trl", "matplotlib", "gradio")


@functools.cache
def summaries():
    return [summarise(name) for name in list_recipes()]


def process(code: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {name: value for name, value in os.environ.items() if name not in QUIET}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**variables, **environment}
    )


def test_version_recipes_and_help_need_no_heavy_library():
    code = f"""
import runpy, sys
for arguments in (["--version"], ["recipes", "Table 2", "--fusion", "concat"], ["train", "--help"]):
    sys.argv = ["sdllava", *arguments]
    try:
        runpy.run_module("sdllava", run_name="__main__")
    except SystemExit as end:
        assert end.code in (0, None), arguments
print("loaded:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = process(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == __version__
    assert any(line.lstrip().startswith("clip-sd21-concat-s4/finetune") for line in lines)
    assert lines[-1] == "loaded:"


def test_a_misspelt_recipe_is_reported_at_once_with_similar_names():
    begin = time.monotonic()
    done = process("import sys; sys.argv = ['sdllava', 'train', '--config', 'clap/align']; import sdllava.__main__")
    assert done.returncode == 1
    assert done.stderr.startswith("sdllava: Recipe 'clap/align' does not exist.")
    assert "clip/align" in done.stderr
    assert time.monotonic() - begin < 5  # 0.6 s on an idle machine; importing torch takes several seconds


def test_the_help_of_train_fits_a_screen_and_names_what_leads_further():
    help_text = train_help(list_recipes())
    lines = help_text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 88
    for hint in ("own-data", "--help-all", "sdllava recipes", "clip-sd21-*", "--init_from"):
        assert hint.replace("-*", "*") in help_text
    done = CliRunner().invoke(app, ["train", "--config", "clip/align", "--help"])
    assert done.exit_code == 0
    assert done.stdout.strip() == help_text.strip()


@pytest.mark.parametrize(
    ("words", "backbone", "fusion", "included", "excluded"),
    [
        (["Table 2"], None, None, "clip-sd21-concat-s0/finetune", "dino/finetune"),
        (["s3 table 7"], None, None, None, "clip/finetune"),
        ([], "SDXL", None, "sdxl-llava-c/finetune", "clip/align"),
        ([], "sd2.1", "none", "sd21-t10/align", "clip-sd21-concat/align"),
        ([], "dino", None, "dino/finetune", "clip/align"),
        ([], "none", None, "clip/finetune", "sd21-t10/align"),
        ([], None, "cross-attention", "clip-sd21-cross-attention-s4/finetune", "clip-sd21-concat/align"),
        (["own-data"], None, "own", "own-data/lora", "clip/align"),
    ],
)
def test_recipes_are_found_by_row_backbone_and_fusion(words, backbone, fusion, included, excluded):
    found = [recipe.name for recipe in summaries() if matches(recipe, words, backbone, fusion)]
    assert included is None or included in found
    assert excluded not in found


def test_a_search_without_results_raises():
    done = CliRunner().invoke(app, ["recipes", "nonsense", "--fusion", "gated"])
    assert done.exit_code == 1
    assert "No recipe matches ['nonsense', 'gated']" in done.stderr


def test_the_shell_completes_commands_and_recipes():
    main = "from sdllava.commands.main import main; main()"
    shell = {"_SDLLAVA_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    code = f"import sys; sys.argv = ['sdllava']; {main}"
    done = process(code, **shell, COMP_WORDS="sdllava train --config clip/")
    assert done.stdout.split() == ["clip/align", "clip/finetune"]


def test_libraries_are_quiet_and_the_environment_can_change_that():
    code = (
        "import os, sys, warnings; sys.argv = ['sdllava', '--version']\n"
        "from sdllava.commands.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "warnings.warn('library')\n"
        "print(os.environ['TRANSFORMERS_VERBOSITY'], os.environ['TQDM_DELAY'])\n"
        "from tqdm.auto import tqdm\n"
        "list(tqdm(range(3)))\n"
    )
    done = process(code)
    assert done.stdout.split() == [__version__, "error", "2"]
    assert done.stderr == ""  # neither the warning nor a bar of less than two seconds
    assert process(code, TRANSFORMERS_VERBOSITY="info", TQDM_DELAY="0").stderr.strip().endswith("it/s]")


@pytest.mark.slow
def test_an_answer_is_all_that_is_printed(tmp_path):
    image = tmp_path / "scene.png"
    code = "from sdllava.commands.main import main; main()"
    done = process(f"import sys; sys.argv = ['sdllava', 'mini', 'scene', {str(image)!r}, '--seed', '27']; {code}")
    assert done.returncode == 0
    question = "What colour is the circle?"
    done = process(f"import sys; sys.argv = ['sdllava', 'ask', {str(image)!r}, {question!r}]; {code}")
    assert (done.stdout, done.stderr) == ("green\n", "")


def test_the_report_on_the_installation():
    extras = missing_packages()
    assert set(extras) >= {"train", "eval", "demo", "serve", "quantize"}
    assert extras["train"] == []
    assert "/hub" in cache_report()


@pytest.mark.slow
def test_doctor_reports_versions_devices_and_what_fits():
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for text in ("torch 2", "train: installed", "cpu (", "Vicuna-7B", "answers in bfloat16", "fits on"):
        assert text in done.stdout
    report = done.stdout.partition("Vicuna-7B")[2]
    needs = {task: float(size) for task, size in re.findall(r"^ +(.+): ([0-9.]+) GiB", report, re.MULTILINE)}
    assert 14 < needs["answers in bfloat16"] < 18
    assert needs["whole language model trained"] > 6.6e9 * 16 / 2**30  # float32 weights, gradients and two moments
    assert needs["QLoRA, without the adapter"] < 8
