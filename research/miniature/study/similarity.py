"""(f) S3, Figures 2c, 5c and 9: how alike the scenes of a minimal pair look, and how far a caption moves features."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from sdllava.analysis.images import AskedImage
from sdllava.analysis.loading import Subject, load_subject
from sdllava.analysis.similarity import StaticEncoder, pair_similarity
from sdllava.analysis.sweep import LiveFeatures, Places, cka, gather
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.scenes.dataset import PATTERNS, caption, minimal_pair, render, sample_scene

from .claims import claim
from .scales import StudyScale
from .taps import DEFAULT_TAP, TAPS, TIMESTEPS

OUT_TAP = "U-L1-R1-B0-Out"
GUIDANCE = (0.0, 1.0, 1.5, 4.0, 7.0)
CKA_TIMESTEP = 50


def _similarities(parts: Path, subject: Subject, scale: StudyScale) -> tuple[dict[str, Units], int]:
    """Cosine similarity of each pair at each place, and under CLIP."""
    pairs = [minimal_pair(pattern, "test", seed).scenes for seed in range(scale.pairs) for pattern in PATTERNS]
    images = [AskedImage("", render(scene), None) for pair in pairs for scene in pair]
    units: dict[str, Units] = {}
    for timestep in tqdm(TIMESTEPS, desc="similarity of pairs"):
        source = LiveFeatures(subject, images, Places(list(TAPS), [timestep], [0.0]))
        for feature in gather(source, batch_size=32):
            found = pair_similarity(feature.values[0::2], feature.values[1::2]).positions
            units[f"{feature.tap}|{timestep}"] = _units(found)
    encoder, pictures = StaticEncoder(str(parts / "clip")), [image.image for image in images]
    units["CLIP"] = _units(encoder.similarity(pictures[0::2], pictures[1::2]).positions)
    return units, len(pairs)


def _units(values) -> Units:
    return {str(k): {"similarity": float(value)} for k, value in enumerate(values)}


def _cka(subject: Subject, scale: StudyScale) -> Units:
    """CKA with the unconditional features in disjoint groups of scenes, each asked with its own caption."""
    places = Places(list(TAPS), [CKA_TIMESTEP], list(GUIDANCE))
    units: Units = {}
    for group in tqdm(range(scale.groups), desc="CKA by guidance scale"):
        scenes = [sample_scene("test", group * scale.group_size + k) for k in range(scale.group_size)]
        images = [AskedImage("", render(scene), caption(scene)) for scene in scenes]
        result = cka(LiveFeatures(subject, images, places), batch_size=32)
        units[str(group)] = {
            f"{tap}|{s:g}": float(value)
            for tap in TAPS
            for s, value in zip(*result.with_unconditional(tap, CKA_TIMESTEP), strict=True)
        }
    return units


def _column(units: Units, key: str) -> Units:
    return {group: {"CKA": values[key]} for group, values in units.items()}


def measure(parts: Path, work: Path, scale: StudyScale, noise_seed: int = 0) -> dict[str, Any]:
    """Similarities with intervals over pairs, and CKA with intervals over groups of scenes."""
    subject = load_subject(str(parts / "diffusion"))
    subject.tower.config.noise_seed = noise_seed
    alike, num_pairs = _similarities(parts, subject, scale)
    moved = _cka(subject, scale)
    default, out = f"{DEFAULT_TAP}|50", f"{OUT_TAP}|50"
    trends = (
        ("the two images of a pair look less alike to the default tap than to CLIP (S3, Figure 2c)", default, "CLIP"),
        ("pairs look more alike in Cross-Q than in Out at U-L1-R1, t = 50 (S3, Figure 2c)", out, default),
        ("pairs look less alike at t = 500 than at t = 10 (S3, Figure 2c)", f"{DEFAULT_TAP}|500", f"{DEFAULT_TAP}|10"),
    )
    claims = [claim(t, alike[lower], alike[higher], dict, "similarity", "cosine") for t, lower, higher in trends]
    moves = (
        ("s = 4 moves the default tap further than s = 1 (S3, Figure 5c)", f"{DEFAULT_TAP}|4", f"{DEFAULT_TAP}|1"),
        ("at s = 4 Out moves further than Cross-Q at U-L1-R1 (S3, Figure 5c)", f"{OUT_TAP}|4", f"{DEFAULT_TAP}|4"),
    )
    claims += [claim(t, _column(moved, a), _column(moved, b), dict, "CKA", "CKA") for t, a, b in moves]
    spread = intervals(moved, dict)
    return {
        "num_pairs": num_pairs,
        "similarity": {
            name: {"mean": unit_means(units)["similarity"], "interval": intervals(units, dict)["similarity"]}
            for name, units in alike.items()
        },
        "cka": {key: {"mean": value, "interval": spread[key]} for key, value in unit_means(moved).items()},
        "claims": claims,
    }
