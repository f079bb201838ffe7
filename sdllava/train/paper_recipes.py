"""The recipes of the papers' tables and figures, with their numbers.

S3 is arXiv 2507.07106, S4 its workshop version. This module imports no large library.
"""

from .recipe_rows import (
    CAPTIONS,
    CLIP,
    DAGGER,
    DOWN_TAP,
    DROPOUT,
    FIGURE_3,
    PLAIN_CAPTIONS,
    PT_CAPTION,
    SD21,
    SDXL,
    TABLE_2,
    TABLE_7,
    TAP,
    TRUE_CAPTION,
    UNCONDITIONAL,
    UNET_LORA,
    WITHOUT_CAPTION,
    FusionRow,
    Recipe,
    align,
    clip_and_sd,
    finetune,
    one_tap,
)


def baselines() -> list[Recipe]:
    """LLaVA-1.5 and DINO-LLaVA."""
    clip_2 = "S3 Table 2: LLaVA-B 66.5, MMVP 24.7, GQA 62.7, NaturalBench group 14.32; S4 Table 7: BLINK 36.60"
    return [
        align(
            "clip",
            "LLaVA-1.5. CIDEr after this stage: 40.60 (S3 Table 5, CLIP), 37.25 (S4 Table 4, PT-LLaVA)",
            CLIP,
            PLAIN_CAPTIONS,
            f"{PLAIN_CAPTIONS} --write-pseudo-captions pt-llava.jsonl",
        ),
        finetune(
            "clip",
            f"LLaVA-1.5. {clip_2}; S4 Table 4, FT-LLaVA: CIDEr 87.26",
            {},
            f"{TABLE_2},blink",
            CAPTIONS,
            f"{CAPTIONS} --write-pseudo-captions ft-llava.jsonl",
            "--benchmark llava_bench --write-pseudo-captions llava_bench.jsonl",
            "--benchmark mmvp --write-pseudo-captions mmvp.jsonl",
        ),
        align(
            "dino",
            "DINO-LLaVA, a ViT-L/14 at 224 pixels: S4 Table 7",
            {"vision": "facebook/dinov2-large", "vision_image_size": 224},
        ),
        finetune("dino", "DINO-LLaVA. S4 Table 7: LLaVA-B 48.9, MMVP 22.7, BLINK 34.66", {}, TABLE_7),
    ]


FIGURE_3_ROWS: list[tuple[str, str, int, str]] = [
    # tap, timestep, the papers' LLaVA-B, MMVP, BLINK, NaturalBench group
    ("sd21-d-l2-r0-b0-cross-q-t10", DOWN_TAP, 10, ""),
    ("sd21-d-l2-r0-b0-cross-q-t25", DOWN_TAP, 25, ""),
    ("sd21-d-l2-r0-b0-cross-q", DOWN_TAP, 50, "33.4, 17.3, 35.81, 7.11"),
    ("sd21-d-l2-r0-b0-cross-q-t100", DOWN_TAP, 100, ""),
    ("sd21-d-l2-r0-b0-cross-q-t250", DOWN_TAP, 250, ""),
    ("sd21-t10", TAP, 10, "40.0, 22.0, 36.82, 8.89"),
    ("sd21-t25", TAP, 25, ""),
    ("sd21-u-l1-r1-b0-cross-q", TAP, 50, "45.3, 22.7, 37.28, 9.11"),
    ("sd21-t100", TAP, 100, "44.7, 22.0, 37.37, 9.42"),
    ("sd21-t250", TAP, 250, "41.3, 18.0, 37.39, 7.11"),
    ("sd21-t500", TAP, 500, "29.8, 12.7, 36.54, 3.11"),
    ("sd21-u-l1-r1-b0-out", "U-L1-R1-B0-Out", 50, "41.1, 22.0, 37.83, 8.68"),
    ("sd21-u-l1-r2-b0-cross-q", "U-L1-R2-B0-Cross-Q", 50, "42.2, 22.7, 34.87, 8.42"),
    ("sd21-u-l2-r1-b0-cross-q", "U-L2-R1-B0-Cross-Q", 50, "39.0, 22.0, 37.23, 8.95"),
    ("sd21-u-l2-r2-res-out", "U-L2-R2-Res-Out", 50, "34.2, 19.3, 35.65, 6.74"),
]
"""Layers and timesteps; {U-L1, D-L2} x {10, 25, 50, 100, 250} is complete."""


def figure_3() -> list[Recipe]:
    """SD 2.1 as the only encoder, over layers and timesteps (S3, Figure 3)."""
    recipes = []
    for name, tap, timestep, numbers in FIGURE_3_ROWS:
        stated = f": LLaVA-B, MMVP, BLINK, NaturalBench group {numbers}" if numbers else ": no number in the table"
        recipes += one_tap(name, SD21, "SD 2.1", tap, timestep, f". S3 Figure 3{stated}")
    return recipes


