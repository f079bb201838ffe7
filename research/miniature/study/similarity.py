"""(f) S3, Figures 2c, 5c and 9: similarity of the scenes of minimal pairs, and the effect of captions on features."""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sdllava.analysis.images import PromptedImage
from sdllava.analysis.loading import AnalysisModel, load_analysis_model
from sdllava.analysis.similarity import cka, pair_similarity
from sdllava.analysis.sweep import ComputedFeatures, FeatureSelection, gather
from sdllava.analysis.vision_encoder import VisionEncoder
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.scenes.language import caption
from sdllava.scenes.minimal_pairs import minimal_pair
from sdllava.scenes.render import render
from sdllava.scenes.world import PATTERNS, sample_scene

from .claims import claim
from .scales import StudyScale
from .taps import DEFAULT_TAP, TAPS, TIMESTEPS

OUT_TAP = "U-L1-R1-B0-Out"
GUIDANCE = (0.0, 1.0, 1.5, 4.0, 7.0)
CKA_TIMESTEP = 50
SIMILARITY_TRENDS = {
    "the two scenes of a pair are less similar at the default tap than in CLIP (S3, Figure 2c)": (
        f"{DEFAULT_TAP}|50",
        "CLIP",
    ),
    "pairs are more similar in Cross-Q than in Out at U-L1-R1, t = 50 (S3, Figure 2c)": (
        f"{OUT_TAP}|50",
        f"{DEFAULT_TAP}|50",
    ),
    "pairs are less similar at t = 500 than at t = 10 (S3, Figure 2c)": (f"{DEFAULT_TAP}|500", f"{DEFAULT_TAP}|10"),
}
"""Each trend, with the features that should be less similar and those that should be more similar."""

CKA_TRENDS = {
    "s = 4 changes the features of the default tap more than s = 1 (S3, Figure 5c)": (
        f"{DEFAULT_TAP}|4",
        f"{DEFAULT_TAP}|1",
    ),
    "at s = 4 Out changes more than Cross-Q at U-L1-R1 (S3, Figure 5c)": (f"{OUT_TAP}|4", f"{DEFAULT_TAP}|4"),
}
"""Each trend, with the features that should have the lower and the higher CKA with the unconditional ones."""


def _similarities(parts: Path, model: AnalysisModel, scale: StudyScale) -> tuple[dict[str, Units], int]:
    """The cosine similarity of each pair at each tap and timestep and in CLIP, and the number of pairs."""
    pairs = [minimal_pair(pattern, "test", seed).scenes for seed in range(scale.pairs) for pattern in PATTERNS]
    images = [PromptedImage("", render(scene), None) for pair in pairs for scene in pair]
    units: dict[str, Units] = {}
    for timestep in tqdm(TIMESTEPS, desc="similarity of pairs"):
        source = ComputedFeatures(model, images, FeatureSelection(list(TAPS), [timestep], [0.0]))
        for feature in gather(source, batch_size=32):
            found = pair_similarity(feature.values[0::2], feature.values[1::2]).positions
            units[f"{feature.tap}|{timestep}"] = _units(found)
    encoder, pictures = VisionEncoder(str(parts / "clip")), [image.image for image in images]
    units["CLIP"] = _units(encoder.similarity(pictures[0::2], pictures[1::2]).positions)
    return units, len(pairs)


def _units(values: np.ndarray) -> Units:
    return {str(k): {"similarity": float(value)} for k, value in enumerate(values)}


def _cka(model: AnalysisModel, scale: StudyScale) -> Units:
    """CKA with the unconditional features in disjoint groups of scenes, conditioned on the scenes' captions."""
    selection = FeatureSelection(list(TAPS), [CKA_TIMESTEP], list(GUIDANCE))
    units: Units = {}
    for group in tqdm(range(scale.groups), desc="CKA by guidance scale"):
        scenes = [sample_scene("test", group * scale.group_size + k) for k in range(scale.group_size)]
        images = [PromptedImage("", render(scene), caption(scene)) for scene in scenes]
        result = cka(ComputedFeatures(model, images, selection), batch_size=32)
        units[str(group)] = {
            f"{tap}|{s:g}": float(value)
            for tap in TAPS
            for s, value in zip(*result.with_unconditional(tap, CKA_TIMESTEP), strict=True)
        }
    return units


def _column(units: Units, key: str) -> Units:
    return {group: {"CKA": values[key]} for group, values in units.items()}


def measure(parts: Path, work: Path, scale: StudyScale, noise_seed: int = 0) -> dict[str, Any]:
    """Similarities with intervals over pairs, and CKA with intervals over groups of scenes.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.
        noise_seed: Selects the noise map.

    Returns:
        `dict[str, Any]`: `num_pairs`, `similarity`, `cka` and `claims`.
    """
    model = load_analysis_model(str(parts / "diffusion"))
    model.tower.config.noise_seed = noise_seed
    similar, num_pairs = _similarities(parts, model, scale)
    changed = _cka(model, scale)
    claims = [
        claim(trend, similar[lower], similar[higher], dict, "similarity", "cosine")
        for trend, (lower, higher) in SIMILARITY_TRENDS.items()
    ]
    claims += [
        claim(trend, _column(changed, lower), _column(changed, higher), dict, "CKA", "CKA")
        for trend, (lower, higher) in CKA_TRENDS.items()
    ]
    spread = intervals(changed, dict)
    return {
        "num_pairs": num_pairs,
        "similarity": {
            name: {"mean": unit_means(units)["similarity"], "interval": intervals(units, dict)["similarity"]}
            for name, units in similar.items()
        },
        "cka": {key: {"mean": value, "interval": spread[key]} for key, value in unit_means(changed).items()},
        "claims": claims,
    }
