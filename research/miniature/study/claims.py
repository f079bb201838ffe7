"""Verdicts on trends of the papers, from a measured difference and its interval."""

import math
from typing import Any

from sdllava.evaluation.benchmarks.base import unit_means
from sdllava.evaluation.bootstrap import Scores, Units, difference, intervals

HOLDS, REVERSED, UNDECIDED, UNMEASURED = "Holds", "Does not hold", "Undecided within the interval", "Not measurable"
DIGITS = {"points": 1, "CIDEr": 1}


def claim(trend: str, lower: Units, higher: Units, scores: Scores, metric: str, unit: str = "points") -> dict[str, Any]:
    """The measured difference of a trend.

    Args:
        trend: The trend by which `higher` should exceed `lower`, with its table or figure.
        lower: Numbers by unit, see [`~sdllava.evaluation.bootstrap.difference`].
        higher: Numbers by unit. The difference is paired where both have the same units.
        scores: Scores from the means of the numbers.
        metric: The score that is compared.
        unit: The unit of the difference.

    Returns:
        `dict[str, Any]`: The trend, the unit, and the difference with its 95% interval.
    """
    return {"trend": trend, "unit": unit, **difference(lower, higher, scores, metric)}


def claim_above_zero(
    trend: str, units: Units, scores: Scores, metric: str, unit: str, zero: float = 0.0
) -> dict[str, Any]:
    """As [`claim`], for a trend by which one score should exceed `zero`, such as a chance level."""
    low, high = intervals(units, scores)[metric]
    return {
        "trend": trend,
        "unit": unit,
        "difference": scores(unit_means(units))[metric] - zero,
        "interval": [low - zero, high - zero],
        "paired": True,
    }


def verdict(interval: list[float | None]) -> str:
    """A trend holds if its whole 95% interval is above zero, and does not hold if the interval is below zero."""
    low, high = interval
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return UNMEASURED
    return HOLDS if low > 0 else REVERSED if high < 0 else UNDECIDED


def sentence(found: dict[str, Any]) -> str:
    """The verdict on a claim, with its numbers, as one line."""
    decided = verdict(found["interval"])
    if decided == UNMEASURED:
        return f"**{decided}**: {found['trend']} (the features do not vary, or the budget is too small)"
    low, high = found["interval"]
    digits = DIGITS.get(found["unit"], 3)
    numbers = f"{found['difference']:+.{digits}f} {found['unit']} [{low:+.{digits}f}, {high:+.{digits}f}]"
    others = " and ".join(f"{other:+.{digits}f}" for other in found.get("under_other_noise", ()))
    return f"**{decided}**: {found['trend']}: {numbers}" + (f"; with other noise {others}" if others else "")
