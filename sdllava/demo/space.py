"""The demo page as a Space on the Hub: three files, written by `sdllava push --space`."""

import os
from importlib.metadata import version
from pathlib import Path

from ..atomic_files import write_text
from ..version import __version__

APP = '''"""The demo page of {model}."""

from sdllava.commands.demo import demo

demo(model="{model}", host="0.0.0.0", port=7860)
'''
README = """---
title: {title}
emoji: 🔍
colorFrom: indigo
colorTo: green
sdk: gradio
sdk_version: "{gradio}"
app_file: app.py
models:
  - {model}
---

Ask about an image. The page shows the answer, the attention map of each word of the question in Stable Diffusion's
cross-attention, and the effect of the question on its features. The model is
[{model}](https://huggingface.co/{model}).

Uploads are limited in size, and deleted after ten minutes.
"""


def space_files(model: str) -> dict[str, str]:
    """The files of a Space by name.

    Args:
        model: Repository id of the model, `owner/name`.

    Raises:
        ValueError: `model` is not a repository id.
    """
    if model.count("/") != 1 or Path(model).exists():
        raise ValueError(f"A Space cannot load its model from {model!r}. Give a repository on the Hub as owner/name.")
    fields = {"model": model, "title": model.split("/")[1], "gradio": version("gradio")}
    return {
        "app.py": APP.format(**fields),
        "README.md": README.format(**fields),
        "requirements.txt": f"sdllava[demo]=={__version__}\n",
    }


def write_space(folder: str | os.PathLike, model: str) -> None:
    """Write the files of a Space into a folder, which is created.

    Raises:
        ValueError: `model` is not a repository id.
    """
    for name, text in space_files(model).items():
        write_text(Path(folder) / name, text)
