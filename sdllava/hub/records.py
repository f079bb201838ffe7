"""What a run leaves in its folder for the model card, and reading it back.

`training.json` (the stages of training), any `results.json` below the folder (evaluations), and `card.json` (the
author's own words, see [`AUTHOR_FIELDS`]). Paths of a machine never get into them.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

TRAINING_FILE = "training.json"
AUTHOR_FILE = "card.json"
AUTHOR_FIELDS = {"name": str, "summary": str, "license": str, "language": list, "datasets": list, "limits": list}
"""What `card.json` may hold: a name, a summary, a licence's identifier, language codes, data sets, further limits."""

_PACKAGES = ("sdllava", "torch", "transformers", "diffusers", "trl", "peft", "datasets", "accelerate")


@dataclass
class Records:
    """What is known of a checkpoint; what was not recorded is None or empty."""

    config: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    author: dict[str, Any] = field(default_factory=dict)


def read_records(folder: str | os.PathLike, results: Sequence[str | os.PathLike] = ()) -> Records:
    """Everything that a folder records.

    Args:
        results: folders of further evaluations, beside those below `folder`.

    Raises:
        FileNotFoundError: the folder holds no checkpoint, or one of `results` no finished evaluation.
        ValueError: a record is damaged, or `card.json` has a field that is not known.
    """
    root = Path(folder)
    config, adapter = _read(root / "config.json"), _read(root / "adapter_config.json")
    if config is None and adapter is None:
        raise FileNotFoundError(f"{root} holds no checkpoint (no config.json and no adapter_config.json)")
    author = _read(root / AUTHOR_FILE) or {}
    for name, value in author.items():
        if not isinstance(value, AUTHOR_FIELDS.get(name, ())):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in AUTHOR_FIELDS.items())
            raise ValueError(f"{root / AUTHOR_FILE}: {name}={value!r} is no field of a card: {known}")
    stages = (_read(root / TRAINING_FILE) or {}).get("stages", [])
    found = [evaluation for place in (root, *results) for evaluation in _evaluations(Path(place), place is not root)]
    return Records(config, adapter, stages, found, author)


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _evaluations(folder: Path, required: bool) -> list[dict[str, Any]]:
    paths = [p for p in sorted(folder.rglob("results.json")) if "blind" not in p.relative_to(folder).parts]
    if required and not paths:
        raise FileNotFoundError(f"{folder} holds no finished evaluation (no results.json)")
    found = [public(_read(path)) for path in paths]
    return [results for results in found if {"benchmark", "metric", "scores"} <= results.keys()]


def public(value: Any) -> Any:
    """A record without the paths of a machine: of every absolute path, only the last part is kept."""
    if isinstance(value, dict):
        return {name: public(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [public(entry) for entry in value]
    if isinstance(value, str):
        return " ".join(PurePath(word).name if word.startswith(("/", "~")) else word for word in value.split(" "))
    return value


def record_training(
    folder: str | os.PathLike, stage: str, settings: dict[str, Any], seconds: float, steps: int, processes: int = 1
) -> None:
    """Write `training.json`: this stage, behind those of the checkpoint that it went on from (`settings["init_from"]`).

    Args:
        stage (`str`): its name, `"align"` or `"finetune"`.
        settings (`dict`): the recipe and its hyper-parameters, as JSON values; None is left out.
        seconds (`float`): wall-clock time of all sessions together.
        steps (`int`): optimizer steps.
    """
    before = settings.get("init_from")
    earlier = _read(Path(before) / TRAINING_FILE) if before and Path(before).is_dir() else None
    entry = {
        "stage": stage,
        "settings": public({name: value for name, value in settings.items() if value is not None}),
        "hardware": hardware(),
        "processes": processes,
        "seconds": round(seconds, 1),
        "steps": steps,
        "versions": _versions(),
    }
    target = Path(folder) / TRAINING_FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_suffix(".unfinished")
    aside.write_text(json.dumps({"stages": [*(earlier or {}).get("stages", []), entry]}, indent=2) + "\n")
    os.replace(aside, target)


def hardware() -> str:
    """The accelerator of this process, or its processor."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return "Apple GPU (MPS)"
    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
