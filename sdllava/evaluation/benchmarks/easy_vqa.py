"""easy-VQA's test split: 9,673 questions about 1,000 images of one coloured shape (github.com/vzhou842/easy-VQA).

The data is in the package `easy-vqa` (MIT): `train/` and `test/` with `questions.json`, rows of question, answer and
image number, and `images/NUMBER.png`. The score is the share of exact answers, as in the authors' classifier.
"""

import json
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .base import Benchmark, Sample, inside
from .gqa import INSTRUCTION, clean
from .groups import group_means, in_groups

COLOURS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}


class EasyVQA(Benchmark):
    """easy-VQA's test split. Scores overall and by kind of answer: yes or no, colour, shape."""

    name = "easy_vqa"
    hub_id = ""
    split = "test"
    metric = "accuracy"
    max_new_tokens = 8
    protocols = {
        "default": "greedy, only the question, exact equality after lower-casing and trailing full stops",
        "short": "as default, with LLaVA-1.5's instruction to answer with a single word or phrase",
    }

    def default_folder(self) -> Path:
        """The data of the installed package `easy-vqa`.

        Raises:
            FileNotFoundError: The package is not installed.
        """
        found = find_spec("easy_vqa")
        if found is None or found.origin is None:
            raise FileNotFoundError("The data of easy-VQA is not installed. Run: pip install easy-vqa")
        return Path(found.origin).parent / "data"

    def read(self, folder: Path) -> list[Sample]:
        """The questions of the test split, in the published order.

        Args:
            folder: The published folder `data`, with `test/questions.json` and `test/images/`.
        """
        rows = json.loads(inside(folder, "test/questions.json").read_text(encoding="utf-8"))
        images = folder / "test" / "images"
        return [self._sample(n, question, answer, image, images) for n, (question, answer, image) in enumerate(rows)]

    def _sample(self, number: int, question: str, answer: str, image: int, images: Path) -> Sample:
        return Sample(
            id=str(number),
            prompt=f"{question}\n{INSTRUCTION}" if self.protocol == "short" else question,
            images=(inside(images, f"{image}.png"),),
            target=answer,
            question=question,
            image_ids=(str(image),),
            info={"image": str(image), "kind": _kind(answer)},
        )

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The cleaned reply, or None if nothing is left of it."""
        return clean(reply) or None

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The verdict on each question, overall and by kind of answer."""
        return {
            record["id"]: in_groups(("accuracy", record["kind"]), correct=float(record["correct"]))
            for record in records
        }

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """Accuracy overall and by kind of answer, in percent."""
        return {group: 100.0 * value for group, value in group_means(means, "correct").items()}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """The accuracy of always giving the most frequent answer."""
        answer, count = Counter(record["target"] for record in records).most_common(1)[0]
        self.notes["chance"] = f"that of always answering {answer!r}, the most frequent answer"
        return {"accuracy": 100.0 * count / len(records)}


def _kind(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes or no"
    return "colour" if answer in COLOURS else "shape"
