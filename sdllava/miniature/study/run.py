"""Runs the study part by part. A finished part is a JSON file of its numbers, which is read from then on."""

import importlib
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdllava.evaluation.evaluate import weights_fingerprint
from sdllava.evaluation.results import write_json
from sdllava.evaluation.runner import versions
from sdllava.miniature.study.scales import STUDY_SCALES

PARTS = {
    "a": "taps",
    "b": "matching",
    "c": "questions",
    "d": "captions",
    "e": "guidance",
    "f": "similarity",
}
"""Each part and the module that measures it."""
WEIGHTS = ("diffusion/vae", "diffusion/unet", "clip", "llm")


def _finite(value: Any) -> Any:
    """The same with null for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _settings(folder: Path, scale: str) -> dict[str, Any]:
    """What a part's numbers depend on: the weights of the miniature's parts, and the budgets."""
    missing = [name for name in WEIGHTS if weights_fingerprint(folder / name) is None]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no trained {missing[0]}: make the miniature's parts first, with `sdllava mini train`."
        )
    weights = {name: weights_fingerprint(folder / name) for name in WEIGHTS}
    return {"scale": scale, "budgets": asdict(STUDY_SCALES[scale]), "weights": weights}


def finished_part(folder: Path, part: str) -> dict[str, Any] | None:
    """What a finished part measured, or None."""
    file = folder / "study" / f"{part}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _run_part(part: str, folder: Path, scale: str) -> None:
    settings = json.loads(json.dumps(_settings(folder, scale)))
    known = finished_part(folder, part)
    if known is not None:
        changed = [key for key, value in settings.items() if known["settings"][key] != value]
        if changed:
            raise ValueError(
                f"{folder / 'study' / f'{part}.json'} was measured with other {changed[0]}: remove {folder / 'study'} "
                "to measure anew."
            )
        return
    module = importlib.import_module(f"sdllava.miniature.study.{PARTS[part]}")
    started = time.process_time()
    work = folder / "study" / part
    work.mkdir(parents=True, exist_ok=True)
    numbers = module.measure(folder, work, STUDY_SCALES[scale])
    seconds = round(time.process_time() - started)
    found = {"settings": settings, "cpu_seconds": seconds, "versions": versions(), **_finite(numbers)}
    write_json(folder / "study" / f"{part}.json", found)


def run_study(folder: str | os.PathLike, out: str | os.PathLike, scale: str = "mini", parts: tuple[str, ...] = ()):
    """
    Measures the parts that the folder's `study/` does not hold yet, and writes the page of all that it holds.

    Args:
        folder: of the miniature's parts, as `sdllava mini train` leaves them.
        out: folder of `miniature.md` and of its pictures in `miniature/`.
        scale: one of [`~sdllava.miniature.study.scales.STUDY_SCALES`].
        parts: some of `PARTS`; none for all.

    Returns:
        The page's path.

    Raises:
        ValueError: an unknown scale or part, or the folder holds numbers of other weights or budgets.
        FileNotFoundError: a part of the miniature is not there.
    """
    from sdllava.miniature.study.page import write_page

    if scale not in STUDY_SCALES:
        raise ValueError(f"{scale!r} is no scale of the study; the scales are {', '.join(STUDY_SCALES)}.")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"{unknown[0]!r} is no part of the study; the parts are {', '.join(PARTS)}.")
    folder = Path(folder)
    for part in parts or tuple(PARTS):
        _run_part(part, folder, scale)
    found = {part: numbers for part in PARTS if (numbers := finished_part(folder, part))}
    return write_page(found, Path(out))
