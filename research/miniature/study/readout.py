"""Linear read-outs of features: ridge regression, and the scores of its predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdllava.evaluation.benchmarks.groups import group_means, in_groups
from sdllava.evaluation.bootstrap import Units

STRENGTHS = (0.01, 0.1, 1.0, 10.0)
CORRECT = "correct"


@dataclass(frozen=True)
class Readout:
    """A linear map of standardised features, from [`fit_readout`]."""

    mean: Tensor
    deviation: Tensor
    weights: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Features `(n, channels)` as scores `(n, targets)`."""
        return (features.float() - self.mean) / self.deviation @ self.weights + self.bias


def _solutions(features: Tensor, targets: Tensor, strengths: Sequence[float]) -> list[Readout]:
    features = features.float()
    mean, deviation = features.mean(dim=0), features.std(dim=0, unbiased=False).clamp(min=1e-6)
    bias = targets.mean(dim=0)
    standard = (features - mean) / deviation
    gram = (standard.T @ standard / len(standard)).double()
    products = (standard.T @ (targets - bias) / len(standard)).double()
    ridges = [gram + strength * torch.eye(len(gram), dtype=gram.dtype) for strength in strengths]
    weights = [torch.cholesky_solve(products, torch.linalg.cholesky(ridge)).float() for ridge in ridges]
    return [Readout(mean, deviation, solved, bias) for solved in weights]


def fit_readout(features: Tensor, targets: Tensor) -> Readout:
    """Fit a ridge regression from features `(n, channels)` to targets `(n, k)`.

    Its strength is the one of `STRENGTHS` with the smallest error on the last fifth of the rows when fitted on the
    others. The returned read-out is fitted on all rows.
    """
    kept = max(1, len(features) * 4 // 5)
    tried = _solutions(features[:kept], targets[:kept], STRENGTHS)
    errors = [float((readout(features[kept:]) - targets[kept:]).square().sum()) for readout in tried]
    return _solutions(features, targets, [STRENGTHS[errors.index(min(errors))]])[0]


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels `(n,)` as rows `(n, classes)`. Negative labels give zeros."""
    rows = torch.zeros(len(labels), classes)
    known = labels >= 0
    rows[known, labels[known]] = 1.0
    return rows


def shares(means: dict[str, float]) -> dict[str, float]:
    """Percentages of correct answers by group, from the means over units, and their unweighted mean."""
    found = {name: 100.0 * share for name, share in group_means(means, CORRECT).items()}
    return {"mean": sum(found.values()) / len(found), **found}


def answer_units(groups: Sequence[str], correct: Sequence[float]) -> Units:
    """Units of single answers, each in one group, and correct (1) or not (0)."""
    return {
        str(k): in_groups([group], **{CORRECT: float(value)})
        for k, (group, value) in enumerate(zip(groups, correct, strict=True))
    }


def ordered_pairs(scores: Tensor, positive: Tensor, negative: Tensor) -> Units:
    """Count the correctly ordered pairs of a positive and a negative column in each row. A tie counts one half.

    Args:
        scores: Scores `(n, k)`.
        positive: Bool `(n, k)`.
        negative: Bool `(n, k)`, disjoint from `positive`.

    Returns:
        `Units`: One unit per row with a pair. Their [`auc`] is the share of correctly ordered pairs (chance: 0.5).
    """
    units = {}
    for row, (values, above, below) in enumerate(zip(scores, positive, negative, strict=True)):
        gaps = values[above][:, None] - values[below][None, :]
        if gaps.numel():
            correct = float((gaps > 0).sum()) + 0.5 * float((gaps == 0).sum())
            units[str(row)] = {CORRECT: correct, "pairs": float(gaps.numel())}
    return units


def auc(means: dict[str, float]) -> dict[str, float]:
    """Area under the ROC curve from the means of [`ordered_pairs`]."""
    return {"AUC": means[CORRECT] / means["pairs"]}
