"""MMVP-VLM: 135 pairs of images and statements, 15 for each of nine visual patterns (arXiv 2401.06209).

A pair counts if the correct image scores higher for each of its two statements. The pattern is given by the block of 15
consecutive pairs in the CSV, not by its type column. The average is over the nine patterns. Chance: 25%.
"""

import csv
from pathlib import Path

from .base import find_folder, inside
from .matching_base import MatchingBenchmark, MatchingItem

PATTERNS = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural Characteristics",
    "Texts",
    "Viewpoint and Perspective",
)
PAIRS_PER_PATTERN = 15


class MMVPVLM(MatchingBenchmark):
    """MMVP-VLM from the published CSV and folder of images. Scores by visual pattern and their mean."""

    name = "mmvp_vlm"
    hub_id = "MMVP/MMVP_VLM"
    prefix = "a photo of "

    def read(self, folder: Path) -> list[MatchingItem]:
        """Pairs of images and statements in the order of `Questions.csv`, which determines the pattern."""
        images = find_folder(folder, "MLLM_VLM Images", "MMVP_VLM_Images")
        with inside(folder, "Questions.csv").open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row][1:]
        if any(len(row) != 3 for row in rows):
            bad = next(row for row in rows if len(row) != 3)
            raise ValueError(
                f"MMVP-VLM: the row {bad} of Questions.csv has {len(bad)} columns. Use the published file, with the "
                "columns id, type and statement."
            )
        if len(rows) % 2 or len(rows) > 2 * PAIRS_PER_PATTERN * len(PATTERNS):
            raise ValueError(f"MMVP-VLM: Questions.csv has {len(rows)} rows. Use the published file, with 270 rows.")
        return [
            self._item(images, number, first, second)
            for number, (first, second) in enumerate(zip(rows[::2], rows[1::2], strict=True))
        ]

    def _item(self, images: Path, number: int, first: list[str], second: list[str]) -> MatchingItem:
        ids = first[0].strip(), second[0].strip()
        if not all(map(str.isdecimal, ids)) or int(ids[0]) % 2 != 1 or int(ids[1]) % 2 != 0:
            raise ValueError(
                f"MMVP-VLM: the ids {ids[0]!r} and {ids[1]!r} of Questions.csv are not an odd and an even number. Use "
                "the published file."
            )
        return MatchingItem(
            id=f"{ids[0]}-{ids[1]}",
            images=(inside(images, f"{first[1]}/{ids[0]}.jpg"), inside(images, f"{first[1]}/{ids[1]}.jpg")),
            texts=(first[2], second[2]),
            info={"pattern": PATTERNS[number // PAIRS_PER_PATTERN]},
        )
