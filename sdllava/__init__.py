"""Stable Diffusion as a question-aware visual encoder for LLaVA-style vision-language models.

Importing the package makes transformers' Auto classes and `pipeline("visual-question-answering")` know it. Only the
`sdllava` command, which must answer `--help` at once, puts that off until it needs a model (`sdllava.register()`).
"""

import os
import sys
from typing import Any

from .version import __version__

_PUBLIC = {
    "SDLlavaConfig": "configuration",
    "SDLlavaDiffusionConfig": "configuration",
    "SDLlavaDiffusionModel": "diffusion",
    "SDLlavaForConditionalGeneration": "modeling_sdllava",
    "SDLlavaImageEncodings": "modeling_sdllava",
    "SDLlavaModel": "modeling_sdllava",
    "SDLlavaProcessor": "processors",
    "VisualQuestionAnsweringPipeline": "pipeline",
    "list_taps": "taps",
    "mini_path": "miniature",
    "register": "registration",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sdllava' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sdllava.{_PUBLIC[name]}"), name)


if os.path.splitext(os.path.basename(sys.argv[0] if sys.argv else ""))[0] not in ("sdllava", "-m"):
    from .registration import register

    register()
