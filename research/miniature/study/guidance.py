"""(e) S3, section 6: guidance ensembles, measured with one linear read-out of the answers to all questions.

The read-out's input is only the features, conditioned on the question. Without guidance they do not identify the object
in question. S3 leaves ensembles of guidance scales open.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from sdllava.analysis.loading import AnalysisModel, load_analysis_model
from sdllava.analysis.reading import read_features
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.guidance import guide
from sdllava.scenes.language import Question, sample_question
from sdllava.scenes.render import render

from .claims import claim
from .readout import answer_units, fit_readout, one_hot, shares
from .scales import StudyScale
from .taps import BATCH, DEFAULT_TAP, DEFAULT_TIMESTEP

POOLED = 2
ENSEMBLE = (0.0, 1.0, 4.0)
GUIDANCE = (0.0, 1.0, 4.0, 7.0)
MEAN, CONCAT = "mean of s = 0, 1, 4", "s = 0, 1, 4 concatenated"
GUESS = "most frequent answer"
TRENDS = {
    "answers are read more accurately at s = 4 than at s = 0 (S3, 5.1)": ("s = 0", "s = 4"),
    "answers are read more accurately at s = 4 than at s = 1 (S3, 5.1)": ("s = 1", "s = 4"),
    "answers are read more accurately from the mean over s = 0, 1, 4 than at s = 4 (S3, 6, open)": ("s = 4", MEAN),
    "answers are read more accurately from s = 0, 1, 4 concatenated than at s = 4 (S3, 6, open)": ("s = 4", CONCAT),
}
"""Each trend, with the features that should be less accurate and those that should be more accurate."""


def quadrant_features(
    model: AnalysisModel,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    title: str,
    tap: str = DEFAULT_TAP,
    timestep: int = DEFAULT_TIMESTEP,
) -> tuple[Tensor, Tensor]:
    """Read the features of a tap, averaged over quadrants.

    Args:
        model: The diffusion model.
        images: The images.
        prompts: One prompt per image.
        title: The label of the progress bar.
        tap: The tap.
        timestep: The timestep.

    Returns:
        `tuple`: Unconditional and conditional features, each `(n, 4 channels)`.
    """
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in tqdm(range(0, len(images), BATCH), desc=title, leave=False):
        rows = slice(start, start + BATCH)
        latents, encoded = model.latents(images[rows]), model.prompts(prompts[rows])
        maps = read_features(model.tower, latents, encoded, [tap], [timestep], [0.0, 1.0])
        for half, feature in zip(halves, maps, strict=True):
            half.append(F.adaptive_avg_pool2d(feature.values.permute(0, 3, 1, 2).float(), POOLED).flatten(1).cpu())
    return torch.cat(halves[0]), torch.cat(halves[1])


def ensembles(unconditional: Tensor, conditional: Tensor) -> dict[str, Tensor]:
    """The features at every guidance scale, and two ensembles of three scales, by name."""
    at = {scale: guide(unconditional, conditional, scale) for scale in GUIDANCE}
    found = {f"s = {scale:g}": features for scale, features in at.items()}
    several = [at[scale] for scale in ENSEMBLE]
    return found | {MEAN: torch.stack(several).mean(dim=0), CONCAT: torch.cat(several, dim=1)}


def answers_by_kind(questions: Sequence[Question]) -> dict[str, Counter]:
    """The frequency of each answer to each kind of question."""
    found: dict[str, Counter] = defaultdict(Counter)
    for question in questions:
        found[question.kind][question.answer] += 1
    return found


def _units(scores: Tensor, questions: Sequence[Question], answers: list[str], allowed: dict[str, Counter]) -> Units:
    """Units of the answers with the highest score among those that the kind of question allows."""
    possible = torch.tensor([[answer in allowed[question.kind] for answer in answers] for question in questions])
    chosen = scores.masked_fill(~possible, -torch.inf).argmax(dim=1).tolist()
    correct = [answers[k] == question.answer for k, question in zip(chosen, questions, strict=True)]
    return answer_units([question.pattern for question in questions], correct)


def measure(parts: Path, work: Path, scale: StudyScale, noise_seed: int = 0) -> dict[str, Any]:
    """Read-out accuracies by guidance scale and ensemble, and of the most frequent answers.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.
        noise_seed: Selects the noise map.

    Returns:
        `dict[str, Any]`: `rows` and `claims`.
    """
    model = load_analysis_model(str(parts / "diffusion"))
    model.tower.config.noise_seed = noise_seed
    counts = dict(zip(("train", "test"), scale.answers, strict=True))
    sampled = {split: [sample_question(split, seed) for seed in range(count)] for split, count in counts.items()}
    features = {}
    for split, pairs in sampled.items():
        images, texts = [render(scene) for scene, _ in pairs], [question.text for _, question in pairs]
        features[split] = ensembles(*quadrant_features(model, images, texts, f"features, {split}"))
    questions = {split: [question for _, question in pairs] for split, pairs in sampled.items()}
    allowed = answers_by_kind(questions["train"])
    known = [question.kind in allowed for question in questions["test"]]
    tested = [question for question, keep in zip(questions["test"], known, strict=True) if keep]
    answers = sorted({question.answer for question in questions["train"]})
    targets = one_hot(torch.tensor([answers.index(q.answer) for q in questions["train"]]), len(answers))
    units = {
        name: _units(fit_readout(values, targets)(features["test"][name][known]), tested, answers, allowed)
        for name, values in features["train"].items()
    }
    guesses = [allowed[q.kind].most_common(1)[0][0] == q.answer for q in tested]
    units[GUESS] = answer_units([q.pattern for q in tested], guesses)
    return {
        "rows": {
            name: {"scores": shares(unit_means(found)), "intervals": intervals(found, shares)}
            for name, found in units.items()
        },
        "claims": [
            claim(trend, units[lower], units[higher], shares, "mean") for trend, (lower, higher) in TRENDS.items()
        ],
    }
