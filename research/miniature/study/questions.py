"""(c) S3, Table 2: questions and minimal pairs answered with CLIP, with diffusion features, and with both fused."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdllava.commands.evaluate import progress_bar
from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.bootstrap import Units
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate_samples, load_samples
from sdllava.evaluation.results import read_records

from ..stages import write_scenes
from .claims import claim
from .scales import StudyScale
from .training import SEED, Stage, Variant, part_folders

BOTH = ("diffusion", "vision")
ASKED = 4.0
VARIANTS = (
    Variant("CLIP", ("vision",)),
    Variant("diffusion, s = 0", ("diffusion",)),
    Variant("diffusion, s = 4", ("diffusion",), guidance=ASKED),
    Variant("concat, s = 0", BOTH, "concat"),
    Variant("concat, s = 4", BOTH, "concat", ASKED),
    Variant("cross-attention, s = 0", BOTH, "cross_attention"),
    Variant("cross-attention, s = 4", BOTH, "cross_attention", ASKED),
)
PROMPTS = {"own question": "question", "empty prompt": "none", "wrong question": "other"}
KEPT = ("scores", "intervals_95", "samples", "chance")


def folder_name(name: str) -> str:
    """A folder's name for a variant's."""
    return name.replace(" = ", "").replace(",", "").replace(" ", "-").lower()


def train_variant(parts: Path, work: Path, variant: Variant, scale: StudyScale) -> Path:
    """Both stages; the first is shared by the guidance scales of one architecture."""
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
    ).train(**({"guidance_scales": ASKED} if variant.diffuses else {}))


def _answer(model: LoadedModel, variant: Variant, folder: Path, samples: tuple) -> dict[str, dict]:
    """Results with the image's own question, and where the prompt matters with none and with a wrong one."""
    found = {}
    for name, choice in PROMPTS.items():
        if name != "own question" and not variant.guidance:
            continue
        options = EvaluationOptions(diffusion_prompt=choice, batch_size=32, blind=choice == "question")
        with progress_bar(f"{variant.name}, {name}") as progress:
            found[name] = evaluate_samples(model, *samples, folder / choice, options, progress=progress)
    return found


def _parts_of(folder: Path) -> dict[str, Units]:
    """Units of a finished run, those of pairs and those of questions."""
    units = get_benchmark("mini").units(read_records(folder / "samples.jsonl"))
    return {
        part: {name: values for name, values in units.items() if name.startswith(f"{part} ")}
        for part in ("questions", "pairs")
    }


def measure(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Trains and questions every variant: scores by prompt, and blind."""
    samples = load_samples("mini", EvaluationOptions(limit=scale.questions))
    rows = {}
    for variant in VARIANTS:
        trained = train_variant(parts, work, variant, scale)
        model = LoadedModel.load(os.fspath(trained))
        model = replace(model, name=variant.name)
        results = _answer(model, variant, work / "answers" / folder_name(variant.name), samples)
        rows[variant.name] = {
            "prompts": {name: {key: result[key] for key in KEPT} for name, result in results.items()},
            "blind": results["own question"]["blind"],
        }
    return {"rows": rows, "claims": _claims(work / "answers")}


def _claims(answers: Path) -> list[dict]:
    best, plain = "cross-attention, s = 4", "cross-attention, s = 0"
    trends = (
        ("cross-attention at s = 4 is right more often than CLIP alone (S3, Table 2)", "CLIP", best),
        ("cross-attention at s = 0 is right more often than CLIP alone (S3, Table 2)", "CLIP", plain),
        ("concat at s = 4 is right more often than CLIP alone (S3, Table 2)", "CLIP", "concat, s = 4"),
        ("CLIP alone is right more often than diffusion alone at s = 0 (S3, Figure 3)", "diffusion, s = 0", "CLIP"),
        ("with cross-attention, asking at s = 4 beats not asking (S3, Table 2)", plain, best),
        ("with concat, asking at s = 4 beats not asking (S3, Table 2)", "concat, s = 0", "concat, s = 4"),
    )
    found = []
    for part in ("pairs", "questions"):
        for trend, lower, higher in trends:
            units = [_parts_of(answers / folder_name(name) / "question")[part] for name in (lower, higher)]
            found.append(claim(f"{part}: {trend}", *units, get_benchmark("mini").scores, part))
        for name, choice in list(PROMPTS.items())[1:]:
            units = [_parts_of(answers / folder_name(best) / asked)[part] for asked in (choice, "question")]
            trend = f"{part}: with cross-attention at s = 4, the {name} is worse than the own question"
            found.append(claim(trend, *units, get_benchmark("mini").scores, part))
    return found
