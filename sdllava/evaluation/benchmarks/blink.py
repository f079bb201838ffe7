"""BLINK-val: 1,901 multiple-choice questions in 14 tasks, one to four images each (arXiv 2404.12390).

The published total is the unweighted mean of the 14 task accuracies ("macro"). Chance: 38.10.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from .base import (
    Benchmark,
    ImageSource,
    Sample,
    dataset_image,
    open_image,
    read_parquet,
    require_columns,
    require_option,
)
from .groups import group_means, in_groups

if TYPE_CHECKING:
    from datasets import Dataset

TASKS = (
    "Art_Style",
    "Counting",
    "Forensic_Detection",
    "Functional_Correspondence",
    "IQ_Test",
    "Jigsaw",
    "Multi-view_Reasoning",
    "Object_Localization",
    "Relative_Depth",
    "Relative_Reflectance",
    "Semantic_Correspondence",
    "Spatial_Relation",
    "Visual_Correspondence",
    "Visual_Similarity",
)
LETTERS = ("(A)", "(B)", "(C)", "(D)", "(E)")
COLUMNS = ("idx", "question", "choices", "answer", "prompt", "image_1")
IMAGE_COLUMNS = ("image_1", "image_2", "image_3", "image_4")
DISCLAIMER_TASKS = ("Forensic_Detection", "Jigsaw", "Art_Style")
DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your "
    "assessment on this question. You don't need to identify the real people. You just need to analyze based on the "
    "information I gave you.\n\n"
)


def parse_option(reply: str, num_choices: int) -> str | None:
    """The option in a reply, by the rules of the authors' `analyze_answer` that come before its call of GPT.

    Accepts a bare or parenthesised letter, else a single option token in the last paragraph or in the whole reply.

    Returns:
        `str`: For example "(A)", or None if the authors' script would call GPT.
    """
    reply = reply.strip()
    if reply in [letter.strip("()") for letter in LETTERS]:
        return f"({reply})"
    if reply in LETTERS:
        return reply
    options = set(LETTERS[:num_choices])
    everywhere = options & set(reply.split())
    last = options & set(reply.split("\n\n")[-1].split())
    if len(last) == 1:
        return last.pop()
    return everywhere.pop() if len(everywhere) == 1 else None


def task_of(idx: str) -> str:
    """The task in an idx such as `val_Multi-view_Reasoning_12`.

    Raises:
        ValueError: The idx has another form.
    """
    match = re.fullmatch(r"(?:val|test)_(.+)_\d+", idx)
    if not match:
        raise ValueError(f"BLINK: the idx {idx!r} does not have the form 'val_Counting_1'. Use the published ids.")
    return match.group(1)


def score(predictions: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, Any]:
    """The published scores.

    Args:
        predictions: idx -> option, such as "(A)". An idx without a prediction counts as wrong.
        answers: idx -> correct option.

    Returns:
        `dict`: `macro` (the unweighted mean of the task accuracies), `micro` (the share of correct answers) and
        `tasks` (the accuracy of each task), all in percent.

    Raises:
        ValueError: `answers` is empty, or has no entry for a prediction.
    """
    if not answers:
        raise ValueError("BLINK: `answers` is empty. Give the correct option for each idx.")
    if unknown := sorted(set(predictions) - set(answers)):
        raise ValueError(
            f"BLINK: `answers` has no entry for {unknown[0]!r} ({len(unknown)} predictions without an answer). Remove "
            "these predictions, or give their answers."
        )
    verdicts: dict[str, list[bool]] = {}
    for idx, answer in answers.items():
        verdicts.setdefault(task_of(idx), []).append(predictions.get(idx) == answer)
    tasks = {task: 100.0 * sum(right) / len(right) for task, right in sorted(verdicts.items())}
    return {
        "macro": sum(tasks.values()) / len(tasks),
        "micro": 100.0 * sum(map(sum, verdicts.values())) / len(answers),
        "tasks": tasks,
    }


def join_images(images: list[Image.Image], gap: int = 10) -> Image.Image:
    """Join images into one strip, like the authors' helper for models with a single image.

    Args:
        images: From left to right. Shorter ones are centred vertically.
        gap: Width of the black gap, in pixels.
    """
    strip = Image.new("RGB", (sum(i.width for i in images) + gap * (len(images) - 1), max(i.height for i in images)))
    left = 0
    for image in images:
        strip.paste(image, (left, (strip.height - image.height) // 2))
        left += image.width + gap
    return strip


class BLINK(Benchmark):
    """BLINK's validation split from the published parquet files. Scores by task, their mean, and the overall share."""

    name = "blink"
    hub_id = "BLINK-Benchmark/BLINK"
    split = "val"
    metric = "macro"
    max_new_tokens = 128
    judge_temperature = 0.0
    files = ("*/val-*.parquet",)
    protocols = {
        "default": "greedy, the data set's prompt, separate images, the authors' parser; replies that it cannot parse "
        "count as wrong",
        "official": "greedy, the authors' disclaimer before three tasks, the images joined into one strip by their "
        "helper for single-image models, their parser; replies that it cannot parse go to the judge, if there is one, "
        "with their instruction but without its three worked examples",
    }

    def read(self, folder: Path) -> list[Sample]:
        """The parquet files of each task's folder, with one to four images per question."""
        samples = []
        for task in TASKS:
            dataset = read_parquet(folder / task, "*.parquet", self.split) if (folder / task).is_dir() else None
            if dataset is None:
                raise FileNotFoundError(
                    f"{str(folder)!r} has no {task}/{self.split}-*.parquet. Arrange it as BLINK is published."
                )
            require_columns(self.name, dataset.column_names, COLUMNS)
            columns = [column for column in IMAGE_COLUMNS if column in dataset.column_names]
            rows = dataset.remove_columns(columns)
            present = [dataset.data.column(column).is_valid().to_pylist() for column in columns]
            for number, row in enumerate(rows):
                named = [column for column, has in zip(columns, present, strict=True) if has[number]]
                samples.append(self._sample(task, dataset, number, row, named))
        return samples

    def _sample(self, task: str, dataset: "Dataset", number: int, row: dict, columns: list[str]) -> Sample:
        options = LETTERS[: len(row["choices"])]
        images: tuple[ImageSource, ...] = tuple(dataset_image(dataset, number, column) for column in columns)
        ids = tuple(f"{row['idx']}_{column[-1]}" for column in columns)
        prompt = row["prompt"]
        if self.protocol == "official":
            if task in DISCLAIMER_TASKS:
                prompt = DISCLAIMER + prompt
            if len(images) > 1:
                parts = images
                images = (lambda: join_images([open_image(part, row["idx"]) for part in parts]),)
                ids = (row["idx"],)
        return Sample(
            id=row["idx"],
            prompt=prompt,
            images=images,
            target=require_option(self.name, row["idx"], row["answer"], options),
            question=row["question"],
            image_ids=ids,
            info={"task": task, "question": row["question"], "choices": list(row["choices"])},
        )

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The option in the reply, see `parse_option`."""
        return parse_option(reply, len(sample.info["choices"]))

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The verdict on each question, by task."""
        return {
            record["id"]: {
                "correct": float(record["correct"]),
                **in_groups([record["task"]], correct=float(record["correct"])),
            }
            for record in records
        }

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """Mean of the task accuracies, share of correct answers, and the accuracy of each task."""
        tasks = {task: 100.0 * mean for task, mean in sorted(group_means(means, "correct").items())}
        return {"macro": sum(tasks.values()) / len(tasks), "micro": 100.0 * means["correct"], **tasks}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """Uniform guessing among the options of each question."""
        guesses = [{**record, "correct": 1.0 / len(record["choices"])} for record in records]
        return self.score(guesses)

    def judge_prompt(self, record: dict) -> tuple[str, str] | None:
        """The judge's messages for a reply that the parser could not read, under the official protocol."""
        if self.protocol != "official" or record["parsed"] is not None:
            return None
        options = "\n".join(f"{a} {b}" for a, b in zip(LETTERS, record["choices"], strict=False))
        return "", (
            "You are an AI assistant who will help me to match an answer with several options of a single-choice "
            "question. You are provided with a question, several options, and an answer, and you need to find which "
            "option is most similar to the answer. If the answer says things like refuse to answer, I'm sorry cannot "
            "help, etc., output (Z). If the meaning of all options are significantly different from the answer, or "
            "the answer does not select any option, output (Z). You should output one of the choices, "
            f"{','.join(LETTERS)} (if they are valid options), or (Z)\nQuestion: {record['question']}\n"
            f"Select from the following choices?\nOptions: {options}\n(Z) Failed\nAnswer: {record['reply']}\n"
            "Your output: "
        )

    def apply_judgment(self, record: dict, judgment: str) -> None:
        """Use the judge's option as the parsed answer."""
        options = LETTERS[: len(record["choices"])]
        record["parsed"] = judgment.strip() if judgment.strip() in options else None
        record["correct"] = record["parsed"] == record["target"]
