"""What is copied to a saved checkpoint, and so to the Hub: the code that loads it where `sdllava` is not installed."""

import os
import shutil
from pathlib import Path

_STAYS = {"__init__.py", "__main__.py", "registration.py"}


def travelling_files() -> list[Path]:
    """The flat modules of the package: every `sdllava/*.py` except the package's own entry points."""
    return sorted(path for path in Path(__file__).parent.glob("*.py") if path.name not in _STAYS)


def save_code(folder: str | os.PathLike) -> None:
    """Copy the modules that a checkpoint needs into its folder, which is created where it is missing."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for source in travelling_files():
        if source.resolve() != (target / source.name).resolve():
            shutil.copyfile(source, target / source.name)
