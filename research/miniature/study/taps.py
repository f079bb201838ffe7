"""(a) S3, Figure 3: the accuracy of linear read-outs of a scene's attributes, by tap and timestep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdllava.analysis.loading import AnalysisModel, load_analysis_model
from sdllava.analysis.reading import read_features
from sdllava.analysis.vision_encoder import VisionEncoder
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.benchmarks.groups import COUNT
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.grids import resize_grid
from sdllava.scenes.render import render
from sdllava.scenes.world import Scene, sample_scene

from ..judge import ATTRIBUTES, labels, quadrants
from .claims import claim
from .readout import CORRECT, fit_readout, one_hot, shares
from .scales import StudyScale

TAPS = (
    "D-L2-R0-B0-Cross-Q",
    "U-L1-R1-B0-Cross-Q",
    "U-L1-R1-B0-Out",
    "U-L1-R2-B0-Cross-Q",
    "U-L2-R1-B0-Cross-Q",
    "U-L2-R2-Res-Out",
)
TIMESTEPS = (10, 50, 100, 250, 500)
DEFAULT_TAP, DEFAULT_TIMESTEP = "U-L1-R1-B0-Cross-Q", 50
GRID = 8
BATCH = 32
Place = tuple[str, int | None]
"""A tap and a timestep, or what has no timestep."""
TRENDS: dict[str, tuple[Place, Place]] = {
    "read-outs are more accurate at the up stage (U-L1) than at the down stage (D-L2), t = 50 (S3, Figure 3)": (
        (TAPS[0], DEFAULT_TIMESTEP),
        (DEFAULT_TAP, DEFAULT_TIMESTEP),
    ),
    "read-outs are more accurate from Cross-Q than from Out at U-L1-R1, t = 50 (S3, 3.2)": (
        ("U-L1-R1-B0-Out", DEFAULT_TIMESTEP),
        (DEFAULT_TAP, DEFAULT_TIMESTEP),
    ),
    "read-outs are more accurate at t = 50 than at t = 250 (S3, Figure 3)": (
        (DEFAULT_TAP, 250),
        (DEFAULT_TAP, DEFAULT_TIMESTEP),
    ),
    "read-outs are more accurate at t = 50 than at t = 500 (S3, Figure 3)": (
        (DEFAULT_TAP, 500),
        (DEFAULT_TAP, DEFAULT_TIMESTEP),
    ),
    "read-outs are more accurate from the default tap at t = 50 than from CLIP, as on BLINK (S3, Figure 3)": (
        ("CLIP", None),
        (DEFAULT_TAP, DEFAULT_TIMESTEP),
    ),
}
"""Each trend, with the features that should be less accurate and those that should be more accurate."""


def quadrant_vectors(values: Tensor) -> Tensor:
    """Feature maps `(n, h, w, c)`, resized to 8x8 as in the model, as one vector per quadrant `(4 n, 16 c)`."""
    tokens = resize_grid(values.permute(0, 3, 1, 2), GRID)
    return quadrants(tokens.transpose(1, 2).unflatten(2, (GRID, GRID)).contiguous()).flatten(1)


def attribute_units(scores: Tensor, known: dict[str, Tensor]) -> Units:
    """One unit per image: for each attribute, the number of its quadrants and of correct predictions.

    Args:
        scores: Predictions `(4 n, values of all attributes)`.
        known: The labels of each attribute `(4 n,)`, negative where there is none.
    """
    columns = scores.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    images = len(scores) // len(quadrants(torch.zeros(1, 1, 2, 2)))
    units: Units = {str(image): {} for image in range(images)}
    for (name, label), part in zip(known.items(), columns, strict=True):
        correct = (part.argmax(dim=1) == label).view(images, -1).sum(dim=1)
        count = (label >= 0).view(images, -1).sum(dim=1)
        for image in range(images):
            units[str(image)] |= {f"{CORRECT} {name}": float(correct[image]), f"{COUNT} {name}": float(count[image])}
    return units


def _targets(scenes: list[Scene]) -> tuple[Tensor, dict[str, Tensor]]:
    known = labels(scenes)
    return torch.cat([one_hot(known[name], len(values)) for name, values in ATTRIBUTES.items()], dim=1), known


def scene_latents(model: AnalysisModel, scenes: list[Scene]) -> Tensor:
    """The latents of scenes `(n, 4, h, w)`."""
    batches = [scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH)]
    return torch.cat([model.latents([render(scene) for scene in batch]) for batch in batches])


def _read(model: AnalysisModel, latents: Tensor, taps: Sequence[str], timestep: int) -> dict[str, Tensor]:
    """Quadrant vectors of every tap at one timestep, in float16 to save memory."""
    found: dict[str, list[Tensor]] = {tap: [] for tap in taps}
    for batch in tqdm(latents.split(BATCH), desc=f"t = {timestep}", leave=False):
        for feature in read_features(model.tower, batch, taps=taps, timesteps=[timestep]):
            found[feature.tap].append(quadrant_vectors(feature.values).half().cpu())
    return {tap: torch.cat(parts) for tap, parts in found.items()}


def _clip(parts: Path, scenes: list[Scene]) -> Tensor:
    encoder = VisionEncoder(str(parts / "clip"))
    batches = [scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH)]
    patches = torch.cat([encoder([render(scene) for scene in batch])[0].cpu() for batch in batches])
    side = round(patches.shape[1] ** 0.5)
    return quadrant_vectors(patches.unflatten(1, (side, side)))


def measure(parts: Path, work: Path, scale: StudyScale, noise_seed: int = 0) -> dict[str, Any]:
    """Read-out accuracies by tap and timestep, and of CLIP and the most frequent values.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.
        noise_seed: Selects the noise map.

    Returns:
        `dict[str, Any]`: `rows` and `claims`.
    """
    return results(accuracies(parts, "diffusion", TAPS, TIMESTEPS, scale, noise_seed), TRENDS)


def accuracies(
    parts: Path, diffusion: str, taps: Sequence[str], timesteps: Sequence[int], scale: StudyScale, noise_seed: int = 0
) -> dict[Place, Units]:
    """Units of the read-outs from each tap at each timestep, from CLIP, and of the most frequent values.

    Args:
        parts: The folder of the miniature's parts.
        diffusion: The folder of the diffusion model in it.
        taps: The names of its taps.
        timesteps: Its timesteps.
        scale: The budgets.
        noise_seed: Selects the noise map.
    """
    counts = dict(zip(("train", "test"), scale.readout, strict=True))
    scenes = {split: [sample_scene(split, seed) for seed in range(count)] for split, count in counts.items()}
    targets = {split: _targets(scenes[split]) for split in scenes}
    model = load_analysis_model(str(parts / diffusion))
    model.tower.config.noise_seed = noise_seed
    latents = {split: scene_latents(model, scenes[split]) for split in scenes}

    def read_out(features: dict[str, Tensor]) -> Units:
        fitted = fit_readout(features["train"], targets["train"][0])
        return attribute_units(fitted(features["test"]), targets["test"][1])

    units: dict[Place, Units] = {}
    for timestep in timesteps:
        read = {split: _read(model, latents[split], taps, timestep) for split in scenes}
        for tap in tqdm(taps, desc=f"read-outs at t = {timestep}", leave=False):
            units[tap, timestep] = read_out({split: read[split][tap] for split in read})
    units["CLIP", None] = read_out({split: _clip(parts, scenes[split]) for split in scenes})
    frequent = targets["train"][0].mean(dim=0).expand(len(targets["test"][0]), -1)
    units["most frequent value", None] = attribute_units(frequent, targets["test"][1])
    return units


def results(units: dict[Place, Units], trends: dict[str, tuple[Place, Place]]) -> dict[str, Any]:
    """Accuracies with their intervals, and the verdicts on trends."""
    return {
        "rows": [
            {
                "tap": tap,
                "timestep": timestep,
                "scores": shares(unit_means(found)),
                "intervals": intervals(found, shares),
            }
            for (tap, timestep), found in units.items()
        ],
        "claims": [
            claim(trend, units[lower], units[higher], shares, "mean") for trend, (lower, higher) in trends.items()
        ],
    }
