"""Bootstrap intervals of scores that are functions of means over units, paired if two runs share their units."""

from collections.abc import Callable
from typing import Any

import numpy as np

Units = dict[str, dict[str, float]]
"""Unit id -> named numbers. A unit is what a score averages over, for example a question or a pair of questions."""
Scores = Callable[[dict[str, float]], dict[str, float]]
"""Mean of each number over the units -> named scores."""

REPLICATES = 2000
SEED = 0


def intervals(units: Units, scores: Scores, seed: int = SEED) -> dict[str, list[float]]:
    """The 95% percentile interval of every score, from 2,000 resamples of the units.

    Intervals have zero width at 0 and 100%.

    Args:
        units: Unit id -> named numbers.
        scores: Mean of each number over the units -> named scores.
        seed: Seed of the resamples.
    """
    if not units:
        return {}
    drawn = _replicates(units, scores, _weights(len(units), seed))
    return {name: _percentiles([row[name] for row in drawn if name in row]) for name in _plain(units, scores)}


def difference(
    first: Units, second: Units, scores: Scores, metric: str, seed: int = SEED, same_questions: bool = True
) -> dict[str, Any]:
    """Second minus first in one score, with its 95% interval.

    If both runs have the same units of the same questions, they are resampled together (paired), so that shared
    variation cancels. Otherwise each run is resampled independently. Resamples that lack the score are left out.

    Args:
        first: Units of the first run.
        second: Units of the second run.
        scores: Mean of each number over the units -> named scores.
        metric: Name of the score to compare.
        seed: Seed of the resamples.
        same_questions: Whether units with the same id are about the same question.

    Returns:
        `dict`: `difference` (`float`), `interval` (`[low, high]`) and `paired` (`bool`).
    """
    paired = same_questions and set(first) == set(second)
    if paired:
        second = {name: second[name] for name in first}
    weights = _weights(len(first), seed)
    a = _replicates(first, scores, weights)
    b = _replicates(second, scores, weights if paired else _weights(len(second), seed + 1))
    drawn = [y[metric] - x[metric] for x, y in zip(a, b, strict=True) if metric in x and metric in y]
    return {
        "difference": _plain(second, scores)[metric] - _plain(first, scores)[metric],
        "interval": _percentiles(drawn),
        "paired": paired,
    }


def wilson(percentage: float, count: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share of right answers, in percent. It has a width also at 0 and 100%.

    Args:
        percentage: The share, in percent.
        count: The number of answers, above 0.
    """
    z, share = 1.96, percentage / 100
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def _table(units: Units) -> tuple[list[str], np.ndarray]:
    keys = sorted({key for values in units.values() for key in values})
    return keys, np.array([[values.get(key, 0.0) for key in keys] for values in units.values()], dtype=np.float64)


def _plain(units: Units, scores: Scores) -> dict[str, float]:
    keys, table = _table(units)
    return scores(dict(zip(keys, table.mean(0).tolist(), strict=True)))


def _replicates(units: Units, scores: Scores, weights: np.ndarray) -> list[dict[str, float]]:
    keys, table = _table(units)
    return [scores(dict(zip(keys, row, strict=True))) for row in (weights @ table).tolist()]


def _weights(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=REPLICATES) / count


def _percentiles(values: list[float]) -> list[float]:
    return [float(value) for value in np.percentile(values, [2.5, 97.5])]
