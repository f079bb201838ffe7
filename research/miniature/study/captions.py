"""(d) S3, Figure 6 and Table 5: captions under guidance, with and without dropout, and what leaks of a wrong one."""

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdllava.analysis.loading import load_subject
from sdllava.commands.evaluate import progress_bar
from sdllava.guidance import guide
from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.evaluation.diffusion_prompts import derangement
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate, load_samples
from sdllava.evaluation.leakage import LeakageSetting, leakage_sweep
from sdllava.evaluation.results import load_results
from sdllava.scenes.dataset import Scene, caption, render, sample_scene
from sdllava.scenes.world import COLOURS

from ..stages import write_scenes
from .claims import claim, claim_above_zero
from .guidance import asked_features
from .questions import folder_name
from .readout import auc, fit_readout, ordered_pairs
from .scales import StudyScale
from .training import SEED, Stage, Variant, part_folders

DROPOUT = 0.3
CLIP, PLAIN = "CLIP", "no captions"
VARIANTS = {
    Variant(CLIP, ("vision",)): 0.0,
    Variant(PLAIN, ("diffusion",)): 0.0,
    Variant("captions, s = 1.5", ("diffusion",), guidance=1.5): 0.0,
    Variant("captions, s = 4", ("diffusion",), guidance=4.0): 0.0,
    Variant("captions, s = 4, dropout", ("diffusion",), guidance=4.0): DROPOUT,
}
"""Each variant and the share of captions that it is trained without."""
RUNS = {"its caption": "task-s{:g}", "no caption": "no-text", "a wrong caption": "mismatched-s{:g}"}
READ_SCALES = (0.0, 1.0, 1.5, 4.0, 7.0)


def _train(parts: Path, work: Path, variant: Variant, dropout: float, scale: StudyScale) -> Path:
    """The first stage alone; all diffusion variants share the features of each caption and of the empty prompt."""
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
    asked = {"guidance_scales": 4.0, "diffusion_prompt": "caption", "prompt_dropout": DROPOUT}
    return stage.train(**(asked if variant.diffuses else {}))


