"""The command `recipes`, and the one-screen help of `train`. Imports no large library, nor do the commands."""

import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

TRAIN_HELP = """\
Usage: sdllava train --config RECIPE [--ARGUMENT VALUE ...]

Train from a recipe: a YAML file, or one of the packaged recipes below. Arguments
win over the recipe. The same command resumes an interrupted run.

  --init_from MODEL          checkpoint, adapter or LLaVA to continue from, or mini
  --train_data FILE          .json, .jsonl, .parquet, .tar, a folder or a repository
  --image_folder FOLDER      where the image paths of the data start
  --check_data true          read and report on all data, do not train
  --output_dir FOLDER        where checkpoints and the final model go
  --num_train_epochs N, --max_steps N, --learning_rate X, --global_batch_size N
  --lora_r N                 rank of LoRA on the language model
  --help-all                 every argument

Your own data:  sdllava train --config own-data/lora --init_from MODEL --train_data FILE
"""


@dataclass(frozen=True)
class RecipeSummary:
    """What `sdllava recipes` lists of a recipe.

    Args:
        name: For `--config`.
        diffusion: The diffusion model's repository, or "none"; "own" where the run's checkpoint determines it.
        vision: The vision encoder's repository, in the same way.
        fusion: A fusion of `SDLlavaConfig`, in the same way.
        description: What it is, with the paper's table and row; in a YAML file, the first comment.
    """

    name: str
    diffusion: str
    vision: str
    fusion: str
    description: str


def summarise(name: str) -> RecipeSummary:
    """The summary of a packaged recipe. The parts of a second stage are those of the first.

    Args:
        name: For example "clip/align".
    """
    from ..train.recipe_loading import find_recipe, list_recipes, load_recipe

    recipe = find_recipe(name)
    values = load_recipe(recipe)
    start = str(values.get("init_from") or "").removeprefix("runs/")
    if start in list_recipes():
        values = {**load_recipe(find_recipe(start)), **values}
    is_own = "diffusion" not in values and "vision" not in values
    unnamed = "own" if is_own else "none"
    if isinstance(recipe, Path):
        description = recipe.read_text(encoding="utf-8").partition("\n")[0].strip("# .")
    else:
        description = recipe.description
    diffusion, vision, fusion = (str(values.get(part) or unnamed) for part in ("diffusion", "vision", "fusion"))
    return RecipeSummary(name, diffusion, vision, fusion, description)


def matches(recipe: RecipeSummary, words: Sequence[str], backbone: str | None, fusion: str | None) -> bool:
    """Whether a recipe matches a search.

    Args:
        recipe: The recipe.
        words: Each must occur in the name or the description. "Table 2" does not match "Table 25".
        backbone: Part of the name of an encoder, such as "sd21", "SDXL", "dino", or "none" for CLIP only.
        fusion: A fusion.
    """
    text = f"{recipe.name} {recipe.description}"
    if not all(re.search(re.escape(word) + (r"(?!\d)" if word[-1:].isdigit() else ""), text, re.I) for word in words):
        return False
    if fusion is not None and fusion.replace("-", "_").lower() != recipe.fusion:
        return False
    if backbone is None:
        return True
    if backbone.lower() == "none":
        return recipe.diffusion == "none"
    wanted = _short(backbone)
    return any(wanted in _short(part.partition("/")[2]) for part in (recipe.diffusion, recipe.vision))


def _short(model: str) -> str:
    """A model's name without punctuation, and with "sd" for Stable Diffusion: "sd21base", "sdxlbase10"."""
    return re.sub(r"[^a-z0-9]", "", model.lower().replace("stable-diffusion", "sd"))


def recipes(
    words: Annotated[
        list[str] | None, typer.Argument(help="Words of the name or the paper's row, such as 'Table 2' or 'open'.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Part of an encoder's name: sd21, sdxl, clip, dino; none: no diffusion model.")
    ] = None,
    fusion: Annotated[
        str | None, typer.Option(help="cross_attention, concat, concat_tokens, gated, or none for a single encoder.")
    ] = None,
) -> None:
    """List the packaged training recipes, with the papers' tables and rows."""
    from rich.console import Console
    from rich.table import Table

    from ..train.recipe_loading import list_recipes

    summaries = [summarise(name) for name in list_recipes()]
    found = [recipe for recipe in summaries if matches(recipe, words or [], backbone, fusion)]
    if not found:
        wanted = [*(words or []), *(option for option in (backbone, fusion) if option)]
        raise ValueError(f"No recipe matches {wanted!r}. Run `sdllava recipes` for all of them.")
    table = Table("recipe", "diffusion", "vision", "fusion", "paper", box=None)
    for recipe in found:
        parts = (part.rpartition("/")[2] for part in (recipe.diffusion, recipe.vision))
        table.add_row(recipe.name, *parts, recipe.fusion, recipe.description)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def train_help(names: Iterable[str]) -> str:
    """One screen of help for `sdllava train`.

    Args:
        names: The packaged recipes.
    """
    families: dict[str, list[str]] = {}
    for folder in sorted({name.partition("/")[0] for name in names}):
        words = folder.split("-")
        families.setdefault("-".join(words[:2]) if words[0] in ("clip", "sd21") else words[0], []).append(folder)
    entries = [f"{family}* ({len(found)})" if found[1:] else found[0] for family, found in families.items()]
    lines = [TRAIN_HELP, "Recipes: `sdllava recipes [WORDS]` lists them by paper row, backbone and fusion."]
    wrapper = textwrap.TextWrapper(80, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join([*lines, *wrapper.wrap(", ".join(entries))])


def complete_recipe(incomplete: str) -> list[Any]:
    """The packaged recipes that begin with what the shell's user has typed."""
    from ..train.recipe_loading import list_recipes

    return [name for name in list_recipes() if name.startswith(incomplete)]
