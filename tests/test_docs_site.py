"""Generated parts of the documentation are up to date, every page is in the site, and jobs have valid commands."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sdllava.train import jobs_page
from sdllava.train.recipe_loading import list_recipes

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_figure_of_the_architecture_is_what_its_script_draws():
    spec = importlib.util.spec_from_file_location("architecture", DOCS / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "architecture.svg").read_text() == module.drawing()


def test_the_page_of_jobs_equals_the_table_of_recipes():
    page = (DOCS / "jobs.md").read_text()
    assert page == jobs_page.documentation()
    listed = re.findall(r"^job (\S+)", page, re.M)
    assert sorted(listed) == list_recipes()


def test_every_page_is_in_the_site():
    listed = re.findall(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.S)
    entries = {line for block in listed for line in block.splitlines() if line and not line.startswith(":")}
    assert {path.stem for path in DOCS.glob("*.md")} - {"index"} <= entries
    assert {f"/research/miniature/{path.stem}" for path in (ROOT / "research" / "miniature").glob("*.md")} <= entries
    for entry in entries:
        assert ((ROOT / entry[1:]) if entry.startswith("/") else DOCS / entry).with_suffix(".md").is_file(), entry


@pytest.mark.slow
def test_the_hub_reads_the_command_of_a_job(tmp_path):
    (function,) = re.findall(r"^   ( *job\(\) \{.*?^   \})", (DOCS / "jobs.md").read_text(), re.M | re.S)
    script = function.replace("hf jobs run --detach", "hf jobs run --dry-run") + "\njob clip/finetune --max_steps 1\n"
    environment = {**os.environ, "OWNER": "me", "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path), "NO_COLOR": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    options = subprocess.run(["hf", "jobs", "run", "--help"], env=environment, capture_output=True, text=True).stdout
    if "--dry-run" not in options:
        pytest.skip("this huggingface_hub cannot check a job without starting it")
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Job not submitted" in done.stdout
    assert "--config clip/finetune --max_steps 1" in done.stdout
    assert "--hub_model_id me/sdllava-clip-finetune" in done.stdout
    assert re.search(r"volumes +hf://buckets/me/llava-data:/data", done.stdout)
