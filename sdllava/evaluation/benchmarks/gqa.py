"""GQA, balanced test-dev: 12,578 questions about 398 scenes with short answers (arXiv 1902.09506).

LLaVA's prompt and answer clean-up, then exact string equality as in the official script. Guessing is not defined for
open answers: the reported chance level is that of always giving the most frequent answer of the evaluated questions.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...data.ordering import natural_key
from .base import (
    Benchmark,
    ImageSource,
    Sample,
    dataset_image,
    find_folder,
    inside,
    read_parquet,
    require_columns,
)

INSTRUCTION = "Answer the question using a single word or phrase."


def clean(answer: str) -> str:
    """Lower-case an answer and remove trailing full stops, as LLaVA's `convert_gqa_for_eval.py` does."""
    return answer.strip().rstrip(".").lower()


class GQA(Benchmark):
    """GQA's balanced test-dev split, as parquet or as the original JSON."""

    name = "gqa"
    hub_id = "lmms-lab-encoder/GQA"
    split = "testdev"
    metric = "accuracy"
    max_new_tokens = 16
    files = ("testdev_balanced_*/*",)
    protocols = {"default": "greedy, LLaVA's prompt and answer clean-up, exact equality as in the official script"}

    def read(self, folder: Path) -> list[Sample]:
        """All questions, from either published layout."""
        if (folder / "testdev_balanced_instructions").is_dir():
            return self._read_parquet(folder)
        if (folder / "testdev_balanced_questions.json").is_file():
            return self._read_original(folder)
        raise FileNotFoundError(
            f"{str(folder)!r} has neither testdev_balanced_instructions/ and testdev_balanced_images/ (parquet) nor "
            "testdev_balanced_questions.json and images/. Arrange it as GQA is published."
        )

    def _read_parquet(self, folder: Path) -> list[Sample]:
        questions = read_parquet(folder / "testdev_balanced_instructions", "*.parquet")
        images = read_parquet(find_folder(folder, "testdev_balanced_images"), "*.parquet")
        if questions is None or images is None:
            raise FileNotFoundError(
                f"{str(folder)!r} has no parquet files of GQA's questions or images. Complete the folder."
            )
        require_columns(self.name, questions.column_names, ("id", "question", "answer", "imageId"))
        require_columns(self.name, images.column_names, ("id", "image"))
        rows = {image_id: row for row, image_id in enumerate(images["id"])}
        samples = []
        for row in questions.select_columns(["id", "question", "answer", "imageId"]):
            if row["imageId"] not in rows:
                raise FileNotFoundError(
                    f"GQA: the image {row['imageId']!r} of question {row['id']!r} is missing. Complete the data."
                )
            image = dataset_image(images, rows[row["imageId"]], "image")
            samples.append(self._sample(row["id"], row["question"], row["answer"], row["imageId"], image))
        return samples

    def _read_original(self, folder: Path) -> list[Sample]:
        questions = json.loads((folder / "testdev_balanced_questions.json").read_text(encoding="utf-8"))
        images = find_folder(folder, "images")
        samples = []
        for question_id in sorted(questions, key=natural_key):
            row = questions[question_id]
            require_columns(self.name, row, ("question", "answer", "imageId"))
            image = inside(images, f"{row['imageId']}.jpg")
            samples.append(self._sample(question_id, row["question"], row["answer"], row["imageId"], image))
        return samples

    def _sample(self, question_id: str, question: str, answer: str, image_id: str, image: ImageSource) -> Sample:
        return Sample(
            id=str(question_id),
            prompt=f"{question.strip()}\n{INSTRUCTION}",
            images=(image,),
            target=answer,
            question=question.strip(),
            image_ids=(str(image_id),),
            info={"image": str(image_id)},
        )

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The cleaned reply, or None if nothing is left of it."""
        return clean(reply) or None

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """The accuracy of always giving the most frequent answer."""
        answer, count = Counter(record["target"] for record in records).most_common(1)[0]
        self.notes["chance"] = f"that of always answering {answer!r}, the most frequent answer"
        return {"accuracy": 100.0 * count / len(records)}
