"""The checkpoint that the package brings: the trained miniature in half precision, with the records of its card."""

import json
import os
import shutil
from pathlib import Path

from sdllava.hub.card import write_card
from sdllava.hub.records import AUTHOR_FILE, TRAINING_FILE
from sdllava.remote_code import travelling_files

_LIMITS = [
    "It knows rendered scenes only: about anything else, a photograph above all, its answers mean nothing.",
    "Its language is the scenes': some ninety English words, answers of one to two words, and captions.",
]


def _author(checks: dict[str, dict[str, float]]) -> dict:
    reached = "; ".join(
        f"{name} {', '.join(f'{metric} {value:.3g}' for metric, value in metrics.items())}"
        for name, metrics in checks.items()
    )
    return {
        "name": "sdllava-mini",
        "summary": "The miniature that the package `sdllava` brings: VAE, text-conditional UNet, CLIP and Llama were "
        "trained from nothing on rendered 64x64 scenes, put together, and trained in the papers' two stages, by the "
        "code of `sdllava mini train`; `docs/making.md` in the package's repository tells how, and the training below "
        f"is that of the stages alone. What the parts reached on held-out scenes: {reached}.",
        "license": "apache-2.0",
        "language": ["en"],
        "limits": _LIMITS,
    }


def write_checkpoint(folder: str | os.PathLike) -> Path:
    """Write `sdllava-mini/` from the finished second stage.

    The weights are kept in float16 and read back as float32, which every CPU computes fast. The code that otherwise
    travels with a checkpoint is left out, as this one never travels without the package.

    Args:
        folder: of a finished `sdllava mini train`.
    """
    from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor

    folder = Path(folder)
    source, target, aside = folder / "finetune", folder / "sdllava-mini", folder / "sdllava-mini.part"
    shutil.rmtree(aside, ignore_errors=True)
    SDLlavaForConditionalGeneration.from_pretrained(source).half().save_pretrained(aside)
    SDLlavaProcessor.from_pretrained(source).save_pretrained(aside)
    for name in (path.name for path in travelling_files()):
        (aside / name).unlink(missing_ok=True)
    config = (aside / "config.json").read_text(encoding="utf-8").replace('"dtype": "float16"', '"dtype": "float32"')
    (aside / "config.json").write_text(config, encoding="utf-8")
    shutil.copyfile(source / TRAINING_FILE, aside / TRAINING_FILE)
    checks = json.loads((folder / "checks.json").read_text(encoding="utf-8"))
    (aside / AUTHOR_FILE).write_text(json.dumps(_author(checks), indent=2) + "\n", encoding="utf-8")
    write_card(aside)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    return target
