"""The page as a Space of the Hub: three files, written by `sdllava push --space`."""

import os
from pathlib import Path

from ..version import __version__

APP = '''"""The page of {model}."""

from ..commands.demo import demo

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

Ask about an image, and see where each word of the question looks in Stable Diffusion's cross-attention, and what the
question moves in its features. The model is [{model}](https://huggingface.co/{model}).

Uploads are bounded in size, deleted as soon as they are read, and never kept.
"""


def space_files(model: str) -> dict[str, str]:
    """The files of a Space, by name.

    Args:
        model: the repository of the model, `owner/name`.
    """
    if model.count("/") != 1 or Path(model).exists():
        raise ValueError(f"a Space loads its model from the Hub: give a repository such as owner/name, not {model!r}")
    from importlib.metadata import version

    fields = {"model": model, "title": model.split("/")[1], "gradio": version("gradio")}
    return {
        "app.py": APP.format(**fields),
        "README.md": README.format(**fields),
        "requirements.txt": f"sdllava[demo]=={__version__}\n",
    }


def write_space(folder: str | os.PathLike, model: str) -> None:
    """Write the files of a Space into a folder, which is made."""
    files = space_files(model)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        aside = target / f".{name}.{os.getpid()}"
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, target / name)
