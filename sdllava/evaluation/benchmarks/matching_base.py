"""The interface of a matching benchmark: items of images and texts, and the verdicts on their scores.

Every score matrix s here has s[t][i] = score of text t with image i; text k belongs to image k. Most items have two of
each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import ImageSource, unit_means
from .groups import group_means, in_groups

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class MatchingItem:
    """Images and texts, where text k describes image k. `info` may contain a visual `pattern`."""

    id: str
    images: tuple[ImageSource, ...]
    texts: tuple[str, ...]
    info: dict[str, Any] = field(default_factory=dict)


def picks_both_images(s: Matrix) -> bool:
    """MMVP-VLM's verdict: whether each text has the higher probability, over the two images, on its own image.

    Image 1 is chosen if its probability is above 0.5, otherwise image 2. A tie goes to image 2.
    """
    return bool(s[0][0] > s[0][1]) and not s[1][0] > s[1][1]


def winoground_verdicts(s: Matrix) -> dict[str, bool]:
    """Text, image and group verdicts with strict inequalities (Winoground, arXiv 2204.03162, section 3)."""
    text = s[0][0] > s[1][0] and s[1][1] > s[0][1]
    image = s[0][0] > s[0][1] and s[1][1] > s[1][0]
    return {"text": bool(text), "image": bool(image), "group": bool(text and image)}


class MatchingBenchmark:
    """Reads items and computes percentages from their scores. The unit of averages and bootstraps is an item.

    By default an item counts if both texts pick their image, there is a score for each `info["pattern"]`, and "average"
    is the unweighted mean of the patterns.
    """

    name: str
    hub_id: str
    metric: str = "average"
    prefix: str = ""  # prepended to every text
    files: tuple[str, ...] = ("*",)

    def read(self, folder: Path) -> list[MatchingItem]:
        """All items of the published layout in `folder`, in the published order."""
        raise NotImplementedError

    def verdicts(self, matrix: Matrix) -> dict[str, float]:
        """Named verdicts (0 or 1) on the scores of one item."""
        return {"pair": float(picks_both_images(matrix))}

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """Item id -> named numbers, from records that hold `id`, `pattern` and `verdicts`."""
        return {record["id"]: in_groups([record["pattern"]], pair=record["verdicts"]["pair"]) for record in records}

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """The unweighted mean of the patterns, and the score of each pattern."""
        scores = {pattern: 100.0 * mean for pattern, mean in group_means(means, "pair").items()}
        return {"average": sum(scores.values()) / len(scores), **scores}

    def score(self, items: Sequence[MatchingItem], matrices: Sequence[Matrix]) -> dict[str, float]:
        """Percentages from one matrix per item.

        Raises:
            ValueError: `items` is empty.
        """
        if not items:
            raise ValueError(f"{self.name}: there are no items to score. Check the data folder.")
        records = [
            {"id": item.id, **item.info, "verdicts": self.verdicts(matrix)}
            for item, matrix in zip(items, matrices, strict=True)
        ]
        return self.scores(unit_means(self.units(records)))

    def chance(self) -> dict[str, float]:
        """The scores of random guessing, in percent."""
        return {self.metric: 25.0}
