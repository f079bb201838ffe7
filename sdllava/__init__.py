"""Stable Diffusion as a question-conditioned vision encoder for LLaVA-style vision-language models.

Importing the package imports nothing else. The first use of a public name makes transformers' Auto classes and
`pipeline("visual-question-answering")` know it; `sdllava.register()` does the same where no name is used.
"""

from importlib import import_module
from typing import Any

from .version import __version__

_PUBLIC = {
    "SDLlavaConfig": "configuration",
    "SDLlavaDiffusionConfig": "diffusion_configuration",
    "SDLlavaDiffusionModel": "diffusion",
    "SDLlavaForConditionalGeneration": "modeling_sdllava",
    "SDLlavaImageEncodings": "outputs",
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
        raise AttributeError(f"Module 'sdllava' has no attribute {name!r}.")
    if name != "register":
        import_module("sdllava.registration").register()
    value = getattr(import_module(f"sdllava.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value
