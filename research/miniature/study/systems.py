"""Fusions and guidance ensembles (g; S3, section 6) and S4's systems (l), all trained under one protocol.

Each system has the two stages of (c), the second with half of the scenes. Features that no training changes are cached.
Systems that train the UNet or its prompt only have cached latents, and take much longer. Both parts only run where they
are named, with `--part`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.captioning import refine, write_pseudo_captions
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate_samples, load_samples
from sdllava.evaluation.results import load_results

from ..progress import progress_bar
from ..stages import write_scenes
from .claims import claim
from .questions import BOTH, GUIDED, KEPT, folder_name, units_of_part
from .scales import StudyScale
from .training import SEED, Stage, Variant, part_folders

Options = dict[str, Any]
DIFFUSION = ("diffusion",)
LEVELS: Options = {"taps": ["U-L1-R1-B0-Cross-Q", "U-L2-R1-B0-Cross-Q"]}
SELECTED: Options = {
    "taps": ["D-L2-R0-B0-Cross-Q", "U-L1-R1-B0-Cross-Q", "U-L1-R1-B0-Out", "U-L1-R2-B0-Cross-Q"],
    "ensemble": "select",
    "ensemble_top_k": 2,
}
SEVERAL: Options = {"guidance_scales": [0, 1, 4]}
FIRST_TAP: Options = {"taps": ["U-L1-R1-B0-Cross-Q"]}
"""Selection between scales, and attention over them, need taps of one width."""

LORA = {"unet_lora_r": 16, "unet_lora_alpha": 32}
BASE, ONE_TAP_BASE = "cross-attention", "cross-attention, one tap"
NO_CAPTION, GT_CAPTION = "no caption", "ground-truth caption"


@dataclass(frozen=True)
class System:
    """A model of this part.

    Args:
        name: The name on the page.
        source: What it reproduces.
        variant: Encoders, fusion and guidance scale.
        baseline: The system that it is compared with.
        both: Options of both stages.
        align: Options of stage 1.
        finetune: Options of stage 2.
        cached: Kinds of the feature caches of both stages.
    """

    name: str
    source: str
    variant: Variant
    baseline: str
    both: Options = field(default_factory=dict)
    align: Options = field(default_factory=dict)
    finetune: Options = field(default_factory=dict)
    cached: tuple[str, str] = ("vision", "conditional")


def _fused(name: str, fusion: str, baseline: str = BASE, **both: Any) -> System:
    return System(name, "S3, section 6", Variant(name, BOTH, fusion, GUIDED), baseline, both)


def _s4(
    name: str, align: str, cached: tuple[str, str], both: Options | None = None, finetune: Options | None = None
) -> System:
    both = both or {}
    variant = Variant(name, BOTH if "implicit_caption_tokens" in both else DIFFUSION, guidance=1.0)
    return System(name, "S4, 6.1", variant, NO_CAPTION, both, {"diffusion_prompt": align}, finetune or {}, cached)


FUSIONS = (
    _fused(BASE, "cross_attention"),
    _fused(ONE_TAP_BASE, "cross_attention", **FIRST_TAP),
    _fused("concat", "concat"),
    _fused("concat tokens", "concat_tokens", spatial_merge_size=1),
    _fused("gated", "gated"),
    _fused("multi-level", "multi_level", grid_size=16, **LEVELS),
    _fused("feature selection, 2 of 4 taps", "cross_attention", **SELECTED),
    _fused(
        "scales 0, 1, 4 selected per token", "cross_attention", ONE_TAP_BASE, **FIRST_TAP, **SEVERAL, ensemble="select"
    ),
    _fused("attention over scales 0, 1, 4", "attention_over_maps", ONE_TAP_BASE, **FIRST_TAP, **SEVERAL),
    _fused("scales 0, 1, 4 concatenated", "cross_attention", **SEVERAL, ensemble="concat"),
)
WORKSHOP = (
    _s4(NO_CAPTION, "none", ("vision", "conditional")),
    _s4(GT_CAPTION, "caption", ("conditional", "conditional")),
    _s4("noisy caption", "noisy_caption", ("latents", "conditional")),
    _s4("noisy caption, both halves (SDXL-LLaVA-c)", "noisy_caption", ("latents", "conditional"),
        {"guidance_scales": [0, 1], "ensemble": "concat"}),
    _s4("no caption, UNet LoRA", "none", ("vision", "latents"), finetune=LORA),
    _s4("ground-truth caption, UNet LoRA", "caption", ("conditional", "latents"), finetune=LORA),
    _s4("implicit captioner", "none", ("latents", "latents"), {"implicit_caption_tokens": 4}),
)  # fmt: skip
PSEUDO = System(
    f"{GT_CAPTION}, pseudo-captions", "S4, Table 7", Variant(GT_CAPTION, DIFFUSION, guidance=1.0), GT_CAPTION
)
PASSES = 3
"""Captioning passes of the refinement: each reply is the diffusion model's prompt of the next (S4, 5)."""


