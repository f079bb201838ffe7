"""The commands `train`, `merge` and `cache`. Heavy imports happen inside, so that help is instant."""

from enum import StrEnum
from typing import Annotated

import typer

from .options import DType

TRAIN_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The context settings of `train`, whose arguments TrlParser reads."""


class CacheKind(StrEnum):
    """What a cache holds."""

    latents = "latents"
    static = "static"
    conditional = "conditional"


def train(context: typer.Context) -> None:
    """Train from a recipe: --config RECIPE [--any_argument VALUE ...]; --help lists every argument."""
    if not context.args:
        raise typer.BadParameter("give --config RECIPE, a YAML file or the name of one that comes with the package")
    _require_train_packages()
    from ..train.run import train

    train(context.args)


def merge(
    adapter: Annotated[str, typer.Argument(help="Folder that a LoRA run saved.")],
    output: Annotated[str, typer.Argument(help="New folder for the merged model and its processor.")],
) -> None:
    """Merge an adapter into the weights of its model."""
    _require_train_packages()
    from ..train.adapters import merge

    merge(adapter, output)
    typer.echo(f"merged {adapter} into {output}")


def cache(
    context: typer.Context,
    output: Annotated[str, typer.Option("--output", help="Folder of the cache; an interrupted one goes on.")],
    kind: Annotated[CacheKind, typer.Option(help="latents; static (and unconditional); conditional.")],
    dtype: Annotated[DType, typer.Option(help="In which tensors are kept.")] = DType.bfloat16,
    batch_size: Annotated[int, typer.Option(help="Images at once.")] = 16,
) -> None:
    """Compute what a recipe's run would compute again and again: --config RECIPE as for train."""
    _require_train_packages()
    from ..train.run import cache

    written = cache(context.args, output, kind.value, dtype.value, batch_size)
    typer.echo(f"{written} keys written to {output}")


def _require_train_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("trl", "peft", "datasets", "yaml") if find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {", ".join(missing)}: pip install "sdllava[train]"')
