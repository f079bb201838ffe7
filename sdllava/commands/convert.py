"""The command `convert`. Heavy imports happen inside the command."""

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[str, typer.Argument(help="Repository id, id@revision or folder that has only pickled weights.")],
    folder: Annotated[Path, typer.Argument(help="New folder for the same repository with safetensors.")],
) -> None:
    """Rewrite pickled weights as safetensors, in a separate process that reads tensors only."""
    from ..hub.convert import convert

    for name in convert(source, folder):
        typer.echo(f"wrote {folder / name}")
