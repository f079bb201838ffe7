"""Bootstrap intervals of scores that are functions of means over units; paired where two runs share their units."""

from collections.abc import Callable

import numpy as np

Units = dict[str, dict[str, float]]
Scores = Callable[[dict[str, float]], dict[str, float]]

REPLICATES = 2000
SEED = 0


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


def intervals(units: Units, scores: Scores, seed: int = SEED) -> dict[str, list[float]]:
    """The 95% percentile interval of every score, from 2,000 resamples of the units (no width at 0 and 100%).

    Args:
        units: unit id -> named numbers.
        scores: mean of each number over the units -> named scores.
    """
    if not units:
        return {}
    drawn = _replicates(units, scores, _weights(len(units), seed))
    return {name: _percentiles([row[name] for row in drawn if name in row]) for name in _plain(units, scores)}


def difference(first: Units, second: Units, scores: Scores, metric: str, seed: int = SEED) -> dict:
    """Second minus first in one score, with its 95% interval.

    Where both have the same units, they are resampled together (paired), so that what is common to both cancels;
    otherwise each is resampled on its own. Resamples that drew no unit of the score are left out.

    Returns:
        `{"difference", "interval", "paired"}`.
    """
    paired = set(first) == set(second)
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
