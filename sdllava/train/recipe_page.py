"""The page `docs/recipes.md`, generated from the table of recipes: `python -m sdllava.train.recipe_page` prints it."""

from .recipe_table import SECTIONS

INTRODUCTION = """\
# Recipes

This page is generated from `sdllava/train/recipe_table.py`: `python -m sdllava.train.recipe_page > docs/recipes.md`.

The numbers are the papers' (S3: arXiv 2507.07106; S4: its workshop version), not ours. SD 2.x is read from its
remaining mirror on the Hub. `sdllava train --config RECIPE` writes the model to `runs/RECIPE`. The commands give the
scores that the row names. LLaVA-Bench needs `--judge` ([evaluation](evaluation.md)), `captions` the folder of COCO's
images. Commands of `clip/align` and `clip/finetune` write the files `pt-llava.jsonl`, `ft-llava.jsonl`,
`llava_bench.jsonl` and `mmvp.jsonl`.

A trained model is evaluated at several guidance scales with
`sdllava evaluate --model runs/clip-sd21-cross-attention-s4/finetune --benchmark mmvp --sweep guidance=0,2,4,6,8`.
`sdllava evaluate --compare results/runs-sd21-[dtu]* --heatmap grid.png` draws the scores of layers and
timesteps after the commands of S3, Figure 3.
"""


def documentation() -> str:
    """The page `docs/recipes.md`."""
    lines = [INTRODUCTION]
    for title, recipes in SECTIONS.items():
        lines += [f"## {title}", "", "| recipe | description, and the papers' numbers | evaluation |", "|---|---|---|"]
        for recipe in recipes:
            commands = "<br>".join(f"`{command}`" for command in recipe.commands) or "after stage 2"
            lines.append(f"| `{recipe.name}` | {recipe.description} | {commands} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(documentation(), end="")
