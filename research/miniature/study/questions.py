"""(c) S3, Table 2: questions and minimal pairs, answered with CLIP, with diffusion features, and with both."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.base import Benchmark, Sample
from sdllava.evaluation.bootstrap import Units
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate_samples, load_samples
from sdllava.evaluation.results import read_records

from ..progress import progress_bar
from ..stages import write_scenes
from .claims import claim
from .scales import StudyScale
from .training import SEED, Stage, Variant, part_folders

BOTH = ("diffusion", "vision")
GUIDED = 4.0
VARIANTS = (
    Variant("CLIP", ("vision",)),
    Variant("diffusion, s = 0", ("diffusion",)),
    Variant("diffusion, s = 4", ("diffusion",), guidance=GUIDED),
    Variant("concat, s = 0", BOTH, "concat"),
    Variant("concat, s = 4", BOTH, "concat", GUIDED),
    Variant("cross-attention, s = 0", BOTH, "cross_attention"),
    Variant("cross-attention, s = 4", BOTH, "cross_attention", GUIDED),
)
BEST, PLAIN = "cross-attention, s = 4", "cross-attention, s = 0"
PROMPTS = {"own question": "question", "empty prompt": "none", "wrong question": "other"}
KEPT = ("scores", "intervals_95", "samples", "chance")
TRENDS = {
    "cross-attention at s = 4 is more accurate than CLIP (S3, Table 2)": ("CLIP", BEST),
    "cross-attention at s = 0 is more accurate than CLIP (S3, Table 2)": ("CLIP", PLAIN),
    "concat at s = 4 is more accurate than CLIP (S3, Table 2)": ("CLIP", "concat, s = 4"),
    "CLIP is more accurate than diffusion at s = 0 (S3, Figure 3)": ("diffusion, s = 0", "CLIP"),
    "with cross-attention, s = 4 is more accurate than s = 0 (S3, Table 2)": (PLAIN, BEST),
    "with concat, s = 4 is more accurate than s = 0 (S3, Table 2)": ("concat, s = 0", "concat, s = 4"),
}
"""Each trend, with the variant that should be less accurate and the one that should be more accurate."""

PROMPT_TRENDS = {
    f"with cross-attention at s = 4, the own question is more accurate than the {name}": PROMPTS[name]
    for name in ("empty prompt", "wrong question")
}
"""Each trend, with the choice of prompt that should be less accurate than the image's own question."""


def folder_name(name: str) -> str:
    """The name of a variant's folder."""
    return name.replace(" = ", "").replace(",", "").replace(" ", "-").lower()


def train_variant(parts: Path, work: Path, variant: Variant, scale: StudyScale) -> Path:
    """Train both stages of a variant. The guidance scales of an architecture share the first stage.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        variant: The encoders, the fusion and the guidance scale.
        scale: The budgets.

    Returns:
        `Path`: The folder of the trained model.
    """
    align_data, data = work / "data" / "align.parquet", work / "data" / "finetune.parquet"
    write_scenes(align_data, "captions", scale.align, SEED)
    write_scenes(data, "questions", scale.finetune, SEED)
    encoders = "-".join(variant.encoders)
    plain = replace(variant, guidance=0.0)
    aligned = Stage(
        plain,
        part_folders(parts, variant),
        "align",
        align_data,
        work / "align" / folder_name(variant.name.partition(",")[0]),
        scale.align,
        scale.heads,
        work / "cache" / f"align-{encoders}" if variant.diffuses else None,
    ).train()
    return Stage(
        variant,
        part_folders(parts, variant),
        "finetune",
        data,
        work / "finetune" / folder_name(variant.name),
        scale.finetune,
        scale.heads,
        work / "cache" / f"finetune-{encoders}" if variant.diffuses else None,
        "conditional",
        aligned,
    ).train(**({"guidance_scales": GUIDED} if variant.diffuses else {}))


def _answer(
    model: LoadedModel, variant: Variant, folder: Path, benchmark: Benchmark, samples: list[Sample], source: dict
) -> dict[str, dict]:
    """Results with the image's own question and, if the guidance scale is not 0, with an empty and a wrong prompt."""
    found = {}
    for name, choice in PROMPTS.items():
        if name != "own question" and not variant.guidance:
            continue
        options = EvaluationOptions(diffusion_prompt=choice, batch_size=32, blind=choice == "question")
        with progress_bar(f"{variant.name}, {name}") as progress:
            found[name] = evaluate_samples(
                model, benchmark, samples, source, folder / choice, options, progress=progress
            )
    return found


def units_of_part(folder: Path) -> dict[str, Units]:
    """The units of a finished run, separately for pairs and questions."""
    units = get_benchmark("mini").units(read_records(folder / "samples.jsonl"))
    return {
        part: {name: values for name, values in units.items() if name.startswith(f"{part} ")}
        for part in ("questions", "pairs")
    }


def measure(
    parts: Path,
    work: Path,
    scale: StudyScale,
    variants: Sequence[Variant] | None = None,
    trends: dict[str, tuple[str, str]] | None = None,
) -> dict[str, Any]:
    """Train and evaluate every variant.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.
        variants: Default: [`VARIANTS`].
        trends: Default: [`TRENDS`].

    Returns:
        `dict[str, Any]`: `rows` (scores by prompt, and blind) and `claims`.
    """
    benchmark, samples, source = load_samples("mini", EvaluationOptions(limit=scale.questions))
    rows = {}
    for variant in variants or VARIANTS:
        trained = train_variant(parts, work, variant, scale)
        model = LoadedModel.load(os.fspath(trained))
        model = replace(model, name=variant.name)
        folder = work / "answers" / folder_name(variant.name)
        results = _answer(model, variant, folder, benchmark, samples, source)
        rows[variant.name] = {
            "prompts": {name: {key: result[key] for key in KEPT} for name, result in results.items()},
            "blind": results["own question"]["blind"],
        }
    return {"rows": rows, "claims": _claims(work / "answers", trends or TRENDS)}


def _claims(answers: Path, trends: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    scores = get_benchmark("mini").scores

    def units(variant: str, choice: str, part: str) -> Units:
        return units_of_part(answers / folder_name(variant) / choice)[part]

    found = []
    for part in ("pairs", "questions"):
        for trend, (lower, higher) in trends.items():
            pair = units(lower, "question", part), units(higher, "question", part)
            found.append(claim(f"{part}: {trend}", *pair, scores=scores, metric=part))
        for trend, choice in PROMPT_TRENDS.items():
            pair = units(BEST, choice, part), units(BEST, "question", part)
            found.append(claim(f"{part}: {trend}", *pair, scores=scores, metric=part))
    return found
