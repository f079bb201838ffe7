"""The record of a run: its settings in its folder. The same command resumes the run; another raises `ValueError`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .atomic_files import write_json


def begin_run(path: Path, settings: dict[str, Any]) -> bool:
    """Record the settings of a new run, or check those of the run that is there.

    Args:
        path: The JSON file in the run's folder.
        settings: What two runs with equal results have in common, as JSON values.

    Returns:
        `bool`: Whether the run resumes.

    Raises:
        ValueError: The folder holds a run with other settings, which are named, or its record is damaged.
    """
    if not path.exists():
        write_json(path, settings)
        return False
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Delete it, or choose another output folder.") from error
    check_settings(found, settings, path.parent)
    return True


def check_settings(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Compare the recorded settings of `folder` with those of this run.

    Raises:
        ValueError: They differ. The message names each difference.
    """
    if different := list(differences(found, json.loads(json.dumps(wanted)))):
        raise ValueError(
            f"{str(folder)!r} was written with other settings: {'; '.join(different)}. Choose another folder, or "
            "delete this one."
        )


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two records, one phrase per field, nested fields with their path."""
    for name in sorted(found.keys() | wanted.keys()):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{name}.")
        elif a != b:
            yield f"{prefix}{name} is {a!r} there and {b!r} here"
