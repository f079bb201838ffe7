"""The record of a run: its settings in its folder. The same command resumes the run; another raises `ValueError`.

A second process raises `BlockingIOError` while a run writes to its folder.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .atomic_files import reported, write_json


@contextmanager
def locked(folder: str | os.PathLike, process: int = 0) -> Iterator[None]:
    """Hold the lock of an output folder while the block runs. The operating system releases that of a killed process.

    Args:
        folder: The folder, created where it is missing.
        process: The number of this process, where several share the folder: each holds a lock of its own.

    Raises:
        BlockingIOError: Another process holds the lock. The message names its id and host.
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    lock, owner = FileLock(folder / f".lock-{process}", timeout=0), folder / f".owner-{process}"
    try:
        with reported(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except Timeout:
        name = owner.read_text(encoding="utf-8") if owner.is_file() else ""
        holder = name or "another process"  # which has not written its name yet
        raise BlockingIOError(
            f"{str(folder)!r} is in use by {holder}. Wait for it to end, or choose another output folder."
        ) from None
    try:
        with reported(folder):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def is_lock(path: Path) -> bool:
    """Whether a file belongs to the lock of its folder, not to the run."""
    return path.name.startswith((".lock-", ".owner-"))


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
    found = read_run(path)
    if found is None:
        write_json(path, settings)
        return False
    check_settings(found, settings, path.parent)
    return True


def read_run(path: Path) -> dict[str, Any] | None:
    """The recorded settings of a run, None where there is no record.

    Raises:
        ValueError: The record is damaged.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        reason = "it is not a JSON object"
    except ValueError as error:
        reason = str(error)
    raise ValueError(f"{str(path)!r} is damaged ({reason}). Delete it, or choose another output folder.")


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
