"""lmms-eval runs the miniature on a local task through its command line. `make test-lmms` runs it."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("lmms_eval", reason="the extra lmms is not installed")

from sdllava import mini_path
from sdllava.scenes.language import sample_question
from sdllava.scenes.render import render

NUM_ROWS = 24
TASK = """
task: sdllava_scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function scenes.images
doc_to_text: question
doc_to_target: answer
doc_to_messages: !function scenes.messages
generation_kwargs:
  max_new_tokens: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""
FUNCTIONS = """
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).parent


def images(doc):
    return [Image.open(FOLDER / doc["image"]).convert("RGB")]


def messages(doc, lmms_eval_specific_kwargs=None):
    content = [{"type": "image", "url": images(doc)[0]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]
"""


@pytest.fixture
def task(tmp_path):
    """A folder with scenes, their questions as JSON Lines, and an lmms-eval task that reads them."""
    rows = []
    for seed in range(NUM_ROWS):
        scene, question = sample_question("test", seed)
        render(scene).save(tmp_path / f"{seed}.png")
        rows.append({"image": f"{seed}.png", "question": question.text, "answer": question.answer})
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "scenes.py").write_text(FUNCTIONS)
    (tmp_path / "scenes.yaml").write_text(TASK.format(file=tmp_path / "own.jsonl"))
    return tmp_path


def run(*arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_its_score_equals_that_of_evaluate(task):
    run(
        "lmms_eval", "--model", "sdllava", "--model_args", f"pretrained={mini_path()}", "--tasks", "sdllava_scenes",
        "--include_path", task, "--batch_size", "4", "--output_path", task / "lmms",
    )  # fmt: skip
    (report,) = (task / "lmms").rglob("*results.json")
    theirs = json.loads(report.read_text())["results"]["sdllava_scenes"]["exact_match,none"]
    run("sdllava", "evaluate", "--model", "mini", "--data", task / "own.jsonl", "--output", task / "ours")
    (results,) = (task / "ours").rglob("results.json")
    ours = json.loads(results.read_text())["scores"]["exact"]
    assert 0 < ours < 100
    assert 100 * theirs == pytest.approx(ours)
