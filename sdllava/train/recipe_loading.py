"""Recipes: the arguments of a training run, in a YAML file or in the table of packaged recipes.

A recipe may name a base, a path relative to its file or the name of a packaged recipe; its own values win. TrlParser
reads everything else. Finding a recipe needs neither torch nor any other large library.
"""

import tempfile
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .machine import fit_to_machine
from .recipe_rows import Recipe
from .recipe_table import RECIPES

RECIPE_FOLDER = Path(__file__).parent / "recipes"


def list_recipes() -> list[str]:
    """The names of the packaged recipes, for example `sd21-captions-s4/align`."""
    files = (path.relative_to(RECIPE_FOLDER).with_suffix("").as_posix() for path in RECIPE_FOLDER.glob("*/*.yaml"))
    return sorted([*RECIPES, *files])


def find_recipe(name: str) -> Path | Recipe:
    """A recipe as a YAML file, or as a row of the table.

    Args:
        name: A path, or the name of a packaged recipe.

    Raises:
        FileNotFoundError: Neither exists. The message names similar recipes.
    """
    if Path(name).is_file():
        return Path(name)
    packaged = name.removesuffix(".yaml")
    if packaged in RECIPES:
        return RECIPES[packaged]
    file = RECIPE_FOLDER / f"{packaged}.yaml"
    if file.is_file():
        return file
    similar = get_close_matches(name, list_recipes(), n=5, cutoff=0.4) or list_recipes()[:5]
    raise FileNotFoundError(
        f"Recipe {name!r} does not exist. Use a YAML file or a packaged recipe, for example {', '.join(similar)}. "
        "Run `sdllava recipes` for all of them."
    )


def find_config(arguments: Sequence[str]) -> Path | Recipe | None:
    """The recipe that command-line arguments name with `--config`, or None without one.

    Args:
        arguments: For example `["--config", "clip/align", "--seed", "1"]`.

    Raises:
        FileNotFoundError: The recipe does not exist.
        ValueError: `--config` is the last argument.
    """
    position = _config_position(arguments)
    return None if position is None else find_recipe(arguments[position])


def load_recipe(recipe: Path | Recipe) -> dict[str, Any]:
    """A recipe merged with its bases, as one flat mapping of argument to value.

    Args:
        recipe: From `find_recipe`.

    Raises:
        FileNotFoundError: A base does not exist.
        ValueError: A file is not a YAML mapping, or the bases form a circle.
    """
    chain: list[str] = []
    values: dict[str, Any] = {}
    while True:
        name = recipe.name if isinstance(recipe, Recipe) else str(recipe.resolve())
        if name in chain:
            names = " -> ".join(Path(p).name for p in [*chain, name])
            raise ValueError(f"Recipe {name!r} is its own base: {names}. Remove one `base:` line.")
        chain.append(name)
        own = dict(recipe.values) if isinstance(recipe, Recipe) else _read_yaml(recipe)
        base = own.pop("base", None)
        values = {**own, **values}
        if base is None:
            return values
        relative = Path() if isinstance(recipe, Recipe) else recipe.resolve().parent / str(base)
        try:
            recipe = relative if relative.is_file() else find_recipe(str(base))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The base {str(base)!r} of {name!r} does not exist. Correct its `base:`."
            ) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"Recipe {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"Recipe {str(path)!r} is not a YAML mapping. Write one `argument: value` per line.")
    return values


def parse_arguments(dataclass_types: Sequence[Any], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Parse `--config RECIPE --flag value ...` with TrlParser; flags win over the recipe.

    What the user does not set is fitted to the machine, see [`~sdllava.train.machine.fit_to_machine`]. Without an
    accelerator `--use_cpu` is added, which the Trainer otherwise requires for bf16.

    Args:
        dataclass_types: The dataclasses to fill, in the order of the returned instances.
        arguments: The command line.

    Raises:
        FileNotFoundError: The recipe or one of its bases does not exist.
        ValueError: The recipe is not valid, or has a key that is not an argument.
    """
    recipe = find_config(arguments)
    values = fit_to_machine({} if recipe is None else load_recipe(recipe), chosen_arguments(arguments))

    import torch
    import yaml
    from trl import TrlParser

    parser = TrlParser(tuple(dataclass_types), prog="sdllava train")
    arguments = list(arguments)
    if not torch.accelerator.is_available() and "--use_cpu" not in arguments:
        arguments.append("--use_cpu")
    position = _config_position(arguments)
    if position is None:
        arguments += ["--config", ""]
        position = len(arguments) - 1
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as merged:
        yaml.safe_dump(values, merged)
        merged.flush()
        arguments[position] = merged.name
        return parser.parse_args_and_config(arguments)


def chosen_arguments(arguments: Sequence[str]) -> set[str]:
    """The names of the arguments that the user sets: flags, and those in a recipe of their own, without its bases.

    Args:
        arguments: The command line.
    """
    flags = {argument.removeprefix("--").partition("=")[0] for argument in arguments if argument.startswith("--")}
    recipe = find_config(arguments)
    is_own = isinstance(recipe, Path) and RECIPE_FOLDER not in recipe.resolve().parents
    return flags | (set(_read_yaml(recipe)) if is_own and isinstance(recipe, Path) else set())


def _config_position(arguments: Sequence[str]) -> int | None:
    """The position of the recipe's name, after `--config`."""
    if "--config" not in arguments:
        return None
    position = list(arguments).index("--config") + 1
    if position == len(arguments):
        raise ValueError("--config has no value. Give a recipe after it.")
    return position
