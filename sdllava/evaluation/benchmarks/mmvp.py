"""MMVP: 300 questions in 150 pairs of CLIP-blind images (arXiv 2401.06209).

A pair counts if both of its questions are answered correctly. The score is the share of such pairs. Chance: 25%.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import (
    Benchmark,
    ImageSource,
    Sample,
    dataset_image,
    find_folder,
    inside,
    read_csv,
    read_parquet,
    require_columns,
    require_option,
)

COLUMNS = ("Question", "Options", "Correct Answer")
LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
GRADER_SYSTEM = (
    "You are a helpful and precise assistant for checking the quality of the answer. Please answer in only yes or no."
)
# lmms-eval's rules (lmms_eval/tasks/mmvp/utils.py); the first match decides
LETTER_PATTERNS = (
    r"^\s*\(?([AB])\)?\.?\s*$",
    r"^\s*\(?([AB])\)?[\.\s]",
    r"answer\s+is\s+\(?([AB])\)?",
    r"option\s+\(?([AB])\)?",
    r"\(?([AB])\)?(?:\s|$)",
)


def parse_letter(reply: str) -> str | None:
    """The letter in a reply, "A" or "B", by lmms-eval's rules, or None."""
    for pattern in LETTER_PATTERNS:
        if match := re.search(pattern, reply.strip(), flags=re.IGNORECASE):
            return match.group(1).upper()
    first = reply.strip()[:1].upper()
    return first if first in ("A", "B") else None


def score(correct: Sequence[bool]) -> dict[str, float]:
    """Pair and single accuracy, in percent, of 2n verdicts in the published order (rows 2k and 2k+1 are a pair).

    Raises:
        ValueError: The number of verdicts is odd or zero.
    """
    if not len(correct) or len(correct) % 2:
        raise ValueError(f"MMVP is scored in pairs, but there are {len(correct)} verdicts. Give an even number.")
    pairs = [bool(a) and bool(b) for a, b in zip(correct[::2], correct[1::2], strict=True)]
    return {
        "pair_accuracy": 100.0 * sum(pairs) / len(pairs),
        "single_accuracy": 100.0 * sum(map(bool, correct)) / len(correct),
    }


class MMVP(Benchmark):
    """MMVP from the published CSV and images, or from parquet. A unit is a pair of questions."""

    name = "mmvp"
    hub_id = "MMVP/MMVP"
    split = "train"
    metric = "pair_accuracy"
    max_new_tokens = 16
    protocols = {
        "default": "greedy, lmms-eval's prompt (lettered options, letter instruction) and regular expressions, "
        "original answers",
        "official": "the authors' script: question and options on one line, sampled at temperature 0.2, graded by a "
        "judge (gpt-4-0314 in the paper) that answers yes or no",
    }

    @property
    def generation(self) -> dict[str, Any]:
        """Greedy, or sampling at temperature 0.2 in the official protocol."""
        if self.protocol == "official":
            return {"do_sample": True, "temperature": 0.2, "num_beams": 1, "max_new_tokens": 1024}
        return super().generation

    def read(self, folder: Path) -> list[Sample]:
        """All questions in the published order, in which two consecutive ones form a pair."""
        images: list[ImageSource]
        if (folder / "Questions.csv").is_file():
            rows = read_csv(folder / "Questions.csv")
            images_folder = find_folder(folder, "MMVP Images", "MMVP_Images", "MMVP Imgaes")
            images = [inside(images_folder, f"{number}.jpg") for number in range(1, len(rows) + 1)]
        elif (dataset := read_parquet(folder, "*.parquet")) is not None:
            require_columns(self.name, dataset.column_names, (*COLUMNS, "image"))
            rows = dataset.remove_columns("image").to_list()
            images = [dataset_image(dataset, row, "image") for row in range(len(rows))]
        else:
            raise FileNotFoundError(
                f"{str(folder)!r} has neither Questions.csv nor parquet files. Arrange it as MMVP is published."
            )
        return [self._sample(number, row, image) for number, (row, image) in enumerate(zip(rows, images, strict=True))]

    def _sample(self, number: int, row: dict, image: ImageSource) -> Sample:
        require_columns(self.name, row, COLUMNS)
        question, options = row["Question"], row["Options"]
        answer = row["Correct Answer"].strip().lower().strip("()").upper()
        prompt = f"{question} {options}"
        if self.protocol == "default":
            listed = [text.strip() for text in re.findall(r"\([a-z]\)\s*([^(]+?)(?=\s*\([a-z]\)|$)", options, re.I)]
            question = question.strip()
            lettered = "\n".join(f"{letter}. {text}" for letter, text in zip("AB", listed, strict=False))
            prompt = f"{question}\n{lettered}\n{LETTER_INSTRUCTION}"
        return Sample(
            id=str(number + 1),
            prompt=prompt,
            images=(image,),
            target=require_option(self.name, f"question {number + 1}", answer, ("A", "B")),
            question=question.strip(),
            image_ids=(f"{number + 1}.jpg",),
            info={"pair": number // 2},
        )

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The letter in the reply, or None in the official protocol, which leaves that to the judge."""
        return parse_letter(reply) if self.protocol == "default" else None

    def is_correct(self, sample: Sample, parsed: Any) -> bool | None:
        """The verdict, or None in the official protocol, which leaves it to the judge."""
        return super().is_correct(sample, parsed) if self.protocol == "default" else None

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """Pair and single accuracy of each complete pair with verdicts."""
        pairs: dict[str, list[bool]] = {}
        for record in records:
            if record["correct"] is not None:
                pairs.setdefault(str(record["pair"]), []).append(record["correct"])
        return {pair: score(verdicts) for pair, verdicts in pairs.items() if len(verdicts) == 2}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """The accuracies of uniform guessing."""
        return {"pair_accuracy": 25.0, "single_accuracy": 50.0}

    def judge_prompt(self, record: dict) -> tuple[str, str] | None:
        """The authors' messages to the grader, under the official protocol."""
        if self.protocol != "official":
            return None
        return GRADER_SYSTEM, (
            f"Given the following question {record['prompt']}, the correct answer is ({record['target'].lower()}). "
            f"Does the following answer correctly answers the question, answer:{record['reply']}?"
        )

    def apply_judgment(self, record: dict, judgment: str) -> None:
        """Read an exact yes or no. Any other judgement counts as wrong."""
        verdict = judgment.rstrip("\n").lower()
        record["parsed"] = verdict if verdict in ("yes", "no") else None
        record["correct"] = verdict == "yes"
