"""LLaVA-Bench-in-the-Wild: 60 questions on 24 images, rated by a judge against GPT-4's answers (arXiv 2304.08485).

Score = 100 x mean rating of the candidate / mean rating of the reference. The paper's judge is gpt-4-0314 at
temperature 0.2. Without a judge there are no scores. Scores of different judges are not comparable.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import (
    Benchmark,
    Sample,
    dataset_image,
    find_folder,
    inside,
    read_json_lines,
    read_parquet,
    require_columns,
    require_option,
)
from .groups import group_means, in_groups

CATEGORIES = ("conv", "detail", "complex")
JUDGE_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \nPlease rate the helpfulness, relevance, "
    "accuracy, level of details of their responses. Each assistant receives an overall score on a scale of 1 to 10, "
    "where a higher score indicates better overall performance.\nPlease first output a single line containing only "
    "two values indicating the scores for Assistant 1 and 2, respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)


def parse_ratings(review: str) -> tuple[float, float]:
    """The two ratings in the first line of a review, by the rules of LLaVA's script.

    Commas become spaces, and the line must then have exactly two fields. Failures count in the means.

    Returns:
        `tuple[float, float]`: Ratings of the reference and of the candidate, or (-1, -1) if the line cannot be read.
    """
    fields = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, fields)
    except ValueError:
        return -1.0, -1.0
    return first, second


def score(ratings: Sequence[tuple[float, float]]) -> float:
    """The relative score, in percent, of (reference, candidate) ratings, rounded as in LLaVA's script."""
    means = [round(sum(column) / len(ratings), 3) for column in zip(*ratings, strict=True)]
    return round(100 * means[1] / means[0], 1)


class LLaVABench(Benchmark):
    """LLaVA-Bench-in-the-Wild, rated by a judge. Scores overall and by category."""

    name = "llava_bench"
    hub_id = "liuhaotian/llava-bench-in-the-wild"
    split = "train"
    metric = "all"
    max_new_tokens = 1024
    protocols = {
        "default": "greedy, only the question; rated with LLaVA's instruction by the judge named in the results"
    }

    def read(self, folder: Path) -> list[Sample]:
        """`questions.jsonl` and `context.jsonl` as published, or the mirror's parquet."""
        if (folder / "questions.jsonl").is_file():
            rows = self._read_original(folder)
        elif (dataset := read_parquet(folder, "*.parquet")) is not None:
            require_columns(self.name, dataset.column_names, ("question", "image", "caption", "gpt_answer", "category"))
            rows = [
                {
                    "question_id": number,
                    "text": row["question"],
                    "source": dataset_image(dataset, number, "image"),
                    "image": str(row.get("image_id", number)),
                    "context": row["caption"],
                    "reference": row["gpt_answer"],
                    "category": row["category"],
                }
                for number, row in enumerate(dataset.remove_columns("image"))
            ]
        else:
            raise FileNotFoundError(
                f"{str(folder)!r} has neither questions.jsonl nor parquet files. Arrange it as LLaVA-Bench is "
                "published."
            )
        return [self._sample(row) for row in rows]

    def _read_original(self, folder: Path) -> list[dict]:
        questions = self._rows(folder, "questions.jsonl", ("question_id", "image", "text", "category"))
        contexts = {row["image"]: row["caption"] for row in self._rows(folder, "context.jsonl", ("image", "caption"))}
        references = self._rows(folder, "answers_gpt4.jsonl", ("question_id", "text"))
        answers = {row["question_id"]: row["text"] for row in references}
        images = find_folder(folder, "images")
        for row in questions:
            if row["image"] not in contexts or row["question_id"] not in answers:
                raise ValueError(
                    f"LLaVA-Bench: question {row['question_id']!r} has no context or no reference answer. Complete "
                    "context.jsonl and answers_gpt4.jsonl."
                )
            row["source"] = inside(images, row["image"])
            row["context"], row["reference"] = contexts[row["image"]], answers[row["question_id"]]
        return questions

    def _rows(self, folder: Path, name: str, columns: Sequence[str]) -> list[dict]:
        rows = read_json_lines(inside(folder, name))
        for row in rows:
            require_columns(f"{self.name}, {name}", row, columns)
        return rows

    def _sample(self, row: dict) -> Sample:
        context = row["context"] if isinstance(row["context"], str) else "\n".join(row["context"])
        name = str(row["question_id"])
        category = require_option(self.name, f"question {name}", row["category"], CATEGORIES)
        return Sample(
            id=name,
            prompt=row["text"],
            images=(row["source"],),
            target=row["reference"],
            question=row["text"],
            image_ids=(row["image"],),
            info={"category": category, "context": context},
        )

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The reply itself, or None if it is empty."""
        return reply.strip() or None

    def is_correct(self, sample: Sample, parsed: Any) -> None:
        """None, because a judge rates the replies."""

    def judge_prompt(self, record: dict) -> tuple[str, str]:
        """LLaVA's messages with context, question, reference answer and reply."""
        return JUDGE_SYSTEM, (
            f"[Context]\n{record['context']}\n\n[Question]\n{record['prompt']}\n\n"
            f"[Assistant 1]\n{record['target']}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{record['reply']}\n\n[End of Assistant 2]\n\n[System]\n{RULE}\n\n"
        )

    def apply_judgment(self, record: dict, judgment: str) -> None:
        """Store the two ratings."""
        record["ratings"] = parse_ratings(judgment)

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The two ratings of each judged question, -1 if the review could not be read.

        Empty without a judge, and if no review could be read.
        """
        self.notes.pop("reviews", None)
        units, unread = {}, 0
        for record in records:
            if "ratings" in record:
                reference, candidate = record["ratings"]
                unread += (reference, candidate) == (-1.0, -1.0)
                groups = ("all", record["category"])
                units[record["id"]] = in_groups(groups, reference=reference, candidate=candidate)
        if unread == len(units):
            if units:
                self.notes["reviews"] = f"none of {unread} begins with two ratings, so the score is absent"
            return {}
        if unread:
            self.notes["reviews"] = f"{unread} do not begin with two ratings; each counts as -1 and -1, as published"
        return units

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """The relative score over all questions and in each category.

        Left out where the mean rating of the reference is not above 0, because too many reviews could not be read.
        """
        references, candidates = group_means(means, "reference"), group_means(means, "candidate")
        return {
            group: score([(references[group], candidates[group])])
            for group in ("all", *CATEGORIES)
            if round(references.get(group, 0.0), 3) > 0
        }
