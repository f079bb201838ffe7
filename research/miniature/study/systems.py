"""(g) Fusions and guidance ensembles (S3, section 6) and S4's systems, all trained under one protocol.

Each system has the two stages of (c). Features that no training changes are cached. Systems that train the UNet or its
prompt only have cached latents, and take much longer. This part only runs where it is named: `--part g`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.captioning import refine, write_pseudo_captions
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate_samples, load_samples

from ..progress import progress_bar
from ..stages import write_scenes
from .claims import claim
from .questions import BOTH, GUIDED, KEPT, folder_name, units_of_part
from .scales import StudyScale
from .training import SEED, Stage, Variant, part_folders

Options = dict[str, Any]
DIFFUSION = ("diffusion",)
LEVELS = {"taps": ["U-L1-R1-B0-Cross-Q", "U-L2-R1-B0-Cross-Q"]}
SELECTED = {
    "taps": ["D-L2-R0-B0-Cross-Q", "U-L1-R1-B0-Cross-Q", "U-L1-R1-B0-Out", "U-L1-R2-B0-Cross-Q"],
    "ensemble": "select",
    "ensemble_top_k": 2,
}
SEVERAL = {"guidance_scales": [0, 1, 4]}
ONE_WIDTH = {"taps": ["U-L1-R1-B0-Cross-Q"], **SEVERAL}
"""Selection between scales, and attention over them, need taps of one width."""

LORA = {"unet_lora_r": 16, "unet_lora_alpha": 32}


@dataclass(frozen=True)
class System:
    """A model of this part.

    Args:
        name: The name on the page.
        source: What it reproduces.
        variant: Encoders, fusion and guidance scale.
        both: Options of both stages.
        align: Options of stage 1.
        finetune: Options of stage 2.
        cached: Kinds of the feature caches of both stages.
    """

    name: str
    source: str
    variant: Variant
    both: Options = field(default_factory=dict)
    align: Options = field(default_factory=dict)
    finetune: Options = field(default_factory=dict)
    cached: tuple[str, str] = ("vision", "conditional")


def _fused(name: str, fusion: str, **both: Any) -> System:
    return System(name, "S3, section 6", Variant(name, BOTH, fusion, GUIDED), both)


def _s4(
    name: str, align: str, cached: tuple[str, str], both: Options | None = None, finetune: Options | None = None
) -> System:
    both = both or {}
    variant = Variant(name, BOTH if "implicit_caption_tokens" in both else DIFFUSION, guidance=1.0)
    return System(name, "S4, 6.1", variant, both, {"diffusion_prompt": align}, finetune or {}, cached)


BASE, NO_CAPTION, GT_CAPTION = "cross-attention", "no caption", "ground-truth caption"
SYSTEMS = (
    _fused(BASE, "cross_attention"),
    _fused("concat", "concat"),
    _fused("concat tokens", "concat_tokens", spatial_merge_size=1),
    _fused("gated", "gated"),
    _fused("multi-level", "multi_level", grid_size=16, **LEVELS),
    _fused("feature selection, 2 of 4 taps", "cross_attention", **SELECTED),
    _fused("scales 0, 1, 4 selected per token", "cross_attention", **ONE_WIDTH, ensemble="select"),
    _fused("attention over scales 0, 1, 4", "attention_over_maps", **ONE_WIDTH),
    _fused("scales 0, 1, 4 concatenated", "cross_attention", **SEVERAL, ensemble="concat"),
    _s4(NO_CAPTION, "none", ("vision", "conditional")),
    _s4(GT_CAPTION, "caption", ("conditional", "conditional")),
    _s4("noisy caption", "noisy_caption", ("latents", "conditional")),
    _s4("noisy caption, both halves (SDXL-LLaVA-c)", "noisy_caption", ("latents", "conditional"),
        {"guidance_scales": [0, 1], "ensemble": "concat"}),
    _s4("no caption, UNet LoRA", "none", ("vision", "latents"), finetune=LORA),
    _s4("ground-truth caption, UNet LoRA", "caption", ("conditional", "latents"), finetune=LORA),
    _s4("implicit captioner", "none", ("latents", "latents"), {"implicit_caption_tokens": 4}),
)  # fmt: skip
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
    write_scenes(data["finetune"], "questions", scale.finetune, SEED)
    trained: list[Path] = []
    for stage, budget, own, kind in (
        ("align", scale.align, system.align, system.cached[0]),
        ("finetune", scale.finetune, system.finetune, system.cached[1]),
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


def measure(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Train and evaluate every system.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.

    Returns:
        `dict[str, Any]`: `rows` (scores by system), `captions` (refinement passes) and `claims`.
    """
    benchmark, samples, source = load_samples("mini", EvaluationOptions(limit=scale.questions))
    rows: dict[str, Any] = {}
    captions: dict[str, Any] = {}
    for system in SYSTEMS:
        aligned, trained = train_system(parts, work, system, scale)
        model = replace(LoadedModel.load(os.fspath(trained)), name=system.name)
        folder = work / "answers" / folder_name(system.name)
        options = EvaluationOptions(batch_size=32, limit=scale.questions)
        with progress_bar(system.name) as progress:
            found = evaluate_samples(model, benchmark, samples, source, folder / "question", options, progress=progress)
        rows[system.name] = {"source": system.source, **{key: found[key] for key in KEPT}}
        if system.name == GT_CAPTION:
            rows[f"{system.name}, pseudo-captions"] = {
                "source": "S4, Table 7",
                **_with_pseudo_captions(model, work, samples, benchmark, source, options),
            }
            described = replace(LoadedModel.load(os.fspath(aligned)), name=f"{system.name}, stage 1")
            passes = EvaluationOptions(batch_size=32, limit=scale.described, protocol="plain", diffusion_prompt="none")
            with progress_bar("refinement") as progress:
                results = refine(described, "mini_captions", work / "refinement", PASSES, passes, progress)
            captions = {f"pass {k}": {key: r[key] for key in KEPT} for k, r in enumerate(results, 1)}
    return {"rows": rows, "captions": captions, "claims": _claims(work / "answers", [s.name for s in SYSTEMS])}


def _with_pseudo_captions(
    model: LoadedModel, work: Path, samples: Sequence[Any], benchmark: Any, source: Any, options: EvaluationOptions
) -> dict[str, Any]:
    """The answers with the question and a caption, which the system with CLIP writes, as prompt."""
    file = work / "pseudo-captions.jsonl"
    captioner = LoadedModel.load(os.fspath(work / "finetune" / folder_name(BASE)))
    with progress_bar("pseudo-captions") as progress:
        if not file.exists():
            write_pseudo_captions(captioner, "mini", file, options, progress)
        prompted = replace(options, diffusion_prompt="question+caption", captions=os.fspath(file))
        folder = work / "answers" / "pseudo-captions"
        found = evaluate_samples(model, benchmark, samples, source, folder, prompted, progress=progress)
    return {key: found[key] for key in KEPT}


def _claims(answers: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Each fusion and ensemble against cross-attention at s = 4, and each of S4's systems against no captions."""
    scores = get_benchmark("mini").scores
    sources = {system.name: system.source for system in SYSTEMS}
    found = []
    for name in names:
        base = BASE if sources[name] == sources[BASE] else NO_CAPTION
        if name == base or base not in names:
            continue
        for part in ("questions", "pairs"):
            lower, higher = (units_of_part(answers / folder_name(one) / "question")[part] for one in (base, name))
            trend = f"{part}: {name} is more accurate than {base} ({sources[name]})"
            found.append(claim(trend, lower, higher, scores=scores, metric=part))
    return found
