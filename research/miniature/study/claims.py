"""Whether a trend of the papers holds, told from a measured difference and its interval alone."""

import math
from typing import Any

from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Scores, Units, difference, intervals

HOLDS, REVERSED, UNDECIDED, UNMEASURED = "Holds", "Does not hold", "Undecided within the interval", "Cannot be told"
DIGITS = {"points": 1, "CIDEr": 1}


def claim(trend: str, lower: Units, higher: Units, scores: Scores, metric: str, unit: str = "points") -> dict[str, Any]:
    """A trend of the papers, worded so that `higher` should exceed `lower`, with the difference that was found.

    Args:
        trend: the sentence, with the table or figure that it stands in.
        lower, higher: unit id -> named numbers; paired where both have the same units.
        scores, metric: see [`~sdllava.evaluation.bootstrap.difference`].
        unit: of the difference.
    """
    return {"trend": trend, "unit": unit, **difference(lower, higher, scores, metric)}


def claim_above_zero(trend: str, units: Units, scores: Scores, metric: str, unit: str, zero: float = 0.0) -> dict:
    """A trend by which one score should exceed `zero`, such as a chance level."""
    low, high = intervals(units, scores)[metric]
    return {
        "trend": trend,
        "unit": unit,
        "difference": scores(unit_means(units))[metric] - zero,
        "interval": [low - zero, high - zero],
        "paired": True,
    }


def verdict(interval: list[float | None]) -> str:
    """The trend holds where the whole 95% interval lies above zero, does not where it lies below."""
    if any(bound is None or not math.isfinite(bound) for bound in interval):
        return UNMEASURED
    low, high = interval
    return HOLDS if low > 0 else REVERSED if high < 0 else UNDECIDED


def sentence(found: dict[str, Any]) -> str:
    """The verdict on a claim with its numbers, as one line."""
    told = verdict(found["interval"])
    if told == UNMEASURED:
        return f"**{told}**: {found['trend']} (the features do not vary, or the budget is too small)"
    low, high = found["interval"]
    digits = DIGITS.get(found["unit"], 3)
    numbers = f"{found['difference']:+.{digits}f} {found['unit']} [{low:+.{digits}f}, {high:+.{digits}f}]"
    others = " and ".join(f"{other:+.{digits}f}" for other in found.get("under_other_noise", ()))
    return f"**{told}**: {found['trend']}: {numbers}" + (f"; under other noise {others}" if others else "")
