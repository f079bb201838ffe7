"""The code that travels with a checkpoint, so that it loads where this package is not installed."""

import os
import shutil
from pathlib import Path

CODE_FILES = (
    "attention_maps.py",
    "backbones.py",
    "chat_templates.py",
    "checkpoints.py",
    "remote_code.py",
    "compiled_pass.py",
    "components.py",
    "configuration.py",
    "diffusion.py",
    "diffusion_loading.py",
    "fusion.py",
    "image_loading.py",
    "modeling_sdllava.py",
    "outputs.py",
    "pipeline.py",
    "processors.py",
    "small_maps.py",
    "repositories.py",
    "taps.py",
    "version.py",
)


def save_code(folder: str | os.PathLike) -> None:
    """Copy the modules that a checkpoint needs into its folder."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in CODE_FILES:
        source = Path(__file__).with_name(name)
        if source.exists() and source.resolve() != (target / name).resolve():
            shutil.copyfile(source, target / name)
