"""(d) S3, Figure 6 and Table 5: captions under guidance, with and without dropout, and leakage of wrong captions."""

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdllava.analysis.loading import load_analysis_model
from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate, load_samples
from sdllava.evaluation.leakage import LeakageSetting, leakage_sweep
from sdllava.evaluation.prompt_choices import derangement
from sdllava.evaluation.results import load_results
from sdllava.guidance import guide
from sdllava.scenes.language import caption
from sdllava.scenes.render import render
from sdllava.scenes.world import COLOURS, Scene, sample_scene

from ..progress import progress_bar
from ..scales import TOWERS
from ..stages import write_scenes
from .claims import claim, claim_above_zero
from .guidance import quadrant_features
from .questions import folder_name
from .readout import auc, fit_readout, ordered_pairs
from .scales import StudyScale
from .taps import DEFAULT_TIMESTEP
from .training import SEED, Stage, Variant, part_folders

DROPOUT = 0.3
CLIP, PLAIN = "CLIP", "no captions"
GUIDED, DROPPED = "captions, s = 4", "captions, s = 4, dropout"
VARIANTS = {
    Variant(CLIP, ("vision",)): 0.0,
    Variant(PLAIN, ("diffusion",)): 0.0,
    Variant("captions, s = 1.5", ("diffusion",), guidance=1.5): 0.0,
    Variant(GUIDED, ("diffusion",), guidance=4.0): 0.0,
    Variant(DROPPED, ("diffusion",), guidance=4.0): DROPOUT,
}
"""Each variant, with the probability of an empty prompt in its training."""

OWN, EMPTY, WRONG = "own caption", "empty prompt", "wrong caption"
RUNS = {OWN: "task-s{:g}", EMPTY: "no-text", WRONG: "mismatched-s{:g}"}
"""Each prompt, with the folder of its run in [`~sdllava.evaluation.leakage.leakage_sweep`]."""

TRENDS = {
    "with the own caption, training at s = 4 describes better than training without captions (S3, Figure 6)": (
        (PLAIN, EMPTY),
        (GUIDED, OWN),
    ),
    "with the own caption, s = 4 describes better than CLIP (S3, Figure 6)": ((CLIP, EMPTY), (GUIDED, OWN)),
    "with the empty prompt, training at s = 4 describes worse than training without captions (S3, Figure 6)": (
        (GUIDED, EMPTY),
        (PLAIN, EMPTY),
    ),
    "with the empty prompt, training at s = 4 describes better with dropout than without (S3, Table 5)": (
        (GUIDED, EMPTY),
        (DROPPED, EMPTY),
    ),
    "with a wrong caption, training at s = 4 repeats less of it with dropout than without (S3, Figure 6)": (
        (DROPPED, WRONG),
        (GUIDED, WRONG),
    ),
}
"""Each trend, with the variant and prompt that should score lower, and those that should score higher."""

REPEATED = "at s = 4 the model repeats more of a wrong caption than with the empty prompt (S3, 4.3)"
LIKELIER = "at s = 4 a wrong caption becomes more likely to the language model (S3, 4.3)"
READ = "at s = 4 a read-out finds the wrong caption's colours above chance (S3, 4.3)"
READ_TRENDS = {
    "a read-out finds more of a wrong caption at s = 7 than at s = 1.5 (S3, 4.3)": ("s = 1.5", "s = 7"),
    "at s = 4 a read-out finds less of a wrong caption with dropout than without (S3, 4.3)": (
        "s = 4, dropout",
        "s = 4",
    ),
}
"""Each trend, with the read-out that should find less and the one that should find more."""

READ_SCALES = (0.0, 1.0, 1.5, 4.0, 7.0)


def _train(parts: Path, work: Path, variant: Variant, dropout: float, scale: StudyScale) -> Path:
    """Train only stage 1. All diffusion variants share the cached features of the captions and of the empty prompt."""
    data = work / "data" / "captions.parquet"
    write_scenes(data, "captions", scale.captions, SEED)
    options: dict[str, Any] = {}
    if variant.guidance:
        options = {"diffusion_prompt": "caption", "prompt_dropout": dropout}
    stage = Stage(
        variant,
        part_folders(parts, variant),
        "align",
        data,
        work / "models" / folder_name(variant.name),
        scale.captions,
        scale.heads,
        work / "cache" if variant.diffuses else None,
        "conditional",
        options=tuple(options.items()),
    )
    shared = {"guidance_scales": 4.0, "diffusion_prompt": "caption", "prompt_dropout": DROPOUT}
    return stage.train(**(shared if variant.diffuses else {}))


