"""What can be read from features without a language model: regularised least squares, and whose colours it sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdllava.evaluation.bootstrap import Units

STRENGTHS = (0.01, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Readout:
    """A linear map of standardised features."""

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
    """Ridge regression from features `(n, channels)` to targets `(n, k)`.

    The strength, one of `STRENGTHS`, is the one that predicts the last fifth of the rows best from the others; then
    all rows are used.
    """
    kept = max(1, len(features) * 4 // 5)
    tried = _solutions(features[:kept], targets[:kept], STRENGTHS)
    errors = [float((readout(features[kept:]) - targets[kept:]).square().sum()) for readout in tried]
    return _solutions(features, targets, [STRENGTHS[errors.index(min(errors))]])[0]


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """Labels `(n,)` as rows `(n, classes)`; where there is no label (a negative one), zeros."""
    rows = torch.zeros(len(labels), classes)
    known = labels >= 0
    rows[known, labels[known]] = 1.0
    return rows


def shares(means: dict[str, float]) -> dict[str, float]:
    """Percentages from means over units of `right NAME` and `count NAME`, and their unweighted mean."""
    names = [key.removeprefix("count ") for key, count in means.items() if key.startswith("count ") and count > 0]
    found = {name: 100.0 * means[f"right {name}"] / means[f"count {name}"] for name in names}
    return {"mean": sum(found.values()) / len(found), **found}


def right_of(names: Sequence[str], right: Sequence[float]) -> Units:
    """Units of single answers: each belongs to one name, and is right or not."""
    return {
        str(k): {f"right {name}": float(value), f"count {name}": 1.0}
        for k, (name, value) in enumerate(zip(names, right, strict=True))
    }


def ordered_pairs(scores: Tensor, positive: Tensor, negative: Tensor) -> Units:
    """For each row how many pairs of a positive and a negative column are ranked rightly, a tie counting half.

    Args:
        scores `(n, k)`.
        positive, negative (bool `(n, k)`): disjoint; rows without a pair give no unit.

    Returns:
        Units whose [`auc`] is the share of rightly ranked pairs; 0.5 is chance.
    """
    units = {}
    for row, (values, above, below) in enumerate(zip(scores, positive, negative, strict=True)):
        gaps = values[above][:, None] - values[below][None, :]
        if gaps.numel():
            right = float((gaps > 0).sum()) + 0.5 * float((gaps == 0).sum())
            units[str(row)] = {"right": right, "pairs": float(gaps.numel())}
    return units


def auc(means: dict[str, float]) -> dict[str, float]:
    """Area under the ROC curve from the means of [`ordered_pairs`]."""
    return {"AUC": means["right"] / means["pairs"]}