def question_only() -> list[Recipe]:
    """SD 2.1 as the only encoder, conditioned on the question (S3, 5.1)."""
    return [
        finetune(
            f"sd21-question-s{scale}",
            f"SD 2.1 only, conditioned on the question at s = {scale} (S3 5.1); stage 1 is "
            "sd21-u-l1-r1-b0-cross-q/align. No number in the tables",
            {"guidance_scales": [scale], "conditioning": "question"},
            FIGURE_3,
            after="sd21-u-l1-r1-b0-cross-q",
        )
        for scale in (0, 4)
    ]


TABLE_5_ROWS: list[tuple[float, str, str]] = [
    # scale, the papers' CIDEr without and with the true caption: all captions kept, 30% dropped
    (1, "S3 Table 5: CIDEr 26.60 without, 38.10 with the true caption", ""),
    (1.5, "S3 Table 5: CIDEr 26.43 without, 43.53 with", "S3 Table 5: CIDEr 29.10 without, 41.72 with"),
    (2, "", ""),
    (
        4,
        "S3 Table 5: CIDEr 24.22 without, 56.50 with; S3 4.3: mismatched 12.97",
        "S3 Table 5: CIDEr 31.48 without, 45.40 with",
    ),
    (6, "", ""),
    (8, "", ""),
]


def _leakage(scale: float) -> str:
    return f"{PLAIN_CAPTIONS} --leakage --scales {scale:g}"


def captions_sd21() -> list[Recipe]:
    """SD 2.1 with true captions over guidance scales (S3, Table 5)."""
    recipes = [
        align(
            "sd21-captions-none",
            "SD 2.1 without captions. S3 Table 5: CIDEr 26.59; S3 Table 8, the same model: 26.20",
            {**SD21, **UNCONDITIONAL},
            WITHOUT_CAPTION,
        )
    ]
    for scale, kept, dropped in TABLE_5_ROWS:
        name, description = f"sd21-captions-s{scale:g}", f"SD 2.1, true captions at s = {scale:g}"
        changes = {**SD21, "guidance_scales": [scale], "conditioning": "caption", "diffusion_prompt": "caption"}
        evaluations = (WITHOUT_CAPTION, TRUE_CAPTION, _leakage(scale))
        own = "No number in the tables"
        recipes.append(align(name, f"{description}. {kept or own}", changes, *evaluations))
        if scale != 1:
            text = f"{description}, 30% dropped. {dropped or own}"
            recipes.append(align(f"{name}-dropout", text, {**changes, **DROPOUT}, *evaluations))
    return recipes


SDXL_CAPTION_ROWS: list[tuple[float, str]] = [
    (1, "S3 Table 9 and S4 Table 6: mismatched CIDEr 7.32"),
    (
        1.5,
        "S4 Table 4: CIDEr 21.93 without, 59.16 with, 33.98 with PT-LLaVA's captions; S3 Table 9 and S4 Table 6: "
        "mismatched 21.39",
    ),
    (4, "S3 Table 9: mismatched CIDEr 63.48, the same digits as S4 Table 6 at 4.5"),
    (4.5, "S4 Table 5: CIDEr 76.05, 28.84 with PT-LLaVA's captions; S4 Table 6: mismatched 63.48"),
    (7, "S4 Table 5: CIDEr 62.00, 21.63 with PT-LLaVA's captions"),
]


def captions_sdxl() -> list[Recipe]:
    """SDXL with true captions over guidance scales (S4, Tables 4 to 6; S3, Table 9)."""
    recipes = []
    for scale, numbers in SDXL_CAPTION_ROWS:
        name, description = f"sdxl-captions-s{scale:g}", f"SDXL, true captions at s = {scale:g}"
        changes = {**SDXL, "guidance_scales": [scale], "conditioning": "caption", "diffusion_prompt": "caption"}
        evaluations = (WITHOUT_CAPTION, TRUE_CAPTION, PT_CAPTION, _leakage(scale))
        recipes.append(align(name, f"{description}. {numbers}", changes, *evaluations))
        if scale == 1.5:
            name, changes = f"{name}-dropout", {**changes, **DROPOUT}
            numbers = "CIDEr 32.42 with PT-LLaVA's captions; S3 Table 9 and S4 Table 6: mismatched 10.39"
            description = f"{description}, 30% dropped. S4 Table 4: {numbers}"
            recipes.append(align(name, description, changes, PT_CAPTION, _leakage(scale)))
    with_captions = f"{CAPTIONS} --diffusion-prompt question+caption --captions"
    recipes.append(
        finetune(
            "sdxl-captions-s1.5-dropout",
            "SDXL-base (FT), CFG = 1.5, 30% dropped. S4 Table 4: CIDEr 80.63 with FT-LLaVA's captions, 78.28 with "
            "PT-LLaVA's at CFG = 1",
            {**DROPOUT, "conditioning": "question"},
            f"{with_captions} ft-llava.jsonl",
            f"{with_captions} pt-llava.jsonl --guidance 1 --output results/pt-llava",
        )
    )
    return recipes


