"""Documented commands and Python examples run as printed, where they need neither the Hub nor a server."""

import functools
import glob
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from fixtures_evaluation import make_image
from typer.testing import CliRunner

from sdllava.analysis.loading import load_analysis_model
from sdllava.commands.main import app
from sdllava.miniature import mini_path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.M | re.S)
INLINE = re.compile(r"`(sdllava [^`]+)`")

SKIPPED = {
    "a repository of the Hub": r"(?<![-\w./])(?!(?:runs|images|results|cache|own-data|coco)/)[A-Za-z][\w-]*/[\w.-]+",
    "a server": r"^sdllava (?:serve|demo)\b|127\.0\.0\.1|--judge",
    "data that is downloaded": r"--benchmark (?!mini|sugarcrepe)|data (?:prepare|verify)|val2014|results/[AB]\b",
    "training, which tests/test_train_*.py run": r"^sdllava (?:train|cache|merge|convert|compose|push)\b",
    "an ellipsis or a placeholder": r"\.\.\.|…|[<>]|\b(?:MODEL|FOLDER\w*|DATA|NAME|OUTPUT|PATH|FILE|IMAGE|DIFFUSION"
    r"|COMMAND|RECIPE)\b",
    "seven minutes": r"--benchmark mini_pairs --limit 90",
    "the result of a skipped command": r"runs/(?!own-merged)|--model my-\w+|captions\.jsonl",
}
"""Why a command is not run here: what it needs, and how that is recognised."""


def commands_of(page: Path) -> list[str]:
    """The commands of a page in order: lines of blocks, joined where they continue; in the text, those with files."""
    text, found = page.read_text(encoding="utf-8"), []
    for match in BLOCK.finditer(text):
        if match[2] == "bash":
            lines = re.sub(r"\\\n\s*", " ", match[3]).splitlines()
            found += [line.strip() for line in lines]
        elif match[2] == "console":
            found += [line.strip()[2:] for line in match[3].splitlines() if line.strip().startswith("$ ")]
    found += [command for command in INLINE.findall(BLOCK.sub("", text)) if re.search(r"\.\w{3,5}\b|/", command)]
    return [" ".join(shlex.split(line, comments=True, posix=False)) for line in found if _is_command(line)]


def _is_command(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:
        return False  # part of a here-document
    return line.startswith("sdllava ")


def reason_to_skip(command: str) -> str | None:
    return next((reason for reason, pattern in SKIPPED.items() if re.search(pattern, command)), None)


def commands_to_run() -> dict[str, list[str]]:
    """The commands of each page that run here, each on the first page that has it."""
    found: dict[str, str] = {}
    for page in PAGES:
        for command in commands_of(page):
            if reason_to_skip(command) is None:
                found.setdefault(command, page.name)
    pages = dict.fromkeys(found.values())
    return {page: [command for command, first in found.items() if first == page] for page in pages}


RUN = commands_to_run()


def test_the_pages_have_commands_to_run():
    inspected = {command.split()[2] for command in RUN["inspect.md"] if command.startswith("sdllava inspect ")}
    assert inspected == {"attention", "features", "delta", "similarity", "cka", "sweep"}
    assert any(command.startswith("sdllava ask") for command in RUN["README.md"])
    assert sum(map(len, RUN.values())) >= 12


def write_coco(folder: Path) -> None:
    """Four images in place of COCO's photographs, with captions and an item of SugarCrepe each."""
    (folder / "val2017").mkdir(parents=True)
    names = [f"{number:012}.jpg" for number in range(4)]
    for number, name in enumerate(names):
        make_image(number, (64, 64)).save(folder / "val2017" / name)
    captions = [{"filename": name, "sentences": [f"a red circle {name}"]} for name in names]
    pair = {"kind": "swap_obj", "caption": "a red circle", "negative_caption": "a blue circle"}
    items = [pair | {"id": name, "filename": name} for name in names]
    for file, rows in (("karpathy_120.jsonl", captions), ("sugarcrepe_120.jsonl", items)):
        (folder / file).write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def documented_files(tmp_path_factory) -> Path:
    """The files that the documentation names: scenes, photographs, questions, and a trained model."""
    folder = tmp_path_factory.mktemp("documented")
    scenes = folder / "scenes"
    scenes.mkdir()
    for seed in range(4):
        CliRunner().invoke(app, ["mini", "scene", str(scenes / f"{seed}.png"), "--seed", str(seed)])
    for name in ("scene.png", "demo-scene.png", "1.png", "2.png"):
        shutil.copy(scenes / "0.png", folder / name)
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        make_image(len(name), (64, 64)).save(folder / name)
    write_coco(folder / "coco")
    for name in ("photos", "pairs", "images"):
        shutil.copytree(scenes, folder / name)
    (folder / "own.jsonl").write_text('{"image": "1.png", "question": "How many objects are there?", "answer": "2"}\n')
    evaluation = ["evaluate", "--model", "mini", "--benchmark", "mini", "--limit", "2", "--output"]
    assert CliRunner().invoke(app, [*evaluation, str(folder / "results")]).exit_code == 0
    (folder / "results" / "mini").rename(folder / "results" / "runs-sd21-t50")
    (folder / "runs").mkdir()
    for name in ("M", "YOUR_CHECKPOINT", "runs/own-merged"):
        (folder / name).symlink_to(mini_path())
    return folder


def _as_in_a_shell(word: str) -> list[str]:
    return sorted(glob.glob(word)) or [word]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_documented_commands_run(page, documented_files, monkeypatch):
    monkeypatch.chdir(documented_files)
    monkeypatch.setattr("sdllava.evaluation.bootstrap.REPLICATES", 20)
    monkeypatch.setattr("sdllava.analysis.loading.load_analysis_model", functools.cache(load_analysis_model))
    for command in RUN[page]:
        words = [word for given in shlex.split(command)[1:] for word in _as_in_a_shell(given)]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{page}: {command}\n{result.output[-1500:]}{result.exception!r}"


PYTHON_NEEDS = re.compile(
    r"me/my-model|llava-hf/|openai|YOUR_CHECKPOINT|flux-llava|prefix_cache|vllm|datasets|http|shapes_dataset"
)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_python_runs_and_prints_what_its_comments_give(page, documented_files, monkeypatch, capsys):
    """The blocks of a page run one after the other, in one namespace."""
    blocks = [match[3] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if match[2] == "python"]
    blocks = [block for block in blocks if not PYTHON_NEEDS.search(block)]
    if not blocks:
        pytest.skip("no Python that runs offline")
    monkeypatch.chdir(documented_files)
    if any("features/" in block for block in blocks):
        CliRunner().invoke(app, ["inspect", "sweep", "photos", "-o", "features", "--taps", "U-L1-R1-B0-Cross-Q"])
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        assert printed.strip() or "print(" not in block, block
        assert set(re.findall(r"^print\(.*  # (\d+)$", block, re.M)) <= set(re.findall(r"\d+", printed)), block