def _describe(model: LoadedModel, variant: Variant, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Caption scores with each prompt, and the leakage."""
    options = EvaluationOptions(protocol="plain", limit=scale.described, batch_size=32)
    folder = work / "described" / folder_name(variant.name)
    with progress_bar(f"captions, {variant.name}") as progress:
        if not variant.diffuses:
            evaluate(model, "mini_captions", folder / RUNS[EMPTY], options, progress=progress)
            return {"runs": {EMPTY: _scores(folder / RUNS[EMPTY])}}
        setting = LeakageSetting.make(*load_samples("mini_captions", options), options)
        swept = leakage_sweep([("sweep", model)], setting, folder, [variant.guidance], progress)["rows"][0]
    runs = {name: _scores(folder / "sweep" / run.format(variant.guidance)) for name, run in RUNS.items()}
    leakage = {key: swept[key] for key in ("excess", "likelihood_gain", "control")}
    return {"runs": runs, "leakage": leakage, "metric": setting.benchmark.metric}


def _scores(folder: Path) -> dict[str, Any]:
    results = load_results(folder)[0][0]
    return {key: results[key] for key in ("scores", "intervals_95", "samples", "metric")}


def _units(work: Path, name: str, run: str) -> Units:
    variant = next(variant for variant in VARIANTS if variant.name == name)
    folder = work / "described" / folder_name(name)
    folder = folder / "sweep" / RUNS[run].format(variant.guidance) if variant.diffuses else folder / RUNS[EMPTY]
    return get_benchmark("mini_captions", "plain").units(load_results(folder)[0][1])


# Leakage to a read-out


def scene_colours(scenes: list[Scene]) -> Tensor:
    """The colours of each scene, bool `(n, 5)`."""
    return torch.tensor([[any(o.colour == colour for o in scene.objects) for colour in COLOURS] for scene in scenes])


def read_out_leakage(parts: Path, scale: StudyScale, denoiser: str = "diffusion") -> dict[str, Units]:
    """Measure the leakage of wrong captions to a linear read-out of the image's colours.

    The read-out is fitted on features that are conditioned on the image's own caption, like the language model, and
    tested on features that are conditioned on another image's. Caption colours that are not in the image should then
    score no higher than other absent colours.

    Args:
        parts: The folder of the miniature's parts.
        scale: The budgets.
        denoiser: The folder of the diffusion model.

    Returns:
        `dict[str, Units]`: Units for [`~research.miniature.study.readout.auc`], by guidance scale and dropout.
    """
    model = load_analysis_model(str(parts / denoiser))
    tower = TOWERS[denoiser]
    place = (tower["taps"][0], tower.get("timesteps", [DEFAULT_TIMESTEP])[0])
    counts = dict(zip(("train", "test"), scale.leakage, strict=True))
    scenes = {split: [sample_scene(split, seed) for seed in range(count)] for split, count in counts.items()}
    captions = {split: [caption(scene) for scene in found] for split, found in scenes.items()}
    donors = derangement(len(scenes["test"]), seed=0)
    captions["test"] = [captions["test"][donor] for donor in donors]
    read = {
        split: quadrant_features(
            model, [render(s) for s in scenes[split]], captions[split], f"leakage, {split}", *place
        )
        for split in scenes
    }
    colours = {split: scene_colours(found) for split, found in scenes.items()}
    in_caption, absent = colours["test"][donors], ~colours["test"]
    generator = random.Random(0)
    dropped = torch.tensor([generator.random() < DROPOUT for _ in scenes["train"]])[:, None]
    found = {}
    for s in READ_SCALES:
        trained, tested = guide(*read["train"], s), guide(*read["test"], s)
        with_dropout = torch.where(dropped, read["train"][0], trained)
        for title, features in ((f"s = {s:g}", trained), (f"s = {s:g}, dropout", with_dropout)):
            scores = fit_readout(features, colours["train"].float())(tested)
            found[title] = ordered_pairs(scores, in_caption & absent, ~in_caption & absent)
    return found


def measure(parts: Path, work: Path, scale: StudyScale, denoiser: str = "diffusion") -> dict[str, Any]:
    """Measure the read-outs, then train and evaluate every variant.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.
        denoiser: The folder of the diffusion model.

    Returns:
        `dict[str, Any]`: `rows`, `read_out` and `claims`.
    """
    read = read_out_leakage(parts, scale, denoiser)
    rows = {}
    for unbound, dropout in VARIANTS.items():
        variant = replace(unbound, denoiser=denoiser)
        model = LoadedModel.load(os.fspath(_train(parts, work, variant, dropout, scale)))
        rows[variant.name] = _describe(replace(model, name=variant.name), variant, work, scale)
    return {
        "rows": rows,
        "read_out": {
            name: {"AUC": auc(unit_means(units))["AUC"], "interval": intervals(units, auc)["AUC"]}
            for name, units in read.items()
        },
        "claims": [*_caption_claims(work), *_leakage_claims(rows, read)],
    }


def _caption_claims(work: Path) -> list[dict[str, Any]]:
    benchmark = get_benchmark("mini_captions", "plain")
    return [
        claim(trend, _units(work, *lower), _units(work, *higher), benchmark.scores, benchmark.metric, "CIDEr")
        for trend, (lower, higher) in TRENDS.items()
    ]


def _leakage_claims(rows: dict[str, Any], read: dict[str, Units]) -> list[dict[str, Any]]:
    leaked = rows[GUIDED]["leakage"]
    gain = leaked["likelihood_gain"]
    return [
        {"trend": REPEATED, "unit": "CIDEr", **leaked["excess"]},
        {
            "trend": LIKELIER,
            "unit": "nats per token",
            "difference": gain["mean"],
            "interval": gain["interval"],
            "paired": True,
        },
        claim_above_zero(READ, read["s = 4"], auc, "AUC", "AUC", zero=0.5),
        *(claim(trend, read[lower], read[higher], auc, "AUC", "AUC") for trend, (lower, higher) in READ_TRENDS.items()),
    ]
