"""The wheel is reproducible, and the audit can be run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("build", reason="the extra dev is not installed")

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.mark.slow
def test_two_builds_give_the_same_wheel(tmp_path):
    """In other folders, with other times of the files and another order of hashes."""
    wheels = []
    shutil.copytree(ROOT / "sdllava", tmp_path / "0" / "sdllava", ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, tmp_path / "0")
    for number in (1, 2):
        folder = shutil.copytree(tmp_path / "0", tmp_path / str(number))
        for path in folder.rglob("*"):
            os.utime(path, (number * 10**9, number * 10**9))
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PYTHONHASHSEED": str(number)}
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        wheels.append(next((folder / "dist").glob("*.whl")))
    assert wheels[0].name == wheels[1].name
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
