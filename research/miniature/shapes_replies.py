"""Where the replies of models that were fine-tuned on SHAPES go wrong, compared with [`explain`]."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from sdllava.evaluation.benchmarks.base import open_image
from sdllava.evaluation.benchmarks.statements import read_shapes
from sdllava.evaluation.results import read_records

from .shapes_scenes import PLACES, explain, name_cell, read_cells

KINDS = ("question", "contents", "marks", "answer")
"""What a reply's first mistake can be in: the question's words, a cell's contents, its mark, or yes or no."""


def first_mistake(reply: str, expected: str) -> str | None:
    """The kind of the first word in which a reply differs from the expected one, or None if they are equal."""
    found, wanted = reply.split(), expected.split()
    if found == wanted:
        return None
    pairs = zip([*found, ""], wanted, strict=False)
    at = next((k for k, (a, b) in enumerate(pairs) if a != b), len(wanted) - 1)
    if at < 2 * max(int(word) for word in wanted if word.isdecimal()):
        return "question"
    if wanted[at].lstrip("_") in PLACES:
        return "marks"
    return "answer" if at == len(wanted) - 1 else "contents"


def described_cells(reply: str) -> list[str]:
    """What the first step of a reply says of the cells, at most nine, in their order."""
    words = reply.split()
    numbers = [k for k, word in enumerate(words) if word.isdecimal()]
    steps = [k for k in numbers if k and words[k] == words[max(j for j in numbers if j < k)]]
    contents: list[str] = []
    text: list[str] = []
    for word in words[steps[0] + 2 :] if steps else []:
        if word.lstrip("_") in PLACES:
            contents.append(" ".join(text))
            text = []
        else:
            text.append(word)
    return contents[: len(PLACES)]


def analyse(answers: Path, data: Path) -> list[tuple[str, dict[str, float]]]:
    """Shares of the replies to each question of the test split, and to all, in percent.

    Args:
        answers: The folder `answers` of a run of `third-party`, with `samples.jsonl`.
        data: The folder of SHAPES.

    Returns:
        `list`: Questions, the last one "all", with `right` (answers), `cells` (described correctly in the first step),
        `exact` (no mistake) and the kinds of first mistakes.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The folder has answers to another benchmark or split.
    """
    rows = read_shapes(data, "test")
    records = read_records(answers / "samples.jsonl")
    if not records:
        raise FileNotFoundError(f"{str(answers)!r} has no answers in samples.jsonl. Give the folder of a finished run.")
    by_question: dict[str, list[dict[str, float]]] = {}
    for record in records:
        split, _, number = record["id"].partition("-")
        if split != "test" or not number.isdecimal() or int(number) >= len(rows):
            raise ValueError(f"{str(answers)!r} has the answer {record['id']!r}, which is none of SHAPES' test split.")
        source, question, _ = rows[int(number)]
        (pixels,) = read_cells(np.asarray(open_image(source))[None, ..., ::-1])
        cells = [name_cell(cell) for cell in pixels]
        kind = first_mistake(record["reply"], explain(cells, question))
        named = zip(described_cells(record["reply"]), cells, strict=False)
        correct = sum(text == " ".join(cell or ["nothing"]) for text, cell in named)
        shares = {"right": record["correct"], "cells": correct / len(PLACES), "exact": kind is None}
        by_question.setdefault(question, []).append(
            {name: 100.0 * share for name, share in (shares | {name: kind == name for name in KINDS}).items()}
        )
    everything = [reply for replies in by_question.values() for reply in replies]
    means = [(question, _means(replies)) for question, replies in by_question.items()]
    return [*sorted(means, key=lambda row: row[1]["right"]), ("all", _means(everything))]


def _means(replies: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: mean(reply[name] for reply in replies) for name in replies[0]}


def table(rows: Sequence[tuple[str, dict[str, float]]]) -> str:
    """The shares as a table in Markdown."""
    names = ["right", "cells", "exact", *KINDS]
    lines = [f"| question | right | cells | no mistake | first mistake: {' | '.join(KINDS)} |"]
    lines.append("|---" * (1 + len(names)) + "|")
    lines += [
        " | ".join([f"| {question}", *(f"{shares[name]:.1f}" for name in names)]) + " |" for question, shares in rows
    ]
    return "\n".join(lines)
