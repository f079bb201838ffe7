"""Winoground: 400 pairs of images and captions with the same words in a different order (arXiv 2204.03162).

Text, image and group scores with strict inequalities. Chance: 25 / 25 / 16.67. The data set is gated on the Hub: accept
its terms there and log in, or give a local folder.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ...image_loading import load_rgb
from .base import ImageSource, dataset_image, inside, read_json_lines, read_parquet, require_columns
from .matching_base import MatchingBenchmark, MatchingItem, Matrix, winoground_verdicts

COLUMNS = ("id", "image_0", "image_1", "caption_0", "caption_1")


def score(matrices: Sequence[Matrix]) -> dict[str, float]:
    """Text, image and group percentages from 2x2 score matrices (rows texts, columns images).

    Raises:
        ValueError: `matrices` is empty.
    """
    if not len(matrices):
        raise ValueError("Winoground: there are no scores. Give at least one 2x2 matrix.")
    verdicts = [winoground_verdicts(matrix) for matrix in matrices]
    return {key: 100.0 * sum(v[key] for v in verdicts) / len(verdicts) for key in ("text", "image", "group")}


def _image(folder: Path, name: str) -> ImageSource:
    """An image from `images/`, or from the published `images.zip`, which is read without unpacking."""
    archive = folder / "images.zip"
    if (folder / "images").is_dir() or not archive.is_file():
        return inside(folder, f"images/{name}")

    def read() -> Image.Image:
        with zipfile.ZipFile(archive) as file:
            member = next((m for m in file.namelist() if m == name or m.endswith(f"/{name}")), None)
            if member is None:
                raise FileNotFoundError(name)
            return load_rgb(file.read(member))

    return read


class Winoground(MatchingBenchmark):
    """Winoground from `examples.jsonl` with images, or from parquet. Text, image and group scores."""

    name = "winoground"
    hub_id = "facebook/winoground"
    metric = "group"

    def read(self, folder: Path) -> list[MatchingItem]:
        """Two images and two captions per example, from `examples.jsonl` or parquet."""
        table = next(iter(sorted(folder.rglob("examples.jsonl"))), None)
        if table is not None:
            rows = read_json_lines(table)
            images = [tuple(_image(table.parent, f"{row[f'image_{i}']}.png") for i in (0, 1)) for row in rows]
        elif (dataset := read_parquet(folder, "*.parquet")) is not None:
            require_columns(self.name, dataset.column_names, COLUMNS)
            rows = dataset.remove_columns(["image_0", "image_1"]).to_list()
            images = [tuple(dataset_image(dataset, row, f"image_{i}") for i in (0, 1)) for row in range(len(rows))]
        else:
            raise FileNotFoundError(
                f"{str(folder)!r} has neither examples.jsonl nor parquet files. Arrange it as Winoground is published."
            )
        for row in rows[:1]:
            require_columns(self.name, row, ("id", "caption_0", "caption_1"))
        return [
            MatchingItem(id=str(row["id"]), images=(first, second), texts=(row["caption_0"], row["caption_1"]))
            for row, (first, second) in zip(rows, images, strict=True)
        ]

    def verdicts(self, matrix: Matrix) -> dict[str, float]:
        """The text, image and group verdicts as 0 or 1."""
        return {key: float(value) for key, value in winoground_verdicts(matrix).items()}

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The verdicts on each example."""
        return {record["id"]: dict(record["verdicts"]) for record in records}

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """The verdicts' means in percent."""
        return {key: 100.0 * value for key, value in means.items()}

    def chance(self) -> dict[str, float]:
        """The scores of random guessing, in percent."""
        return {"text": 25.0, "image": 25.0, "group": 100.0 / 6}
