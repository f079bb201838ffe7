"""Runs the study part by part. A finished part is a JSON file of its numbers, which is read from then on."""

import importlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdllava.evaluation.evaluate import weights_fingerprint
from sdllava.evaluation.results import write_json
from sdllava.evaluation.runner import versions

from ..scales import TOWER
from .scales import STUDY_SCALES


@dataclass(frozen=True)
class StudyPart:
    """The module that measures a part, the budgets that it spends, the miniature's parts that it reads, and under how
    many more noise maps its claims are measured.
    """

    module: str
    budgets: tuple[str, ...]
    weights: tuple[str, ...] = ("diffusion/vae", "diffusion/unet", "diffusion/text_encoder", "clip")
    more_noise: int = 0


TRAINED_ON = (*StudyPart.weights, "llm")
PARTS = {
    "a": StudyPart("taps", ("readout",), more_noise=2),
    "b": StudyPart("matching", ("match_items", "match_trials")),
    "c": StudyPart("questions", ("align", "finetune", "questions", "heads"), TRAINED_ON),
    "d": StudyPart("captions", ("captions", "described", "leakage"), TRAINED_ON),
    "e": StudyPart("guidance", ("asked",), more_noise=2),
    "f": StudyPart("similarity", ("pairs", "groups", "group_size"), more_noise=2),
}


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(part: StudyPart, folder: Path, scale: str) -> dict[str, Any]:
    """What a part's numbers depend on: the budgets, and the weights of the miniature's parts."""
    weights = {name: weights_fingerprint(folder / name) for name in part.weights}
    if missing := [name for name, found in weights.items() if found is None]:
        raise FileNotFoundError(
            f"{folder} holds no trained {missing[0]}: make the miniature's parts first, with `sdllava mini train`."
        )
    budgets = asdict(STUDY_SCALES[scale])
    settings = {"scale": scale, "weights": weights, "budgets": {name: budgets[name] for name in part.budgets}}
    if "llm" in part.weights:
        settings["tower"] = TOWER
    return json.loads(json.dumps(settings))


def _checks(part: StudyPart, folder: Path) -> dict[str, dict[str, float]]:
    """What the miniature's parts that this one reads, and those that teach or judge the UNet, had reached."""
    file = folder / "checks.json"
    checks = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    read = {"judge", "prompts", *(Path(name).name for name in part.weights)}
    return {name: reached for name, reached in checks.items() if name in read}


def finished_part(folder: Path, part: str) -> dict[str, Any] | None:
    """What a finished part measured, or None."""
    file = folder / "study" / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _measure(name: str, folder: Path, work: Path, scale: str) -> dict[str, Any]:
    """A part's numbers, and the CPU seconds of all the runs that it took."""
    module = importlib.import_module(f"research.miniature.study.{PARTS[name].module}")
    file = work / "cpu_seconds.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else 0
    started = time.process_time()
    try:
        numbers = module.measure(folder, work, STUDY_SCALES[scale])
        for seed in range(1, 1 + PARTS[name].more_noise):
            again = module.measure(folder, work, STUDY_SCALES[scale], seed)
            for claim, other in zip(numbers["claims"], again["claims"], strict=True):
                claim.setdefault("under_other_noise", []).append(other["difference"])
    finally:
        spent = before + round(time.process_time() - started)
        write_json(file, spent)
    return {"cpu_seconds": spent, **numbers}


def _refuse_other_settings(name: str, folder: Path, settings: dict[str, Any]) -> None:
    """Raises:
    ValueError: what an earlier run left of a part is of other weights or budgets.
    """
    record = folder / "study" / name / "settings.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else settings
    if changed := [key for key, value in settings.items() if known.get(key) != value]:
        raise ValueError(
            f"{record.parent} was measured with other {changed[0]}: remove it and {name}.json to measure anew."
        )


def _run_part(name: str, folder: Path, settings: dict[str, Any]) -> None:
    """Measures a part unless it is finished."""
    work, finished = folder / "study" / name, folder / "study" / f"{name}.json"
    if finished.exists():
        return
    write_json(work / "settings.json", settings)
    numbers = _measure(name, folder, work, settings["scale"])
    measured = {"settings": settings, "checks": _checks(PARTS[name], folder), "versions": versions()}
    write_json(finished, {**measured, **_finite(numbers)})


def run_study(folder: str | os.PathLike, out: str | os.PathLike, scale: str = "mini", parts: tuple[str, ...] = ()):
    """Measures the parts that the folder's `study/` does not hold yet, and writes the page of all that it holds.

    Args:
        folder: of the miniature's parts, as `sdllava mini train` leaves them.
        out: folder of `miniature.md` and of its pictures in `miniature/`.
        scale: one of [`~research.miniature.study.scales.STUDY_SCALES`].
        parts: some of `PARTS`; none for all.

    Returns:
        The page's path.

    Raises:
        ValueError: an unknown scale or part, or the folder holds numbers of other weights or budgets.
        FileNotFoundError: a part of the miniature is not there.
    """
    from .page import write_page

    if scale not in STUDY_SCALES:
        raise ValueError(f"{scale!r} is no scale of the study; the scales are {', '.join(STUDY_SCALES)}.")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"{unknown[0]!r} is no part of the study; the parts are {', '.join(PARTS)}.")
    folder = Path(folder)
    asked = parts or tuple(PARTS)
    shown = [part for part in PARTS if part in asked or finished_part(folder, part)]
    settings = {part: _settings(PARTS[part], folder, scale) for part in shown}
    for part in shown:
        _refuse_other_settings(part, folder, settings[part])
    for part in asked:
        _run_part(part, folder, settings[part])
    found = {part: numbers for part in PARTS if (numbers := finished_part(folder, part))}
    return write_page(found, Path(out))
