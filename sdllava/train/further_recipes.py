"""Recipes without numbers in the papers: open questions, further guidance scales and diffusion families.

S3 is arXiv 2507.07106, S4 its workshop version. This module imports no large library.
"""

from typing import Any

from ..presets import find_preset
from .paper_recipes import TABLE_2_ROWS
from .recipe_rows import (
    CAPTIONS,
    CLIP,
    DOWN_TAP,
    DROPOUT,
    SD15,
    SD21,
    TABLE_2,
    TAP,
    Recipe,
    clip_and_sd,
    finetune,
    one_tap,
    two_stages,
)

FAMILIES = {
    "pixart-alpha": "PixArt-alpha",
    "pixart-sigma": "PixArt-Sigma",
    "sd3-medium": "Stable Diffusion 3 medium",
    "sd35-medium": "Stable Diffusion 3.5 medium",
    "flux-dev": "FLUX.1-dev",
    "flux-schnell": "FLUX.1-schnell",
    "if-m": "DeepFloyd IF-I-M",
    "cleandift-sd15": "CleanDIFT's SD 1.5 (in models/cleandift-sd15, see docs/families.md)",
    "cleandift-sd21": "CleanDIFT's SD 2.1 (in models/cleandift-sd21, see docs/families.md)",
}
"""Presets with recipes."""


def more_scales() -> list[Recipe]:
    """Stage 2 of cross-attention at further scales, with and without dropout of the question."""
    recipes = []
    for scale, dropped in ((2, False), (2, True), (4, True), (6, False), (6, True), (8, False), (8, True)):
        recipes.append(
            finetune(
                f"clip-sd21-cross-attention-s{scale}{'-dropout' if dropped else ''}",
                f"Cross-attention at s = {scale}{', 30% of the questions dropped' if dropped else ''}",
                {"guidance_scales": [scale], **(DROPOUT if dropped else {})},
                TABLE_2,
                f"{CAPTIONS} --leakage --scales {scale}",
                after="clip-sd21-cross-attention",
            )
        )
    return recipes


def cross_model() -> list[Recipe]:
    """SD 1.5 in the papers' place of SD 2.1: their protocol, another training corpus and text encoder."""
    only = one_tap(f"sd15-{TAP.lower()}", SD15, "SD 1.5", TAP, 50, "")
    row = (
        "cross-attention",
        "SD 1.5 and CLIP, cross-attention",
        TABLE_2_ROWS[1][2],
        TABLE_2_ROWS[1][3],
        {0: "", 4: ""},
    )
    return [*only, *clip_and_sd("sd15", SD15, "SD 1.5", row)]


def open_questions() -> list[Recipe]:
    """Several guidance scales, several taps, gates (S3, 6 and appendix E)."""
    fused = {**SD21, **CLIP, "fusion": "cross_attention"}
    scales = {"guidance_scales": [0, 1, 4]}
    several = "(S3, 6): guidance scales 0, 1 and 4 together"
    rows: list[tuple[str, str, dict[str, Any]]] = [
        (
            "guidance-select",
            f"{several}, selected per token by a learned gate",
            {**fused, **scales, "ensemble": "select"},
        ),
        (
            "guidance-attention",
            f"{several}, cross-attention over the tokens of all scales",
            {**fused, **scales, "fusion": "attention_over_maps"},
        ),
        ("guidance-concat", f"{several}, concatenated on channels", {**fused, **scales, "ensemble": "concat"}),
        (
            "layer-ensemble",
            "(S3, appendix E): U-L1 and U-L2 together",
            {**fused, "taps": [TAP, "U-L2-R1-B0-Cross-Q"], "guidance_scales": [4]},
        ),
        (
            "multi-level-fusion",
            "(S3, 6): U-L1 (16 x 16), then U-L2 (32 x 32), one cross-attention each",
            {
                **fused,
                "fusion": "multi_level",
                "taps": [TAP, "U-L2-R1-B0-Cross-Q"],
                "grid_size": 32,
                "guidance_scales": [4],
            },
        ),
        (
            "feature-selection",
            "(S3, 6): each token keeps 2 of 4 taps, by a learned gate",
            {
                **fused,
                "taps": [DOWN_TAP, TAP, "U-L1-R1-B0-Out", "U-L1-R2-B0-Cross-Q"],
                "guidance_scales": [4],
                "ensemble": "select",
                "ensemble_top_k": 2,
            },
        ),
        (
            "gated-fusion",
            "(S3, 6): a learned gate between CLIP and SD 2.1",
            {**fused, "fusion": "gated", "guidance_scales": [4]},
        ),
    ]
    return [
        recipe for name, text, changes in rows for recipe in two_stages(name, f"Open question {text}", changes, TABLE_2)
    ]


def families() -> list[Recipe]:
    """Diffusion only, concatenation and cross-attention with CLIP, of other families at the taps of `presets.py`."""
    recipes = []
    for name, what in FAMILIES.items():
        preset = find_preset(name)
        diffusion = f"models/{name}" if name.startswith("cleandift") else preset.diffusion
        model = {"diffusion": diffusion, **preset.values}
        recipes += one_tap(name, model, what, preset.taps[0], preset.timesteps[0], "")
        for fusion, _, stage_1, changes, _ in TABLE_2_ROWS[:2]:
            row = (fusion, f"{what} and CLIP, {fusion.replace('-attention', ' attention')}", stage_1, changes, {4: ""})
            recipes += clip_and_sd(name, model, what, row)
    return recipes


def follow_up() -> list[Recipe]:
    """Diffusion tokens after CLIP's, so that a follow-up question reuses CLIP's part of the prefix."""
    tokens = {**SD21, **CLIP, "fusion": "concat_tokens", "grid_size": 8, "guidance_scales": [4]}
    text = "576 tokens of CLIP, then 64 of SD 2.1: a follow-up question only computes the 64 and its text"
    return two_stages("concat-tokens", text, tokens, TABLE_2)
