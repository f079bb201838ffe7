"""NaturalBench: 1,900 groups of two images and two questions that a blind model cannot answer (arXiv 2410.14669).

Scored by the authors' rule, which assumes that the answers of a group are 1, 0, 0, 1 in the order q0i0, q0i1, q1i0,
q1i1 and does not read the answer columns. Chance: 50 / 25 / 25 / 6.25; a constant answerer gets 50 / 0 / 0 / 0.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .base import Benchmark, Sample, dataset_image, read_parquet, require_columns, require_option

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}
WORDS = {"yes_no": ("Yes", "No"), "multiple_choice": ("A", "B")}
CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (question, image)
COLUMNS = (
    "Index",
    "Image_0",
    "Image_1",
    "Question_0",
    "Question_1",
    "Question_Type",
    *(f"Image_{image}_Question_{question}" for question, image in CELLS),
)


def extract_answer(reply: str, question_type: str) -> int:
    """The first answer in a reply that is a whole word.

    The article "a" counts as option A, as in the authors' code.

    Args:
        reply: The model's reply.
        question_type: "yes_no" or "multiple_choice".

    Returns:
        `int`: 1 for yes or A, 0 for no or B, -1 without an answer.

    Raises:
        ValueError: The question type is unknown.
    """
    if question_type not in WORDS:
        raise ValueError(f"Unknown question type {question_type!r}. NaturalBench has {', '.join(WORDS)}.")
    found = [re.search(rf"\b{word}\b", reply, re.IGNORECASE) for word in WORDS[question_type]]
    positions = [(match.start(), 1 - index) for index, match in enumerate(found) if match]
    return min(positions)[1] if positions else -1


def score(groups: Sequence[Sequence[bool]]) -> dict[str, float]:
    """Acc, Q_Acc, I_Acc and G_Acc, in percent, from groups of four verdicts (q0i0, q0i1, q1i0, q1i1).

    Raises:
        ValueError: `groups` is empty.
    """
    if not len(groups):
        raise ValueError("NaturalBench: there are no groups to score. Give at least one group of four verdicts.")
    totals = {"G_Acc": 0.0, "Q_Acc": 0.0, "I_Acc": 0.0, "Acc": 0.0}
    for group in groups:
        a, b, c, d = map(bool, group)
        totals["Acc"] += (a + b + c + d) / 4
        totals["Q_Acc"] += ((a and b) + (c and d)) / 2
        totals["I_Acc"] += ((a and c) + (b and d)) / 2
        totals["G_Acc"] += a and b and c and d
    return {key: 100.0 * value / len(groups) for key, value in totals.items()}


class NaturalBench(Benchmark):
    """NaturalBench from the published parquet files. A unit is a group of two images and two questions."""

    name = "naturalbench"
    hub_id = "BaiqiL/NaturalBench"
    split = "train"
    metric = "G_Acc"
    max_new_tokens = 16
    protocols = {
        "default": "greedy, a space before the answer instruction (as in lmms-eval and VLMEvalKit), the authors' "
        "extraction and scoring",
        "official": "greedy, the authors' prompt without that space, their extraction and scoring",
    }

    def read(self, folder: Path) -> list[Sample]:
        """Groups of two images and two questions from parquet, expanded in the order q0i0, q0i1, q1i0, q1i1."""
        dataset = read_parquet(folder, "*.parquet")
        if dataset is None:
            raise FileNotFoundError(f"{str(folder)!r} has no parquet files. Arrange it as NaturalBench is published.")
        require_columns(self.name, dataset.column_names, COLUMNS)
        rows = dataset.select_columns([column for column in COLUMNS if column not in ("Image_0", "Image_1")])
        samples = [self._sample(dataset, i, row, q, im) for i, row in enumerate(rows) for q, im in CELLS]
        other = sum(
            row[f"Image_{im}_Question_{q}"] != WORDS[row["Question_Type"]][0 if q == im else 1]
            for row in rows
            for q, im in CELLS
        )
        if other:
            self.notes["answers"] = f"{other} answers of the data differ from the 1, 0, 0, 1 that the scoring assumes"
        return samples

    def _sample(self, dataset: "Dataset", number: int, row: dict, question: int, image: int) -> Sample:
        kind, text = row["Question_Type"], row[f"Question_{question}"]
        name = f"{row['Index']}-q{question}i{image}"
        require_option(self.name, name, kind, tuple(WORDS))
        require_option(self.name, name, row[f"Image_{image}_Question_{question}"], WORDS[kind])
        separator = " " if self.protocol == "default" else ""
        return Sample(
            id=name,
            prompt=f"{text}{separator}{SUFFIXES[kind]}",
            images=(dataset_image(dataset, number, f"Image_{image}"),),
            target=1 if question == image else 0,
            question=text.strip(),
            image_ids=(f"{row['Index']}_{image}",),
            info={"group": str(row["Index"]), "cell": 2 * question + image, "question_type": kind},
        )

    def parse(self, sample: Sample, reply: str) -> int | None:
        """1 or 0, or None without an answer; see `extract_answer`."""
        answer = extract_answer(reply, sample.info["question_type"])
        return None if answer < 0 else answer

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The four accuracies of each complete group."""
        groups: dict[str, dict[int, bool]] = {}
        for record in records:
            groups.setdefault(record["group"], {})[record["cell"]] = bool(record["correct"])
        return {name: score([[cells[k] for k in range(4)]]) for name, cells in groups.items() if len(cells) == 4}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """The accuracies of uniform guessing."""
        return {"G_Acc": 6.25, "Q_Acc": 25.0, "I_Acc": 25.0, "Acc": 50.0}
