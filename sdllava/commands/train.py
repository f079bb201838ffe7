"""The commands `train`, `merge` and `cache`. Heavy imports happen inside the commands."""

from collections.abc import Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated

import typer

from .options import DType
from .recipes import complete_recipe, train_help
from .reporting import require_packages

TRAIN_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
"""The context settings of `train`, whose arguments TrlParser reads."""

BATCH_SIZES = ("--per_device_train_batch_size", "--per_device_eval_batch_size", "--global_batch_size")


class CacheKind(StrEnum):
    """What a cache holds."""

    latents = "latents"
    vision = "vision"
    conditional = "conditional"


ConfigOption = Annotated[
    str | None, typer.Option("--config", help="A YAML file or a packaged recipe.", autocompletion=complete_recipe)
]


def train(context: typer.Context, config: ConfigOption = None) -> None:
    """Train from a recipe: --config RECIPE [--any_argument VALUE ...]."""
    if "--help" in context.args:
        from ..train.recipe_loading import list_recipes

        typer.echo(train_help(list_recipes()))
        return
    if config is None and not context.args:
        raise typer.BadParameter("Give --config RECIPE, a YAML file or the name of a packaged recipe.")
    arguments = ["--help" if entry == "--help-all" else entry for entry in _checked(context.args, config)]
    from ..train.run import train

    train(arguments)


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
    output: Annotated[str, typer.Option("--output", help="Folder of the cache. An interrupted one resumes.")],
    kind: Annotated[CacheKind, typer.Option(help="latents; vision (and unconditional); conditional.")],
    dtype: Annotated[DType, typer.Option(help="Type of the saved tensors.")] = DType.bfloat16,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 16,
    config: ConfigOption = None,
) -> None:
    """Compute features once that a recipe's run would compute in every epoch. Other arguments are those of train."""
    arguments = _checked(context.args, config)
    from ..train.run import cache

    written = cache(arguments, output, kind.value, dtype.value, batch_size)
    typer.echo(f"{written} keys written to {output}")


def _require_train_packages() -> None:
    require_packages("Training", "train", "trl", "peft", "datasets", "yaml")


def _checked(arguments: Sequence[str], config: str | None) -> list[str]:
    """The arguments for TrlParser, checked as far as possible before it and the model are imported.

    Args:
        arguments: Without `--config`.
        config: The value of `--config`.

    Returns:
        `list[str]`: `--name=value` as two entries.

    Raises:
        FileNotFoundError: The recipe does not exist.
        ValueError: A batch size is not positive.
    """
    _require_train_packages()
    from ..train.recipe_loading import find_config

    parts = (entry.split("=", 1) if entry.startswith("--") else [entry] for entry in arguments)
    checked = [part for entry in parts for part in entry]
    if config is not None:
        checked = ["--config", config, *checked]
    find_config(checked)
    for name, value in pairwise(checked):
        if name in BATCH_SIZES and value.lstrip("-").isdigit() and int(value) < 1:
            raise ValueError(f"{name} is {value}. Use at least 1.")
    return checked
