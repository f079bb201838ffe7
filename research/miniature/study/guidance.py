"""(e) Guidance ensembles, and what a question's features tell: one linear read-out of the answer for all questions.

The read-out does not see the question, only the features that the diffusion model gives when it is asked: without
guidance they cannot say which object is meant. S3, section 6, leaves ensembles of guidance scales open.
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

from sdllava.analysis.loading import Subject, load_subject
from sdllava.analysis.reading import read_features
from sdllava.guidance import guide
from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Units, intervals
from sdllava.scenes.dataset import Question, render, sample_question

from .claims import claim
from .readout import fit_readout, one_hot, right_of, shares
from .scales import StudyScale
from .taps import BATCH, DEFAULT_TAP, DEFAULT_TIMESTEP

POOLED = 2
ENSEMBLE = (0.0, 1.0, 4.0)
GUIDANCE = (0.0, 1.0, 4.0, 7.0)
MEAN, CONCAT = "mean of s = 0, 1, 4", "s = 0, 1, 4 side by side"
GUESS = "most frequent answer"


def asked_features(
    subject: Subject, images: Sequence[Image.Image], prompts: Sequence[str], title: str
) -> tuple[Tensor, Tensor]:
    """Unconditional and conditional features of the default tap, averaged over quadrants, each `(n, 4 channels)`."""
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in tqdm(range(0, len(images), BATCH), desc=title, leave=False):
        rows = slice(start, start + BATCH)
        latents = subject.latents(images[rows])
        asked = subject.prompts(prompts[rows])
        maps = read_features(subject.tower, latents, asked, [DEFAULT_TAP], [DEFAULT_TIMESTEP], [0.0, 1.0])
        for half, feature in zip(halves, maps, strict=True):
            half.append(F.adaptive_avg_pool2d(feature.values.permute(0, 3, 1, 2).float(), POOLED).flatten(1).cpu())
    return torch.cat(halves[0]), torch.cat(halves[1])


def ensembles(unconditional: Tensor, conditional: Tensor) -> dict[str, Tensor]:
    """The features at every guidance scale, and the ensembles of three scales."""
    at = {scale: guide(unconditional, conditional, scale) for scale in GUIDANCE}
    found = {f"s = {scale:g}": features for scale, features in at.items()}
    several = [at[scale] for scale in ENSEMBLE]
    return found | {MEAN: torch.stack(several).mean(dim=0), CONCAT: torch.cat(several, dim=1)}


def answers_by_kind(questions: Sequence[Question]) -> dict[str, Counter]:
    """How often each answer was given to each kind of question."""
    found: dict[str, Counter] = defaultdict(Counter)
    for question in questions:
        found[question.kind][question.answer] += 1
    return found


def _units(scores: Tensor, questions: Sequence[Question], answers: list[str], allowed: dict[str, Counter]) -> Units:
    """Right where the highest score among the answers that the kind of question may have is the answer's."""
    may = torch.tensor([[answer in allowed[question.kind] for answer in answers] for question in questions])
    chosen = scores.masked_fill(~may, -torch.inf).argmax(dim=1).tolist()
    right = [answers[k] == question.answer for k, question in zip(chosen, questions, strict=True)]
    return right_of([question.pattern for question in questions], right)


def measure(parts: Path, work: Path, scale: StudyScale, noise_seed: int = 0) -> dict[str, Any]:
    """Read-out accuracies by guidance scale and ensemble, with the most frequent answers beside them."""
    subject = load_subject(str(parts / "diffusion"))
    subject.tower.config.noise_seed = noise_seed
    counts = dict(zip(("train", "test"), scale.asked, strict=True))
    asked = {split: [sample_question(split, seed) for seed in range(count)] for split, count in counts.items()}
    features = {}
    for split, pairs in asked.items():
        images, texts = [render(scene) for scene, _ in pairs], [question.text for _, question in pairs]
        features[split] = ensembles(*asked_features(subject, images, texts, f"asked features, {split}"))
    questions = {split: [question for _, question in pairs] for split, pairs in asked.items()}
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
    units[GUESS] = right_of([q.pattern for q in tested], guesses)
    trends = (
        ("asking with the question at s = 4 tells more of its answer than not asking (S3, 5.1)", "s = 0", "s = 4"),
        ("more guidance tells more: s = 4 beside s = 1 (S3, 5.1)", "s = 1", "s = 4"),
        ("the mean over s = 0, 1, 4 tells more than s = 4 alone (S3, 6, open)", "s = 4", MEAN),
        ("s = 0, 1, 4 side by side tell more than s = 4 alone (S3, 6, open)", "s = 4", CONCAT),
    )
    return {
        "rows": {
            name: {"scores": shares(unit_means(found)), "intervals": intervals(found, shares)}
            for name, found in units.items()
        },
        "claims": [claim(trend, units[lower], units[higher], shares, "mean") for trend, lower, higher in trends],
    }
