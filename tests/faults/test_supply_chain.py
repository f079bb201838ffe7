"""The wheel is reproducible, and the audit can be run."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("build", reason="the extra dev is not installed")

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")


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


def test_the_audit_says_what_was_not_looked_up():
    report = runpy.run_path(str(ROOT / "scripts" / "audit.py"))["report"]
    known = {"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
    clean, skipped = {"name": "b", "version": "1", "vulns": []}, {"name": "c", "skip_reason": "not found"}
    assert report({"dependencies": [clean]}) == ("1 of 1 packages looked up, 0 vulnerabilities.", 0)
    assert report({"dependencies": [skipped, skipped]}) == (
        "Skipped: the database that pip-audit reaches has none of the 2 packages.",
        0,
    )
    text, status = report({"dependencies": [known, skipped]})
    assert text.splitlines() == [
        "a 1: CVE-1, fixed in 2",
        "1 of 2 packages looked up, 1 vulnerabilities.",
        "Not looked up: c",
    ]
    assert status == 1
