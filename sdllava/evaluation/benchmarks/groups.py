"""Numbers by group (task, pattern, category), stored as the named numbers that scores are computed from."""

from collections import Counter
from collections.abc import Iterable, Mapping

COUNT = "count"


def in_groups(groups: Iterable[str], **numbers: float) -> dict[str, float]:
    """The named numbers of one unit in each of its groups, and its count of 1 there.

    Example:
        `in_groups(["Jigsaw"], right=1.0)` is `{"right Jigsaw": 1.0, "count Jigsaw": 1.0}`.
    """
    return {_key(name, group): value for group in groups for name, value in {**numbers, COUNT: 1.0}.items()}


def group_means(means: Mapping[str, float], number: str) -> dict[str, float]:
    """Group -> mean of one number over the group's units, from means over all units.

    Args:
        means: Mean over all units of each number that `in_groups` names, where an absent number counts as 0.
        number: Name of the number, for example "right".

    Returns:
        `dict[str, float]`: Groups without units are left out, as in a bootstrap resample that drew none.
    """
    prefix = _key(COUNT, "")
    counts = {name.removeprefix(prefix): value for name, value in means.items() if name.startswith(prefix)}
    return {group: means[_key(number, group)] / count for group, count in counts.items() if count > 0}


def group_counts(units: Iterable[Mapping[str, float]]) -> dict[str, int]:
    """Group -> its number of units.

    Args:
        units: The named numbers of each unit.
    """
    prefix = _key(COUNT, "")
    return dict(Counter(name.removeprefix(prefix) for unit in units for name in unit if name.startswith(prefix)))


def _key(number: str, group: str) -> str:
    return f"{number} {group}"
