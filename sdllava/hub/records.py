"""Records in a checkpoint's folder, from which the model card is made.

`training.json` has the stages of training, each `results.json` below the folder an evaluation, and `card.json` the
author's own fields, see [`AUTHOR_FIELDS`]. Records hold no local paths.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ..atomic_files import write_json
from ..version import installed_versions

TRAINING_FILE = "training.json"
AUTHOR_FILE = "card.json"
AUTHOR_FIELDS = {
    "name": str,
    "summary": str,
    "license": str,
    "language": list,
    "datasets": list,
    "limits": list,
    "widget": list,
}
"""The fields of `card.json`: name, summary, licence identifier, language codes, data sets, further limits, and example
questions as objects with `src`, the address of an image, and `text`."""


@dataclass
class Records:
    """The records of a checkpoint. What was not recorded is None or empty.

    Args:
        config (`dict`, *optional*): Its `config.json`.
        adapter (`dict`, *optional*): Its `adapter_config.json`.
        stages (`list[dict]`): Stages of training, the first one first.
        results (`list[dict]`): Finished evaluations.
        author (`dict`): The fields of `card.json`.
    """

    config: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    author: dict[str, Any] = field(default_factory=dict)


def read_records(folder: str | os.PathLike, results: Sequence[str | os.PathLike] = ()) -> Records:
    """Read the records of a checkpoint's folder.

    Args:
        folder: The checkpoint's folder.
        results: Folders of further evaluations, in addition to those below `folder`.

    Raises:
        FileNotFoundError: The folder holds no checkpoint, or one of `results` no finished evaluation.
        ValueError: A record is damaged, or `card.json` has an unknown field.
    """
    root = Path(folder)
    config, adapter = _read(root / "config.json"), _read(root / "adapter_config.json")
    if config is None and adapter is None:
        raise FileNotFoundError(
            f"{str(root)!r} holds no checkpoint: it has neither config.json nor adapter_config.json. Give a folder "
            "that a run or save_pretrained wrote."
        )
    author = _read(root / AUTHOR_FILE) or {}
    for name, value in author.items():
        if not isinstance(value, AUTHOR_FIELDS.get(name, ())):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in AUTHOR_FIELDS.items())
            raise ValueError(f"{str(root / AUTHOR_FILE)!r} has the unknown field {name}={value!r}. Use {known}.")
    stages = (_read(root / TRAINING_FILE) or {}).get("stages", [])
    found = [evaluation for place in (root, *results) for evaluation in _evaluations(Path(place), place is not root)]
    return Records(config, adapter, stages, found, author)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}). Restore or delete it.") from error


def _evaluations(folder: Path, required: bool) -> list[dict[str, Any]]:
    paths = [p for p in sorted(folder.rglob("results.json")) if "blind" not in p.relative_to(folder).parts]
    if required and not paths:
        raise FileNotFoundError(f"{str(folder)!r} holds no finished evaluation: it has no results.json.")
    found = [without_paths(_read(path)) for path in paths]
    return [results for results in found if {"benchmark", "metric", "scores"} <= results.keys()]


def without_paths(value: Any) -> Any:
    """A record without local paths: only the last part of each absolute path is kept.

    Args:
        value: JSON values, nested.
    """
    if isinstance(value, dict):
        return {name: without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(entry) for entry in value]
    if isinstance(value, str):
        return " ".join(PurePath(word).name if word.startswith(("/", "~")) else word for word in value.split(" "))
    return value


def record_training(
    folder: str | os.PathLike, stage: str, settings: dict[str, Any], seconds: float, steps: int, processes: int = 1
) -> None:
    """Write `training.json`: the stages of the initial checkpoint (`settings["init_from"]`), then this one.

    Args:
        folder: The run's folder.
        stage: Name of the stage, `"align"` or `"finetune"`.
        settings: The recipe and its hyper-parameters, as JSON values. Those that are None are left out.
        seconds: Wall-clock time of all sessions of the run together.
        steps: Number of optimizer steps.
        processes: Number of processes.
    """
    before = settings.get("init_from")
    earlier = _read(Path(before) / TRAINING_FILE) if before and Path(before).is_dir() else None
    entry = {
        "stage": stage,
        "settings": without_paths({name: value for name, value in settings.items() if value is not None}),
        "hardware": hardware(),
        "processes": processes,
        "seconds": round(seconds, 1),
        "steps": steps,
        "versions": installed_versions(),
    }
    write_json(Path(folder) / TRAINING_FILE, {"stages": [*(earlier or {}).get("stages", []), entry]})


def hardware() -> str:
    """The accelerator of this process, or its processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS)"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
