"""The papers' result rows, for comparison with other runs. S3 is arXiv 2507.07106, S4 its workshop version.

Known errors in the papers are kept as printed: the CLIP rows of S3's Table 1 (S4's Table 3) have a Winoground group
score above the image score, which the definition rules out (the columns are probably swapped); S3's Table 9 "s=4"
equals S4's "CFG 4.5" in every digit; S3's 26.9 on MMVP is not a multiple of 1/150; two BLINK cells of S4's CLIP row are
not attainable fractions.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedRow:
    """One row of a table: the table, the benchmark, the model's name there, and its scores."""

    source: str
    benchmark: str
    model: str
    scores: dict[str, float]


CAPTIONS = ("ROUGE-L", "CIDEr", "BLEU-4", "SPICE")
MMVP_VLM = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural Characteristics",
    "Texts",
    "Viewpoint and Perspective",
    "average",
)
BLINK_S4 = (
    "Visual_Similarity",
    "Counting",
    "Relative_Depth",
    "Jigsaw",
    "Art_Style",
    "Functional_Correspondence",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Object_Localization",
    "Visual_Correspondence",
    "Multi-view_Reasoning",
    "Relative_Reflectance",
    "Forensic_Detection",
    "IQ_Test",
)
NATURALBENCH = ("Q_Acc", "I_Acc", "G_Acc")

