"""The checkpoint of the wheel: the trained miniature in half precision, with the records for its card."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.atomic_files import atomic_path, write_json, write_text
from sdllava.hub.card import write_card
from sdllava.hub.records import AUTHOR_FILE, TRAINING_FILE
from sdllava.remote_code import travelling_files

_LIMITS = [
    "It only supports rendered scenes. Its answers about other images, such as photographs, have no meaning.",
    "Its language is that of the scenes: about ninety English words, answers of one or two words, and captions.",
]


def _author(checks: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The record from which the card's summary and limits are made."""
    reached = "; ".join(
        f"{name} {', '.join(f'{metric} {value:.3g}' for metric, value in metrics.items())}"
        for name, metrics in checks.items()
    )
    return {
        "name": "sdllava-mini",
        "summary": "The miniature in the package `sdllava`. Its VAE, text-conditional UNet, CLIP and Llama were "
        "trained from scratch on rendered 64x64 scenes, assembled, and trained in the papers' two stages with "
        "`python -m research.miniature train`; `research/miniature/making.md` in the package's repository "
        "describes how. The training below is that of the two stages. Checks of the parts on held-out scenes: "
        f"{reached}.",
        "license": "apache-2.0",
        "language": ["en"],
        "limits": _LIMITS,
    }


def write_checkpoint(folder: str | os.PathLike) -> Path:
    """Write `sdllava-mini/` from the finished second stage.

    The weights are stored in float16 and loaded as float32, in which every CPU computes fast. The code that is copied
    to other checkpoints is left out, because this one is only used with the package.

    Args:
        folder: The folder of a finished `python -m research.miniature train`.

    Returns:
        `Path`: The checkpoint's folder.
    """
    folder = Path(folder)
    source, target = folder / "finetune", folder / "sdllava-mini"
    checks = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    with atomic_path(target) as written:
        SDLlavaForConditionalGeneration.from_pretrained(source).half().save_pretrained(written)
        SDLlavaProcessor.from_pretrained(source).save_pretrained(written)
        for module in travelling_files():
            (written / module.name).unlink(missing_ok=True)
        config = (written / "config.json").read_text(encoding="utf-8")
        write_text(written / "config.json", config.replace('"dtype": "float16"', '"dtype": "float32"'))
        shutil.copyfile(source / TRAINING_FILE, written / TRAINING_FILE)
        write_json(written / AUTHOR_FILE, _author(checks))
        write_card(written)
    return target
