"""Runs the study part by part. The numbers of a finished part are saved as JSON and not measured again."""

import importlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdllava.atomic_files import write_json
from sdllava.run_records import begin_run, check_settings
from sdllava.version import installed_versions

from ..scales import MMDIT_TOWER, TOWER
from .page import TITLES, write_page
from .scales import STUDY_SCALES
from .systems_page import TITLES as SYSTEMS_TITLES
from .systems_page import write_systems_page
from .transformer_page import TITLES as TRANSFORMER_TITLES
from .transformer_page import write_transformer_page
from .weights import part_hash


@dataclass(frozen=True)
class StudyPart:
    """A part of the study.

    Args:
        module: The module that measures it.
        budgets: The fields of its budgets in [`~research.miniature.study.scales.StudyScale`].
        weights: The miniature's parts that it reads.
        more_noise: The number of further noise maps with which its claims are measured.
        named_only: Whether it only runs where it is named, because it takes many hours or needs an optional part.
        function: The function of the module.
    """

    module: str
    budgets: tuple[str, ...]
    weights: tuple[str, ...] = ("diffusion/vae", "diffusion/unet", "diffusion/text_encoder", "clip")
    more_noise: int = 0
    named_only: bool = False
    function: str = "measure"


TRAINED_ON = (*StudyPart.weights, "llm")
TRANSFORMER = ("mmdit/vae", "mmdit/transformer", "mmdit/text_encoder", "clip")
PARTS = {
    "a": StudyPart("taps", ("readout",), more_noise=2),
    "b": StudyPart("matching", ("match_items", "match_trials")),
    "c": StudyPart("questions", ("align", "finetune", "questions", "heads"), TRAINED_ON),
    "d": StudyPart("captions", ("captions", "described", "leakage"), TRAINED_ON),
    "e": StudyPart("guidance", ("answers",), more_noise=2),
    "f": StudyPart("similarity", ("pairs", "groups", "group_size"), more_noise=2),
    "g": StudyPart(
        "systems",
        ("align", "systems", "questions", "heads"),
        TRAINED_ON,
        named_only=True,
        function="measure_fusions",
    ),
    "h": StudyPart("transformer", ("readout", "transformer"), TRANSFORMER, named_only=True),
    "i": StudyPart("transformer", ("match_items",), TRANSFORMER, named_only=True, function="measure_matching"),
    "j": StudyPart(
        "transformer",
        ("align", "finetune", "questions", "heads"),
        (*TRANSFORMER, "llm"),
        named_only=True,
        function="measure_questions",
    ),
    "k": StudyPart(
        "transformer",
        ("captions", "described", "leakage"),
        (*TRANSFORMER, "llm"),
        named_only=True,
        function="measure_captions",
    ),
    "l": StudyPart(
        "systems",
        ("align", "systems", "questions", "described", "heads"),
        TRAINED_ON,
        named_only=True,
        function="measure_workshop",
    ),
}


def _finite(value: Any) -> Any:
    """The same value with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(part: StudyPart, folder: Path, scale: str) -> dict[str, Any]:
    """The settings on which a part's numbers depend: its budgets, and the weights of the miniature's parts."""
    weights = {name: part_hash(folder, name) for name in part.weights}
    budgets = asdict(STUDY_SCALES[scale])
    settings: dict[str, Any] = {"scale": scale, "weights": weights}
    settings["budgets"] = {name: budgets[name] for name in part.budgets}
    if "llm" in part.weights:
        settings["tower"] = MMDIT_TOWER if part.module == "transformer" else TOWER
    return json.loads(json.dumps(settings))


def _checks(part: StudyPart, folder: Path) -> dict[str, dict[str, float]]:
    """The checks of the miniature's parts that this one reads, and of those that train or judge the UNet."""
    file = folder / "checks.json"
    checks = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    read = {"judge", "prompts", *(Path(name).name for name in part.weights)}
    return {name: reached for name, reached in checks.items() if name in read}


def finished_part(folder: Path, part: str) -> dict[str, Any] | None:
    """The numbers of a finished part, or None."""
    file = folder / "study" / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _measure(name: str, folder: Path, work: Path, scale: str) -> dict[str, Any]:
    """A part's numbers, and the CPU seconds of all runs that measured it."""
    module = importlib.import_module(f"research.miniature.study.{PARTS[name].module}")
    file = work / "cpu_seconds.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else 0
    measure = getattr(module, PARTS[name].function)
    started = time.process_time()
    try:
        numbers = measure(folder, work, STUDY_SCALES[scale])
        for seed in range(1, 1 + PARTS[name].more_noise):
            again = measure(folder, work, STUDY_SCALES[scale], seed)
            for claim, other in zip(numbers["claims"], again["claims"], strict=True):
                claim.setdefault("under_other_noise", []).append(other["difference"])
    finally:
        spent = before + round(time.process_time() - started)
        write_json(file, spent)
    return {"cpu_seconds": spent, **numbers}


def _check_finished(name: str, folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if a finished part was measured with other weights or budgets."""
    if finished := finished_part(folder, name):
        check_settings(finished["settings"], settings, folder / "study" / f"{name}.json")


def _run_part(name: str, folder: Path, settings: dict[str, Any]) -> None:
    """Measure a part unless it is finished."""
    work, finished = folder / "study" / name, folder / "study" / f"{name}.json"
    if finished.exists():
        return
    begin_run(work / "settings.json", settings)
    numbers = _measure(name, folder, work, settings["scale"])
    measured = {"settings": settings, "checks": _checks(PARTS[name], folder), "versions": installed_versions()}
    write_json(finished, {**measured, **_finite(numbers)})


def run_study(
    folder: str | os.PathLike, out: str | os.PathLike, scale: str = "mini", parts: tuple[str, ...] = ()
) -> list[Path]:
    """Measure the parts that are not finished, and write the pages of all finished parts.

    Args:
        folder: The folder of the miniature's parts. Numbers are saved in its `study/`.
        out: The folder of `study.md`, `systems.md`, `mmdit.md`, their numbers and `figures/`.
        scale: One of [`~research.miniature.study.scales.STUDY_SCALES`].
        parts: Some of [`PARTS`]. Empty for all that do not have to be named.

    Returns:
        `list[Path]`: The pages of the UNet's study, of fusions and S4's systems, and of the diffusion transformer's.

    Raises:
        ValueError: The scale or a part is unknown, or the folder has numbers of other weights or budgets.
        FileNotFoundError: A part of the miniature is missing.
    """
    if scale not in STUDY_SCALES:
        raise ValueError(f"Scale {scale!r} of the study is unknown. Use one of {', '.join(STUDY_SCALES)}.")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"Part {unknown[0]!r} of the study is unknown. Use one of {', '.join(PARTS)}.")
    folder = Path(folder)
    chosen = parts or tuple(part for part in PARTS if not PARTS[part].named_only)
    on_page = [part for part in PARTS if part in chosen or finished_part(folder, part)]
    settings = {part: _settings(PARTS[part], folder, scale) for part in on_page}
    for part in on_page:
        _check_finished(part, folder, settings[part])
    for part in chosen:
        _run_part(part, folder, settings[part])
    found = {part: numbers for part in PARTS if (numbers := finished_part(folder, part))}
    pages = []
    for write, titles in (
        (write_page, TITLES),
        (write_systems_page, SYSTEMS_TITLES),
        (write_transformer_page, TRANSFORMER_TITLES),
    ):
        if on_it := {part: numbers for part, numbers in found.items() if part in titles}:
            pages.append(write(on_it, Path(out)))
    return pages