# (source, [(benchmark, columns), ...] in the order of the numbers, rows "model | numbers"); "-" is an empty cell
TABLES: list[tuple[str, list[tuple[str, tuple[str, ...]]], str]] = [
    (
        "S3 Figure 3",
        [
            ("llava_bench", ("all",)),
            ("mmvp", ("pair_accuracy",)),
            ("blink", ("macro",)),
            ("naturalbench", NATURALBENCH),
        ],
        """
        LLaVA-v1.5-7B | 66.5 24.7 36.60 37.70 43.80 14.32
        SD 2.1 D-L2-R0-B0-Cross-Q, T=50 | 33.4 17.3 35.81 26.71 34.87 7.11
        SD 2.1 U-L1-R1-B0-Cross-Q, T=50 | 45.3 22.7 37.28 30.23 37.05 9.11
        SD 2.1 U-L1-R1-B0-Out, T=50 | 41.1 22.0 37.83 28.82 37.05 8.68
        SD 2.1 U-L1-R2-B0-Cross-Q, T=50 | 42.2 22.7 34.87 31.13 37.87 8.42
        SD 2.1 U-L2-R1-B0-Cross-Q, T=50 | 39.0 22.0 37.23 28.82 35.71 8.95
        SD 2.1 U-L2-R2-Res-Out, T=50 | 34.2 19.3 35.65 27.68 35.68 6.74
        SD 2.1 U-L1-R1-B0-Cross-Q, T=10 | 40.0 22.0 36.82 30.29 36.61 8.89
        SD 2.1 U-L1-R1-B0-Cross-Q, T=100 | 44.7 22.0 37.37 30.87 38.45 9.42
        SD 2.1 U-L1-R1-B0-Cross-Q, T=250 | 41.3 18.0 37.39 26.82 34.50 7.11
        SD 2.1 U-L1-R1-B0-Cross-Q, T=500 | 29.8 12.7 36.54 16.87 27.61 3.11
        """,
    ),
    (
        "S3 Table 2",
        [
            ("llava_bench", ("all",)),
            ("mmvp", ("pair_accuracy",)),
            ("gqa", ("accuracy",)),
            ("naturalbench", NATURALBENCH),
        ],
        """
        LLaVA-v1.5-7B | 66.5 24.7 62.7 37.70 43.80 14.32
        SD & CLIP, concat, s=0 | 64.2 26.7 63.1 39.03 44.61 13.84
        SD & CLIP, concat, s=4 | 61 27.3 63.2 37.89 43.50 12.84
        SD & CLIP, cross-attention, s=0 | 66.8 26.9 62.7 40.55 46.13 14.79
        SD & CLIP, cross-attention, s=4 | 63.7 30.7 62.5 40.71 46.21 15.26
        """,
    ),
    (
        "S3 Table 1",
        [("mmvp_vlm", MMVP_VLM), ("winoground", ("text", "image", "group"))],
        """
        OpenAI ViT-L-14, 224 | 13.3 13.3 20.0 20.0 13.3 53.3 20.0 6.7 13.3 19.3 27.75 7.75 11.75
        OpenAI ViT-L-14, 336 | 0.0 20.0 40.0 20.0 6.7 20.0 33.3 6.7 33.3 20.0 28.50 8.25 11.25
        OpenCLIP ViT-H-14, 224 | 20.0 13.3 60.0 33.3 13.3 53.3 40.0 6.7 26.7 29.6 30.68 11.91 8.36
        SigLIP ViT-SO-14, 224 | 26.7 20.0 53.3 40.0 20.0 66.7 40.0 20.0 53.3 37.8 11.75 1.25 6.50
        SigLIP ViT-SO-14, 384 | 20.0 26.7 60.0 33.3 13.3 66.7 33.3 26.7 53.3 37.0 17.50 4.25 11.00
        DFN ViT-H-14, 224 | 20.0 26.7 73.3 26.7 26.7 66.7 46.7 13.3 53.3 39.3 38.50 11.50 14.25
        DFN ViT-H-14, 378 | 13.3 20.0 53.3 33.3 26.7 66.7 40.0 20.0 40.0 34.8 38.50 13.25 15.25
        MetaCLIP ViT-L-14, 224 | 13.3 6.7 66.7 6.7 33.3 46.7 20.0 6.7 13.3 23.7 32.50 10.75 15.25
        MetaCLIP ViT-H-14, 224 | 6.7 13.3 60.0 13.3 6.7 53.3 26.7 13.3 33.3 25.2 34.25 11.00 15.25
        EVA01 ViT-g-14, 224 | 6.7 26.7 40.0 6.7 13.3 66.7 13.3 13.3 20.0 23.0 27.25 9.25 11.25
        EVA02 ViT-bigE-14+, 224 | 13.3 20.0 66.7 26.7 26.7 66.7 26.7 20.0 33.3 33.3 32.00 10.50 13.50
        SD-v2.1-base, five timesteps | 31.1 33.3 35.6 20.0 33.3 46.7 33.3 33.3 44.4 34.6 31.92 14.17 10.50
        """,
    ),
    (
        "S3 Table 6",
        [("mmvp_vlm", MMVP_VLM)],
        """
        SD-v2.1-base, t=89 | 0.00 13.33 20.00 13.33 40.00 33.33 26.67 26.67 46.67 24.44
        SD-v2.1-base, t=189 | 20.00 13.33 26.67 6.67 26.67 20.00 20.00 33.33 20.00 20.74
        SD-v2.1-base, t=289 | 33.33 26.67 26.67 26.67 33.33 40.00 40.00 33.33 13.33 30.37
        SD-v2.1-base, t=389 | 33.33 26.67 33.33 20.00 13.33 26.67 40.00 20.00 33.33 27.41
        SD-v2.1-base, t=489 | 20.00 20.00 40.00 20.00 20.00 46.67 40.00 13.33 13.33 25.93
        SD-v2.1-base, t=589 | 20.00 33.33 53.33 26.67 33.33 33.33 20.00 33.33 20.00 30.37
        SD-v2.1-base, t=689 | 13.33 20.00 13.33 13.33 33.33 40.00 26.67 13.33 46.67 24.44
        SD-v2.1-base, t=789 | 26.67 13.33 33.33 13.33 40.00 46.67 40.00 40.00 13.33 29.63
        SD-v2.1-base, t=889 | 13.33 33.33 33.33 46.67 40.00 60.00 33.33 26.67 26.67 34.81
        SD-v2.1-base, t=989 | 46.67 0.00 26.67 13.33 40.00 66.67 20.00 20.00 33.33 29.63
        """,
    ),
    (
        "S3 Table 7",
        [("winoground", ("text", "image", "group"))],
        """
        SD-v2.1-base, t=89 | 29.25 5.75 3.00
        SD-v2.1-base, t=189 | 23.75 8.25 4.25
        SD-v2.1-base, t=289 | 25.50 9.25 6.50
        SD-v2.1-base, t=389 | 26.00 12.75 10.25
        SD-v2.1-base, t=489 | 29.50 16.00 11.25
        SD-v2.1-base, t=589 | 29.75 15.75 10.00
        SD-v2.1-base, t=689 | 30.25 13.75 10.50
        SD-v2.1-base, t=789 | 27.50 17.00 12.75
        SD-v2.1-base, t=889 | 27.50 12.50 9.00
        SD-v2.1-base, t=989 | 28.00 19.75 14.25
        """,
    ),
    (
        "S3 Table 5",
        [("captions", CAPTIONS)],
        """
        CLIP-ViT-L14-336; train no captions, val no captions | 40.75 40.60 15.02 20.50
        SD 2.1 (PT); train no captions, val no captions | 36.78 26.59 11.77 16.41
        SD 2.1 (PT); train GT captions, val no captions | 34.27 26.60 11.13 15.26
        SD 2.1 (PT); train GT captions, val GT captions | 39.31 38.10 14.23 18.72
        SD 2.1 (PT); train GT s=1.5, val no captions | 33.43 26.43 10.53 14.31
        SD 2.1 (PT); train GT s=1.5, val GT captions | 40.70 43.53 15.46 19.56
        SD 2.1 (PT); train GT s=1.5 with dropout, val no captions | 36.13 29.10 11.99 16.10
        SD 2.1 (PT); train GT s=1.5 with dropout, val GT captions | 40.77 41.72 15.22 19.46
        SD 2.1 (PT); train GT s=4, val no captions | 31.08 24.22 9.40 11.28
        SD 2.1 (PT); train GT s=4, val GT captions | 43.74 56.50 18.10 19.97
        SD 2.1 (PT); train GT s=4 with dropout, val no captions | 37.52 31.48 12.49 16.10
        SD 2.1 (PT); train GT s=4 with dropout, val GT captions | 42.44 45.40 16.19 20.04
        """,
    ),
    (
        "S4 Table 4",
        [("captions", CAPTIONS)],
        """
        SDXL (PT); train no captions, val no captions | 37.11 25.80 10.90 15.65
        SDXL (PT); train no captions, val GT captions | 37.33 25.92 11.02 15.72
        SDXL (PT); train CFG 1.5, val no captions | 31.28 21.93 8.06 11.72
        SDXL (PT); train CFG 1.5, val pseudo-captions | 31.39 20.25 7.86 12.40
        SDXL (PT); train CFG 1.5, val GT captions | 46.97 59.16 19.63 21.66
        PT-LLaVA | 38.61 37.25 11.52 20.58
        SDXL (PT); train CFG 1.5, val PT-LLaVA captions | 38.89 33.98 12.58 18.91
        SDXL (PT); train CFG 1.5 with dropout, val PT-LLaVA captions, CFG 1.5 | 38.89 32.42 12.48 19.02
        SDXL (FT); train CFG 1.5 with dropout, val PT-LLaVA captions, CFG 1 | 50.45 78.28 24.95 21.87
        FT-LLaVA | 52.28 87.26 27.64 23.71
        SDXL (PT); train CFG 1.5, val FT-LLaVA captions | 45.62 55.18 17.86 20.50
        SDXL (PT); train CFG 1.5 with dropout, val FT-LLaVA captions, CFG 1.5 | 44.55 49.17 16.79 20.25
        SDXL (FT); train CFG 1.5 with dropout, val FT-LLaVA captions, CFG 1.5 | 50.87 80.63 25.61 22.26
        """,
    ),
    (
        "S4 Table 5",
        [("captions", CAPTIONS)],
        """
        SDXL; CFG 1.5, val PT-LLaVA captions | 38.89 33.98 12.58 18.91
        SDXL; CFG 1.5, val GT captions | 46.97 59.16 19.63 21.66
        SDXL; CFG 4.5, val PT-LLaVA captions | 36.59 28.84 9.91 19.02
        SDXL; CFG 4.5, val GT captions | 52.67 76.05 24.65 24.44
        SDXL; CFG 7.0, val PT-LLaVA captions | 34.07 21.63 8.28 18.18
        SDXL; CFG 7.0, val GT captions | 49.38 62.00 20.22 23.41
        """,
    ),
    (
        "S4 Table 6",
        [("mismatched captions", CAPTIONS)],
        """
        SDXL; GT captions, no CFG | 29.25 7.32 4.15 4.64
        SDXL; CFG 1.5 | 36.03 21.39 8.99 9.78
        SDXL; CFG 1.5 with 30% caption dropout | 30.96 10.39 5.30 6.04
        SDXL; CFG 4.5 | 49.58 63.48 20.32 21.43
        """,
    ),
    ("S3 4.3", [("mismatched captions", CAPTIONS)], "SD 2.1; GT captions, s=4 | - 12.97 - -"),
    (
        "S3 Table 8",
        [("captions", CAPTIONS)],
        """
        SD 2.1, unconditional, T=50 | 36.25 26.20 11.54 16.21
        SDXL, unconditional, T=50 | 37.24 28.30 11.41 15.53
        """,
    ),
    (
        "S4 Table 7",
        [("llava_bench", ("complex", "conv", "detail", "all")), ("mmvp", ("pair_accuracy",)), ("blink", ("macro",))],
        """
        CLIP-LLaVA-v1.5-7B | 75.4 58.0 60.2 66.5 24.7 36.60
        DINO-LLaVA-v1.5-7B | 62.6 37.3 38.3 48.9 22.7 34.66
        SDXL-LLaVA; no-caption PT | 52.0 35.0 29.8 41.4 22.7 35.9
        SDXL-LLaVA†; no-caption PT | 54.3 33.8 34.4 43.1 22.7 -
        SDXL-LLaVA; GT-caption PT | 54.9 33.1 22.9 40.4 17.3 36.42
        SDXL-LLaVA†; GT-caption PT | 55.6 39.3 30.3 44.4 19.3 -
        SDXL-FT-LLaVA; no-caption PT | 50.4 38.6 20.7 39.3 22.0 36.63
        SDXL-FT-LLaVA†; no-caption PT | 57.2 30.9 35.5 43.9 22.0 -
        SDXL-FT-LLaVA; GT-caption PT | 49.4 37 31.4 41.2 22.0 36.12
        SDXL-FT-LLaVA†; GT-caption PT | 58.8 36.8 34.5 46.2 22.7 -
        SDXL-FT-LLaVA-c; noisy GT-caption PT | 56.8 34.8 21.1 41.2 21.3 36.50
        SDXL-FT-LLaVA-c†; noisy GT-caption PT | 62.9 37.6 29.5 46.9 21.3 -
        """,
    ),
    (
        "S4 Table 8",
        [("blink", BLINK_S4)],
        """
        CLIP-LLaVA-v1.5-7B | 47.41 45.00 52.42 12.00 41.03 16.26 31.65 64.84 50.00 27.33 43.61 37.31 23.48 20.00
        DINO-LLaVA-v1.5-7B | 47.41 43.33 50 2.67 32.48 22.31 20.86 66.43 54.92 28.49 48.87 29.1 20.45 18
        SDXL-LLaVA; no-caption PT | 47.41 40 51.61 12.67 35.04 20 20.86 62.94 57.38 29.65 43.61 35.07 21.21 25.33
        SDXL-LLaVA; GT-caption PT | 48.15 39.17 51.61 5.33 42.74 23.85 20.86 64.34 53.28 25 54.89 36.57 22.73 21.33
        SDXL-FT-LLaVA; no-caption PT | 47.41 37.5 48.39 8.67 48.72 24.62 22.3 60.84 56.56 28.49 44.36 38.06 24.24 22.67
        SDXL-FT-LLaVA; GT-caption PT | 47.41 40.83 50 6.67 43.59 24.62 25.18 65.03 53.28 29.01 41.35 34.33 19.7 24.67
        SDXL-FT-LLaVA-c; noisy GT PT | 46.67 38.33 52.42 4.67 39.32 22.31 32.37 62.94 56.56 30.23 42.11 40.3 22.73 20
        """,
    ),
]


def published_rows(benchmark: str) -> list[PublishedRow]:
    """All printed rows of a benchmark, in the order of the papers."""
    rows = []
    for source, groups, text in TABLES:
        start = 0
        for name, columns in groups:
            if name == benchmark:
                for line in text.strip().splitlines():
                    model, numbers = line.strip().split(" | ")
                    cells = numbers.split()[start : start + len(columns)]
                    scores = {column: float(cell) for column, cell in zip(columns, cells, strict=True) if cell != "-"}
                    if scores:
                        rows.append(PublishedRow(source, benchmark, model, scores))
            start += len(columns)
    return rows
