"""Your own questions, from a JSON Lines file: exact matches, contained answers, and letters of options.

A row has `image` (a path, or a list of paths), `question`, and either `answer` (a text, or a list of accepted texts) or
`options` (a list of texts or numbers) with `answer` as a letter or a text of the list. `category` and `id` are
optional. `letters.py` lists the forms in which a reply may name an option.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...data.records import IMAGE_MARKER
from .base import Benchmark, Sample, inside, read_json_lines
from .groups import group_means, in_groups
from .letters import LETTERS, contains, normalise, parse_letter

NEEDED = ("image", "question", "answer")


class Own(Benchmark):
    """Your own questions. Scores overall and by category, in percent.

    `exact`: the reply equals an accepted answer, ignoring case and final punctuation; with options, the reply names the
    letter or the text. `contains`: an accepted answer occurs in the reply as whole words, or the reply is `exact`.
    `letter`: of the questions with options, the reply names the right letter or text.
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
        options = [str(option) for option in options]
        answers = [str(answer) for answer in (row["answer"] if isinstance(row["answer"], list) else [row["answer"]])]
        target: Any = answers
        prompt = str(row["question"])
        if options and len(answers) > 1:
            raise ValueError(f"{where} has the answers {answers} to a question with options. Give one answer.")
        if options:
            target = self._letter(answers[0], options, where)
            answers = [options[LETTERS.index(target)]]
            lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
            prompt = "\n".join([prompt, *lines, "Answer with the option's letter from the given choices directly."])
        elif self.protocol == "short":
            prompt += "\nAnswer the question using a single word or phrase."
        if IMAGE_MARKER in prompt:
            raise ValueError(
                f"{where} has {IMAGE_MARKER!r} in its question or options. Leave it out: images come first."
            )
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

    def _letter(self, answer: str, options: Sequence[str], where: str) -> str:
        if answer in options:
            return LETTERS[options.index(answer)]
        if len(answer.strip("()")) == 1 and answer.strip("()") in LETTERS[: len(options)]:
            return answer.strip("()")
        raise ValueError(f"{where} has the answer {answer!r}, which is not one of its options {options}. Correct it.")

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
        found = any(contains(reply, normalise(answer)) for answer in record["answers"])
        verdicts = {"exact": record["correct"], "contains": record["correct"] or found}
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
