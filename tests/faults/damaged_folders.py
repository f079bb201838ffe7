"""Damages copies of a folder, and checks that reading each raises one documented error, quickly, in little memory."""

import json
import resource
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import forks
import psutil


@dataclass(frozen=True)
class Case:
    """A damage.

    Args:
        name: Its name in the report.
        source: The undamaged folder.
        damage: Damages a copy of it.
        read: Reads the copy.
        errors: The documented exceptions of `read`.
        is_documented: Whether a message names the place and the fix, from the message and the copy's path.
    """

    name: str
    source: Path
    damage: Callable[[Path], object]
    read: Callable[[Path], object]
    errors: tuple[type[Exception], ...]
    is_documented: Callable[[str, str], bool]


def outcome(case: Case, folder: Path) -> str:
    """Empty for one documented error, else what happened instead."""
    begin = time.process_time()
    try:
        case.read(folder)
        found = "no error"
    except case.errors as error:
        found = "" if case.is_documented(str(error), str(folder)) else f"message: {error}"
    except BaseException as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - begin
    return f"{found} ({seconds:.1f} s)" if found or seconds > 5 else ""


def assert_one_documented_error_each(cases: Iterable[Case], tmp_path: Path) -> None:
    """Read every damaged copy in a forked process: under 5 CPU seconds each, under 1 GB more memory in all."""
    before = psutil.Process().memory_info().rss

    def attempt() -> None:
        failures = []
        for number, case in enumerate(cases):
            folder = Path(shutil.copytree(case.source, tmp_path / str(number)))
            case.damage(folder)
            if found := outcome(case, folder):
                failures.append(f"{case.name}: {found}")
            shutil.rmtree(folder)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        (tmp_path / "report.json").write_text(json.dumps([failures, peak]))

    forks.run(attempt, tmp_path / "log")
    failures, peak = json.loads((tmp_path / "report.json").read_text())
    assert not failures, "\n".join(failures)
    assert peak - before < 1 << 30
