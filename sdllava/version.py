"""The versions that checkpoints and records of runs hold."""

import platform
from importlib.metadata import PackageNotFoundError, version

__version__ = "0.2.0"

CONFIGURATION_VERSION = 1
"""Raised when a saved configuration means something that an earlier version of the package would misread."""

_PACKAGES = (
    "sdllava",
    "torch",
    "transformers",
    "diffusers",
    "tokenizers",
    "accelerate",
    "datasets",
    "trl",
    "peft",
    "numpy",
)


def installed_versions() -> dict[str, str]:
    """The versions of Python, of this package and of what its results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
