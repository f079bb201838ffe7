"""(a) S3, Figure 3: which tap at which timestep tells most about a scene, read off each quadrant without a model."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdllava.analysis.loading import Subject, load_subject
from sdllava.analysis.reading import read_features
from sdllava.analysis.similarity import StaticEncoder
from sdllava.grids import resize_grid
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.scenes.dataset import Scene, render, sample_scene

from ..judge import ATTRIBUTES, labels, quadrants
from .claims import claim
from .readout import fit_readout, one_hot, shares
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


def quadrant_vectors(values: Tensor) -> Tensor:
    """Feature maps `(n, h, w, c)`, resized to 8x8 as the model does, as a vector a quadrant `(4 n, 16 c)`."""
    tokens = resize_grid(values.permute(0, 3, 1, 2), GRID)
    return quadrants(tokens.transpose(1, 2).unflatten(2, (GRID, GRID)).contiguous()).flatten(1)


def attribute_units(scores: Tensor, known: dict[str, Tensor]) -> Units:
    """Units of images: how many of each attribute there are to read, and how many were read rightly."""
    columns = scores.split([len(values) for values in ATTRIBUTES.values()], dim=1)
    images = len(scores) // len(quadrants(torch.zeros(1, 1, 2, 2)))
    units: Units = {str(image): {} for image in range(images)}
    for (name, label), part in zip(known.items(), columns, strict=True):
        right = (part.argmax(dim=1) == label).view(images, -1).sum(dim=1)
        count = (label >= 0).view(images, -1).sum(dim=1)
        for image in range(images):
            units[str(image)] |= {f"right {name}": float(right[image]), f"count {name}": float(count[image])}
    return units


def _targets(scenes: list[Scene]) -> tuple[Tensor, dict[str, Tensor]]:
    known = labels(scenes)
    return torch.cat([one_hot(known[name], len(values)) for name, values in ATTRIBUTES.items()], dim=1), known


def _latents(subject: Subject, scenes: list[Scene]) -> Tensor:
    batches = [scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH)]
    return torch.cat([subject.latents([render(scene) for scene in batch]) for batch in batches])


def _read(subject: Subject, latents: Tensor, timestep: int) -> dict[str, Tensor]:
    """Quadrant vectors of every tap at one timestep, in half precision to save memory."""
    found: dict[str, list[Tensor]] = {tap: [] for tap in TAPS}
    for batch in tqdm(latents.split(BATCH), desc=f"t = {timestep}", leave=False):
        for feature in read_features(subject.tower, batch, taps=TAPS, timesteps=[timestep]):
            found[feature.tap].append(quadrant_vectors(feature.values).half().cpu())
    return {tap: torch.cat(parts) for tap, parts in found.items()}


def _clip(parts: Path, scenes: list[Scene]) -> Tensor:
    encoder = StaticEncoder(str(parts / "clip"))
    batches = [scenes[start : start + BATCH] for start in range(0, len(scenes), BATCH)]
    patches = torch.cat([encoder([render(scene) for scene in batch])[0].cpu() for batch in batches])
    side = round(patches.shape[1] ** 0.5)
    return quadrant_vectors(patches.unflatten(1, (side, side)))


def measure(parts: Path, work: Path, scale: StudyScale, noise_seed: int = 0) -> dict[str, Any]:
    """Read-out accuracies by tap and timestep, with CLIP and the most frequent values beside them."""
    counts = dict(zip(("train", "test"), scale.readout, strict=True))
    scenes = {split: [sample_scene(split, seed) for seed in range(count)] for split, count in counts.items()}
    told = {split: _targets(scenes[split]) for split in scenes}
    subject = load_subject(str(parts / "diffusion"))
    subject.tower.config.noise_seed = noise_seed
    latents = {split: _latents(subject, scenes[split]) for split in scenes}

    def read_out(features: dict[str, Tensor]) -> Units:
        return attribute_units(fit_readout(features["train"], told["train"][0])(features["test"]), told["test"][1])

    units: dict[tuple[str, int | None], Units] = {}
    for timestep in TIMESTEPS:
        read = {split: _read(subject, latents[split], timestep) for split in scenes}
        for tap in tqdm(TAPS, desc=f"read-outs at t = {timestep}", leave=False):
            units[tap, timestep] = read_out({split: read[split][tap] for split in read})
    units["CLIP", None] = read_out({split: _clip(parts, scenes[split]) for split in scenes})
    frequent = told["train"][0].mean(dim=0).expand(len(told["test"][0]), -1)
    units["most frequent value", None] = attribute_units(frequent, told["test"][1])
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
        "claims": _claims(units),
    }


def _claims(units: dict) -> list[dict]:
    default, t = units[DEFAULT_TAP, DEFAULT_TIMESTEP], DEFAULT_TIMESTEP
    trends = (
        ("the up stage (U-L1) tells more than the down stage (D-L2) at t = 50 (S3, Figure 3)", (TAPS[0], t), default),
        ("Cross-Q tells more than Out at U-L1-R1, t = 50 (S3, 3.2)", ("U-L1-R1-B0-Out", t), default),
        ("t = 50 tells more than t = 250 (S3, Figure 3)", (DEFAULT_TAP, 250), default),
        ("t = 50 tells more than t = 500 (S3, Figure 3)", (DEFAULT_TAP, 500), default),
        ("the default tap at t = 50 tells more than CLIP, as on BLINK (S3, Figure 3)", ("CLIP", None), default),
    )
    return [claim(trend, units[lower], higher, shares, "mean") for trend, lower, higher in trends]