def _describe(model: LoadedModel, variant: Variant, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Caption scores with the image's caption as prompt, without, and with a wrong one; and the leakage found."""
    options = EvaluationOptions(protocol="plain", limit=scale.described, batch_size=32)
    folder = work / "described" / folder_name(variant.name)
    with progress_bar(f"captions, {variant.name}") as progress:
        if not variant.diffuses:
            evaluate(model, "mini_captions", folder / "no-text", options, progress=progress)
            return {"runs": {"no caption": _scores(folder / "no-text")}}
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
    folder = folder / "sweep" / RUNS[run].format(variant.guidance) if variant.diffuses else folder / "no-text"
    return get_benchmark("mini_captions", "plain").units(load_results(folder)[0][1])


# ------------------------------------------------------------------------------------------- leakage to a read-out


def _colours(scenes: list[Scene]) -> Tensor:
    """Which colours each scene shows, bool `(n, 5)`."""
    return torch.tensor([[any(o.colour == colour for o in scene.objects) for colour in COLOURS] for scene in scenes])


def read_out_leakage(parts: Path, scale: StudyScale) -> dict[str, Units]:
    """Units of a read-out of the image's colours that is shown mismatched images.

    It learns from features that were asked with the image's own caption, as the language model does, and is tested on
    features that were asked with another's: of the colours that the image does not show, does it take those of the
    wrong caption for seen?
    """
    subject = load_subject(str(parts / "diffusion"))
    counts = dict(zip(("train", "test"), scale.leakage, strict=True))
    scenes = {split: [sample_scene(split, seed) for seed in range(count)] for split, count in counts.items()}
    captions = {split: [caption(scene) for scene in found] for split, found in scenes.items()}
    donors = derangement(len(scenes["test"]), seed=0)
    captions["test"] = [captions["test"][donor] for donor in donors]
    read = {
        split: asked_features(subject, [render(s) for s in scenes[split]], captions[split], f"leakage, {split}")
        for split in scenes
    }
    shown = {split: _colours(found) for split, found in scenes.items()}
    told, absent = shown["test"][donors], ~shown["test"]
    generator = random.Random(0)
    dropped = torch.tensor([generator.random() < DROPOUT for _ in scenes["train"]])[:, None]
    found = {}
    for s in READ_SCALES:
        trained, tested = guide(*read["train"], s), guide(*read["test"], s)
        with_dropout = torch.where(dropped, read["train"][0], trained)
        for title, features in ((f"s = {s:g}", trained), (f"s = {s:g}, dropout", with_dropout)):
            scores = fit_readout(features, shown["train"].float())(tested)
            found[title] = ordered_pairs(scores, told & absent, ~told & absent)
    return found


def measure(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """The read-out first, then every variant trained, described and tested for leakage."""
    read = read_out_leakage(parts, scale)
    rows = {}
    for variant, dropout in VARIANTS.items():
        model = LoadedModel.load(os.fspath(_train(parts, work, variant, dropout, scale)))
        rows[variant.name] = _describe(replace(model, name=variant.name), variant, work, scale)
    return {
        "rows": rows,
        "read_out": {
            name: {"AUC": auc(unit_means(units))["AUC"], "interval": intervals(units, auc)["AUC"]}
            for name, units in read.items()
        },
        "claims": [*_caption_claims(work, rows), *_leakage_claims(rows, read)],
    }


def _caption_claims(work: Path, rows: dict) -> list[dict]:
    benchmark = get_benchmark("mini_captions", "plain")
    guided, dropped = "captions, s = 4", "captions, s = 4, dropout"
    trends = (
        ("told its caption, training at s = 4 describes better than without captions (S3, Figure 6)",
         (PLAIN, "no caption"), (guided, "its caption")),
        ("told its caption, s = 4 describes better than CLIP (S3, Figure 6)",
         (CLIP, "no caption"), (guided, "its caption")),
        ("told nothing, training at s = 4 describes worse than without captions (S3, Figure 6)",
         (guided, "no caption"), (PLAIN, "no caption")),
        ("dropout brings back what s = 4 lost when told nothing (S3, Table 5)",
         (guided, "no caption"), (dropped, "no caption")),
        ("told a wrong caption, dropout repeats less of it (S3, Figure 6)",
         (dropped, "a wrong caption"), (guided, "a wrong caption")),
    )  # fmt: skip
    return [
        claim(trend, _units(work, *lower), _units(work, *higher), benchmark.scores, benchmark.metric, "CIDEr")
        for trend, lower, higher in trends
    ]


def _leakage_claims(rows: dict, read: dict[str, Units]) -> list[dict]:
    leaked = rows["captions, s = 4"]["leakage"]
    gain = leaked["likelihood_gain"]
    return [
        {"trend": "at s = 4 a wrong caption is repeated beyond what no caption gives (S3, 4.3)", "unit": "CIDEr",
         **leaked["excess"]},
        {"trend": "at s = 4 a wrong caption becomes likelier to the language model (S3, 4.3)", "unit": "nats a token",
         "difference": gain["mean"], "interval": gain["interval"], "paired": True},
        claim_above_zero("a read-out sees the wrong caption's colours at s = 4, beyond chance (S3, 4.3)",
                         read["s = 4"], auc, "AUC", "AUC", zero=0.5),
        claim("a read-out sees more of a wrong caption at s = 7 than at s = 1.5 (S3, 4.3)",
              read["s = 1.5"], read["s = 7"], auc, "AUC", "AUC"),
        claim("dropout lowers what a read-out sees of a wrong caption at s = 4 (S3, 4.3)",
              read["s = 4, dropout"], read["s = 4"], auc, "AUC", "AUC"),
    ]  # fmt: skip