TABLE_2_ROWS: list[FusionRow] = [
    (
        "concat",
        "S3 Table 2, concat",
        "channels concatenated; one stage 1 for every s, with an empty prompt (S3 5.2)",
        {"fusion": "concat"},
        {0: "64.2, 26.7, 63.1, 13.84", 4: "61, 27.3, 63.2, 12.84"},
    ),
    (
        "cross-attention",
        "S3 Table 2, cross-attention",
        "cross-attention with CLIP's tokens as queries; one stage 1 for every s, with an empty prompt (S3 5.2)",
        {"fusion": "cross_attention"},
        {0: "66.8, 26.9, 62.7, 14.79", 4: "63.7, 30.7, 62.5, 15.26"},
    ),
    (
        "cross-attention-256",
        "Cross-attention with 256 queries",
        "cross-attention with CLIP resized to 16 x 16, 256 queries: S3 A.2 read literally",
        {"fusion": "cross_attention", "fusion_grid_size": 16},
        {0: "", 4: ""},
    ),
]


def table_2() -> list[Recipe]:
    """SD 2.1 and CLIP, by fusion (S3, Table 2)."""
    return [recipe for row in TABLE_2_ROWS for recipe in clip_and_sd("sd21", SD21, "SD 2.1", row)]


def sdxl_llava() -> list[Recipe]:
    """SDXL-LLaVA by its prompts in stage 1 (S4, Table 7)."""
    conditional = {**SDXL, "guidance_scales": [1]}
    numbers, lora = "S4 Table 7: LLaVA-B, MMVP, BLINK", "LoRA on the UNet's cross-attention"
    measured = (TABLE_7, *DAGGER)
    return [
        align(
            "sdxl-no-caption",
            "SDXL-LLaVA, No-Cap. in stage 1 (S4 Table 7). SDXL without captions: CIDEr 25.80 (S4 Table 4), 28.30 "
            "(S3 Table 8)",
            {**conditional, "diffusion_prompt": "none"},
            WITHOUT_CAPTION,
        ),
        finetune(
            "sdxl-no-caption",
            f"SDXL-LLaVA, No-Cap., frozen SDXL. {numbers} 41.4, 22.7, 35.9; † 43.1, 22.7",
            {},
            *measured,
        ),
        align(
            "sdxl-gt-caption",
            "SDXL-LLaVA, GT-Cap. in stage 1 (S4 Table 7)",
            {**conditional, "diffusion_prompt": "caption"},
        ),
        finetune(
            "sdxl-gt-caption",
            f"SDXL-LLaVA, GT-Cap., frozen SDXL. {numbers} 40.4, 17.3, 36.42; † 44.4, 19.3",
            {},
            *measured,
        ),
        align(
            "sdxl-noisy-caption",
            "SDXL-LLaVA, Noisy GT-Cap. in stage 1 (S4 Table 7)",
            {**conditional, "diffusion_prompt": "noisy_caption"},
        ),
        finetune(
            "sdxl-noisy-caption",
            "SDXL-LLaVA, Noisy GT-Cap., frozen SDXL. No number in the tables",
            {},
            *measured,
        ),
        finetune(
            "sdxl-no-caption-lora",
            f"SDXL-FT, No-Cap., {lora}. {numbers} 39.3, 22.0, 36.63; † 43.9, 22.0",
            UNET_LORA,
            *measured,
            after="sdxl-no-caption",
        ),
        finetune(
            "sdxl-gt-caption-lora",
            f"SDXL-FT, GT-Cap., {lora}. {numbers} 41.2, 22.0, 36.12; † 46.2, 22.7",
            UNET_LORA,
            *measured,
            after="sdxl-gt-caption",
        ),
        align(
            "sdxl-llava-c",
            "SDXL-LLaVA-c: unconditional and conditional features concatenated, noisy captions (S4 6.1)",
            {**SDXL, "guidance_scales": [0, 1], "ensemble": "concat", "diffusion_prompt": "noisy_caption"},
        ),
        finetune(
            "sdxl-llava-c",
            f"SDXL-LLaVA-c with {lora}. {numbers} 41.2, 21.3, 36.50; † 46.9, 21.3",
            UNET_LORA,
            *measured,
        ),
        align(
            "sdxl-implicit-captioner",
            "The implicit captioner: CLIP's global feature becomes prompt tokens (S4, introduction). No number in the "
            "tables; 8 tokens is our choice",
            {**conditional, **CLIP, "fusion": "none", "implicit_caption_tokens": 8},
        ),
        finetune(
            "sdxl-implicit-captioner",
            f"The implicit captioner, then {lora} (S4, introduction). No number in the tables",
            UNET_LORA,
            *measured,
        ),
    ]
