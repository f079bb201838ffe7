"""SugarCrepe: a caption of a COCO photograph against one that was changed by a word or two (arXiv 2306.14610).

An item counts if the caption scores higher than the negative caption. Scores by kind of change, and their mean. Chance:
50%.
"""

import json
from pathlib import Path

from .base import inside, read_json_lines, require_columns
from .matching_base import MatchingBenchmark, MatchingItem, Matrix

KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
COLUMNS = ("filename", "caption", "negative_caption")
IMAGE_FOLDERS = ("val2017", "images")


class SugarCrepe(MatchingBenchmark):
    """SugarCrepe from the published files, or from one file of JSON lines with the column `kind`."""

    name = "sugarcrepe"
    hub_id = ""

    def read(self, folder: Path) -> list[MatchingItem]:
        """One image and two texts per item, the matching caption first.

        Args:
            folder: With the published `add_att.json`, ... (also in `data/`) or with `sugarcrepe*.jsonl`, and with the
                images of COCO val2017 in `val2017/`.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A column is missing.
        """
        images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), folder)
        return [
            MatchingItem(
                id=f"{kind}-{number}",
                images=(inside(images, row["filename"]),),
                texts=(row["caption"], row["negative_caption"]),
                info={"pattern": kind},
            )
            for kind, number, row in self._rows(folder)
        ]

    def _rows(self, folder: Path) -> list[tuple[str, str, dict]]:
        """Kind, number and columns of every item."""
        rows = []
        for path in sorted(folder.glob("sugarcrepe*.jsonl")):
            rows += [
                (row.get("kind", "item"), str(row.get("id", k)), row) for k, row in enumerate(read_json_lines(path))
            ]
        for kind in () if rows else KINDS:
            for path in (folder / f"{kind}.json", folder / "data" / f"{kind}.json"):
                if path.is_file():
                    rows += [(kind, key, row) for key, row in json.loads(path.read_text(encoding="utf-8")).items()]
        if not rows:
            raise FileNotFoundError(
                f"{str(folder)!r} has neither {KINDS[0]}.json, ... nor sugarcrepe*.jsonl. Give the folder of the "
                "published files with --data, and put COCO's images next to them as val2017/."
            )
        for _, _, row in rows:
            require_columns(self.name, row, COLUMNS)
        return rows

    def verdicts(self, matrix: Matrix) -> dict[str, float]:
        """Whether the caption scores higher than the negative caption."""
        return {"pair": float(matrix[0][0] > matrix[1][0])}

    def chance(self) -> dict[str, float]:
        """The scores of random guessing, in percent."""
        return {self.metric: 50.0}
