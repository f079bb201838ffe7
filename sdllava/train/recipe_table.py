"""All packaged recipes, by section: those of the papers' tables, and further ones without numbers.

A recipe is a stage's shared settings (`recipes/align.yaml`, `recipes/finetune.yaml`) and the few values that make up
its row. S3 is arXiv 2507.07106, S4 its workshop version. This module imports no large library.
"""

from . import further_recipes, paper_recipes
from .recipe_rows import Recipe

SECTIONS: dict[str, list[Recipe]] = {
    "The baselines": paper_recipes.baselines(),
    "SD 2.1 only, unconditional: S3, Figure 3, and the grid of layers and timesteps": paper_recipes.figure_3(),
    "SD 2.1 only, conditioned on the question: S3, 5.1": paper_recipes.question_only(),
    "SD 2.1 and captions: S3, Table 5 (CIDEr without a caption and with the true caption, at test time)": (
        paper_recipes.captions_sd21()
    ),
    "SDXL and captions: S4, Tables 4 to 6; S3, Table 9 (mismatched: with and against another image's caption)": (
        paper_recipes.captions_sdxl()
    ),
    "SD 2.1 and CLIP: S3, Table 2": paper_recipes.table_2(),
    "SD 2.1 and CLIP at further guidance scales: no numbers": further_recipes.more_scales(),
    "SD 1.5 by the same protocol: no numbers": further_recipes.cross_model(),
    "Other diffusion families, by the same protocol: no numbers, untested with real weights": (
        further_recipes.families()
    ),
    "SDXL-LLaVA: S4, Table 7 († with pseudo-captions at test time: LLaVA-B, MMVP)": paper_recipes.sdxl_llava(),
    "Open questions: no numbers": further_recipes.open_questions(),
    "Follow-up questions that reuse the language model's prefix: no numbers": further_recipes.follow_up(),
}
"""The recipes by the section of the documentation."""

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipes in SECTIONS.values() for recipe in recipes}
"""The recipes by name."""