def train_system(parts: Path, work: Path, system: System, scale: StudyScale) -> tuple[Path, Path]:
    """Train both stages of a system.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        system: The model.
        scale: The budgets.

    Returns:
        The folders of the models after stage 1 and stage 2.
    """
    data = {"align": work / "data" / "align.parquet", "finetune": work / "data" / "finetune.parquet"}
    write_scenes(data["align"], "captions", scale.align, SEED)
    write_scenes(data["finetune"], "questions", scale.systems, SEED)
    trained: list[Path] = []
    for stage, budget, own, kind in (
        ("align", scale.align, system.align, system.cached[0]),
        ("finetune", scale.systems, system.finetune, system.cached[1]),
    ):
        plain = stage == "align" and own.get("diffusion_prompt", "none") == "none"
        variant = replace(system.variant, guidance=0.0) if plain else system.variant
        trained.append(
            Stage(
                variant,
                part_folders(parts, variant),
                stage,
                data[stage],
                work / stage / folder_name(system.name),
                budget,
                scale.heads,
                work / "cache" / f"{stage}-{_cache_name(system, own, kind)}",
                kind,
                trained[0] if trained else None,
                tuple((system.both | own).items()),
            ).train()
        )
    return trained[0], trained[1]


def _cache_name(system: System, own: Options, kind: str) -> str:
    """Systems with the same tower, prompts and kind of cache share it."""
    tower = {name: system.both.get(name) for name in ("taps", "grid_size")}
    prompt = own.get("diffusion_prompt", "")
    words = [*system.variant.encoders, kind, prompt, *(str(value) for value in tower.values() if value)]
    return folder_name("-".join(word for word in words if word)).replace("'", "").replace("[", "").replace("]", "")


def _evaluate(trained: Path, work: Path, system: System, scale: StudyScale, **changes: Any) -> dict[str, Any]:
    """The row of a trained system. `changes` are options of the evaluation."""
    benchmark, samples, source = load_samples("mini", EvaluationOptions(limit=scale.questions))
    model = replace(LoadedModel.load(os.fspath(trained)), name=system.name)
    folder = work / "answers" / folder_name(system.name)
    options = EvaluationOptions(batch_size=32, limit=scale.questions, **changes)
    with progress_bar(system.name) as progress:
        found = evaluate_samples(model, benchmark, samples, source, folder / "question", options, progress=progress)
    return {"source": system.source, **{key: found[key] for key in KEPT}}


def measure_fusions(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Train and evaluate every fusion and guidance ensemble.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.

    Returns:
        `dict[str, Any]`: `rows` (scores by system) and `claims`.
    """
    rows = {}
    for system in FUSIONS:
        _, trained = train_system(parts, work, system, scale)
        rows[system.name] = _evaluate(trained, work, system, scale)
    return {"rows": rows, "claims": _claims(work / "answers", FUSIONS)}


def measure_workshop(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Train and evaluate S4's systems. The cross-attention system of (g), after stage 1, writes the pseudo-captions.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results, next to that of (g).
        scale: The budgets.

    Returns:
        `dict[str, Any]`: `rows` (scores by system), `captions` (refinement passes) and `claims`.
    """
    rows: dict[str, Any] = {}
    captions: dict[str, Any] = {}
    for system in WORKSHOP:
        aligned, trained = train_system(parts, work, system, scale)
        rows[system.name] = _evaluate(trained, work, system, scale)
        if system.name == GT_CAPTION:
            captioner, _ = train_system(parts, work.parent / "g", FUSIONS[0], scale)
            rows[PSEUDO.name] = _with_pseudo_captions(trained, captioner, work, scale)
            captions = _refinement(aligned, work, scale)
    claims = [*_claims(work / "answers", (*WORKSHOP, PSEUDO)), _refinement_claim(work / "refinement")]
    return {"rows": rows, "captions": captions, "claims": claims}


def _refinement(aligned: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Captions of a stage 1 model, each of which is the diffusion model's prompt of the next."""
    described = replace(LoadedModel.load(os.fspath(aligned)), name=f"{GT_CAPTION}, stage 1")
    options = EvaluationOptions(batch_size=32, limit=scale.described, protocol="plain", diffusion_prompt="none")
    with progress_bar("refinement") as progress:
        results = refine(described, "mini_captions", work / "refinement", PASSES, options, progress)
    return {f"pass {k}": {key: result[key] for key in KEPT} for k, result in enumerate(results, 1)}


def _with_pseudo_captions(trained: Path, captioner: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """The row of a system whose prompt is the question and a caption that `captioner` writes after stage 1."""
    options = EvaluationOptions(batch_size=32, limit=scale.questions, diffusion_prompt="none")
    file = work / "pseudo-captions.jsonl"
    with progress_bar("pseudo-captions") as progress:
        if not file.exists():
            loaded = LoadedModel.load(os.fspath(captioner))
            write_pseudo_captions(loaded, "mini", file, options, progress, after_stage_1=True)
    return _evaluate(trained, work, PSEUDO, scale, diffusion_prompt="question+caption", captions=os.fspath(file))


def _refinement_claim(folder: Path) -> dict[str, Any]:
    """The captions of the last pass against those of the first."""
    benchmark = get_benchmark("mini_captions", "plain")
    first, last = (benchmark.units(load_results(folder / f"pass-{k}")[0][1]) for k in (1, PASSES))
    trend = f"captions: refinement to pass {PASSES} is better than pass 1 (S4, 5)"
    return claim(trend, first, last, benchmark.scores, benchmark.metric, "CIDEr")


def _claims(answers: Path, systems: Sequence[System]) -> list[dict[str, Any]]:
    """Each system against its baseline."""
    scores = get_benchmark("mini").scores
    found = []
    for system in systems[1:]:
        for part in ("questions", "pairs"):
            lower, higher = (
                units_of_part(answers / folder_name(name) / "question")[part] for name in (system.baseline, system.name)
            )
            trend = f"{part}: {system.name} is more accurate than {system.baseline} ({system.source})"
            found.append(claim(trend, lower, higher, scores=scores, metric=part))
    return found
