"""Your own questions, from a JSON Lines file: exact matches, contained answers, and letters of options.

A row has `image` (a path, or a list of paths), `question`, and either `answer` (a text, or a list of accepted texts) or
`options` (a list of texts) with `answer` as a letter or a text of the list. `category` and `id` are optional.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .base import Benchmark, Sample, inside, read_json_lines
from .groups import group_means, in_groups

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NEEDED = ("image", "question", "answer")


def normalise(text: str) -> str:
    """Lower case, single spaces, and without punctuation at the end."""
    return " ".join(text.lower().split()).rstrip(".!,;: ")


def parse_letter(reply: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply names, or None.

    Accepts a letter at the beginning ("B", "(B)", "B. red"), the text of an option, or a single letter in parentheses.

    Args:
        reply: The model's reply.
        options: The texts of the options, in the order of their letters.
    """
    letters = LETTERS[: len(options)]
    if begin := re.match(rf"\(([{letters}])\)|([{letters}])(?=[.:)]|\s*$)", reply.strip()):
        return begin.group(1) or begin.group(2)
    texts = [normalise(option) for option in options]
    if normalise(reply) in texts:
        return letters[texts.index(normalise(reply))]
    found = set(re.findall(rf"\(([{letters}])\)", reply))
    return found.pop() if len(found) == 1 else None


class Own(Benchmark):
    """Your own questions. Scores overall and by category, in percent.

    `exact`: the reply equals an accepted answer, ignoring case and final punctuation; with options, the reply names the
    letter or is the text. `contains`: an accepted answer occurs in the reply as whole words. `letter`: of the questions
    with options, the reply names the right letter or text.
    """

    name = "own"
    hub_id = ""
    split = ""
    metric = "exact"
    max_new_tokens = 128
    data_file = True
    protocols = {
        "default": "greedy, the question as it is; with options, one line per option and LLaVA-1.5's instruction to "
        "answer with the letter",
        "short": "as default, with LLaVA-1.5's instruction to answer with a single word or phrase",
    }

    def read(self, folder: Path) -> list[Sample]:
        """All rows of a file.

        Args:
            folder: The JSON Lines file. Images are relative to its folder, or to `--images`.

        Raises:
            FileNotFoundError: An image does not exist.
            ValueError: A row is not valid. The message has its line.
        """
        rows = read_json_lines(folder)
        samples = [self._sample(row, number, folder) for number, row in enumerate(rows, 1)]
        names = Counter(sample.id for sample in samples)
        if repeated := next((name for name, count in names.items() if count > 1), None):
            raise ValueError(f"{str(folder)!r} has the id {repeated!r} twice. Use each id once, or leave ids out.")
        return samples

    def _sample(self, row: Any, number: int, file: Path) -> Sample:
        where = f"{str(file)!r}, row {number},"
        missing = [key for key in NEEDED if not isinstance(row, dict) or row.get(key) in (None, "", [])]
        if missing:
            raise ValueError(f"{where} lacks {missing[0]!r}. A row needs {', '.join(NEEDED)}, and may have options.")
        options = row.get("options") or []
        if not isinstance(options, list) or len(options) > len(LETTERS):
            raise ValueError(f"{where} has the options {options!r:.80}. Give a list of at most {len(LETTERS)} texts.")
        answers = [str(answer) for answer in (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])]
        target: Any = answers
        prompt = str(row["question"])
        if options:
            target = self._letter(answers[0], options, where)
            answers = [str(options[LETTERS.index(target)])]
            lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
            prompt = "\n".join([prompt, *lines, "Answer with the option's letter from the given choices directly."])
        elif self.protocol == "short":
            prompt += "\nAnswer the question using a single word or phrase."
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        return Sample(
            id=str(row.get("id", number)),
            prompt=prompt,
            images=tuple(inside(self.image_folder or file.parent, str(name)) for name in names),
            target=target,
            question=str(row["question"]),
            image_ids=tuple(map(str, names)),
            info={"answers": answers, "options": options, "category": str(row.get("category") or "")},
        )

    def _letter(self, answer: str, options: Sequence[Any], where: str) -> str:
        texts = [str(option) for option in options]
        if answer in texts:
            return LETTERS[texts.index(answer)]
        if len(answer.strip("()")) == 1 and answer.strip("()") in LETTERS[: len(options)]:
            return answer.strip("()")
        raise ValueError(f"{where} has the answer {answer!r}, which is not one of its options {texts}. Correct it.")

    def parse(self, sample: Sample, reply: str) -> str | None:
        """The letter, or without options the normalised reply; None if there is none."""
        options = sample.info["options"]
        return parse_letter(reply, options) if options else normalise(reply) or None

    def is_correct(self, sample: Sample, parsed: Any) -> bool:
        """Whether the letter, or the whole reply, is right."""
        if sample.info["options"]:
            return parsed == sample.target
        return parsed in [normalise(answer) for answer in sample.info["answers"]]

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The verdicts on each question, by metric and category."""
        return {record["id"]: self._verdicts(record) for record in records}

    def _verdicts(self, record: dict) -> dict[str, float]:
        reply = normalise(record["reply"])
        answers = [re.escape(normalise(answer)) for answer in record["answers"]]
        contains = any(re.search(rf"(?<!\w){answer}(?!\w)", reply) for answer in answers)
        verdicts = {"exact": record["correct"], "contains": contains}
        if record["options"]:
            verdicts["letter"] = record["correct"]
        numbers: dict[str, float] = {}
        for metric, verdict in verdicts.items():
            groups = [metric, f"{metric}/{record['category']}"] if record["category"] else [metric]
            numbers |= in_groups(groups, correct=float(verdict))
        return numbers

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """Each metric overall and by category, in percent."""
        groups = group_means(means, "correct")
        return {group: 100.0 * value for group, value in sorted(groups.items(), key=lambda item: "/" in item[0])}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """The score of a random letter, of the questions with options."""
        numbers = [100.0 / len(record["options"]) for record in records if record["options"]]
        return {"letter": sum(numbers) / len(numbers)} if numbers else {}
