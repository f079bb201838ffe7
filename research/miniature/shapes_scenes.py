"""Training data for SHAPES: images where its own are missing, and answers in steps.

Images are made of cells of another split, arranged so that given answers hold.

SHAPES (arXiv 1511.02799) asks about images of three by three cells. A relation is between neighbouring cells: "is a
circle above left of a square" asks for a circle above the cell left of a square. [`read_cells`] and [`answer`] give the
published answer for 99.5% of the images of `train.small` and 99.9% of those of `val` and `test`.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from sdllava.evaluation.benchmarks.base import inside
from sdllava.evaluation.benchmarks.statements import read_shapes_images

SIZE, CELL = 3, 10
COLOURS = ("blue", "green", "red")
"""In the order of the channels, as the authors wrote the images with OpenCV."""
SHAPE_NAMES = ("circle", "square", "triangle")
PLACES = ("a1", "a2", "a3", "b1", "b2", "b3", "c1", "c2", "c3")
"""The cells, row by row."""
_TRIES = 10_000
"""Drawn images per question. A published question and answer fit one in a few."""
_STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}

Cell = tuple[str, str] | None
"""Colour and shape of a cell, or None for an empty one."""


def read_cells(pixels: np.ndarray) -> np.ndarray:
    """The cells of images.

    Args:
        pixels: Images `(images, 30, 30, 3)`, uint8.

    Returns:
        `np.ndarray`: `(images, 9, 10, 10, 3)`, row by row.
    """
    grid = pixels.reshape(-1, SIZE, CELL, SIZE, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, SIZE * SIZE, CELL, CELL, 3)


def name_cell(cell: np.ndarray) -> Cell:
    """What a cell `(10, 10, 3)` contains.

    A triangle is narrower at its top. A square fills its bounding box, and a circle 79% of it.
    """
    light = cell.max(-1).astype(float)
    if light.max() < 40:
        return None
    colour = COLOURS[int(cell.reshape(-1, 3).astype(int).sum(0).argmax())]
    rows = light.sum(1)[light.sum(1) > 0.2 * light.sum(1).max()]
    half = len(rows) // 2
    if rows[:half].sum() < 0.85 * rows[-half:].sum():
        return colour, "triangle"
    filled = light.sum() * light.max() / (light.sum(0).max() * light.sum(1).max())
    return colour, "circle" if filled < 0.9 else "square"


def answer(cells: list[Cell], question: str) -> bool:
    """Whether a statement such as "is a red shape left of a circle" is true of nine cells, row by row.

    Raises:
        ValueError: The question has another form.
    """
    return explain(cells, question).endswith("yes")


def explain(cells: list[Cell], question: str) -> str:
    """The answer to a question as [`answer`] takes, after the steps to it.

    First come the numbered words of the question. Then every step, from the last word to the first one, names the nine
    cells, with an underscore before those that it does not mark. For "is a red shape left of a circle" it describes all
    cells and marks those with circles, then marks the cells left of them, then describes these and looks for red ones:
    "1 red 2 left 3 circle 3 circle green square _a1 red circle a2 ... 2 left a1 _a2 ... 1 red green square _a1 ... no".
    Where the last step marks a cell, it ends, and "yes" follows.

    Args:
        cells: The nine cells, row by row.
        question: Without a question mark.

    Raises:
        ValueError: The question has another form, or another word.
    """
    words = question.replace("left of", "left").replace("right of", "right").split()
    plan = [word for word in words if word not in ("is", "a", "shape")]
    relations = [word in _STEPS for word in plan]
    if words[:1] != ["is"] or len(plan) < 2 or relations != [0 < k < len(plan) - 1 for k in range(len(plan))]:
        raise ValueError(f"{question!r} is not a question of SHAPES about two things.")
    if unknown := [word for word in plan if word not in (*COLOURS, *SHAPE_NAMES, *_STEPS)]:
        raise ValueError(f"{question!r} has a word that SHAPES does not have: {unknown[0]!r}.")
    text = [part for number, word in enumerate(plan, 1) for part in (str(number), word)]
    marks = np.ones(len(cells), bool)
    for number, word in reversed([*enumerate(plan, 1)]):
        if word in _STEPS:
            marks = _moved(marks.reshape(SIZE, SIZE), *_STEPS[word]).reshape(-1)
            step = _names(marks)
        else:
            marks, step = _look(cells, word, marks)
        if number == 1 and marks.any():
            step = step[: step.index(PLACES[int(marks.argmax())]) + 1]
        text += [str(number), word, *step]
    return " ".join([*text, "yes" if marks.any() else "no"])


def _look(cells: list[Cell], word: str, searched: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which of some cells have a colour or shape, and their description."""
    marks = searched & np.array([cell is not None and word in cell for cell in cells])
    contents = [[" ".join(cell or ["nothing"])] if look else [] for cell, look in zip(cells, searched, strict=True)]
    named = [[*content, name] for content, name in zip(contents, _names(marks), strict=True)]
    return marks, [part for parts in named for part in parts]


def _names(marks: np.ndarray) -> list[str]:
    return [place if mark else f"_{place}" for place, mark in zip(PLACES, marks, strict=True)]


def _moved(cells: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A grid shifted by one cell. What leaves the image is lost."""
    padded = np.pad(cells, 1)
    return np.roll(padded, (rows, columns), (0, 1))[1:-1, 1:-1]


def _vary(cells: np.ndarray) -> np.ndarray:
    """Cells `(n, 10, 10, 3)` and their mirror images in all colours: `(6n, 10, 10, 3)`."""
    both = np.concatenate([cells, cells[:, :, ::-1]])
    return np.concatenate([np.roll(both, shift, -1) for shift in range(len(COLOURS))])


def compose_images(
    folder: Path, questions: str = "train.large", cells: str = "train.small", seed: int = 0
) -> Iterator[tuple[Image.Image, str, bool]]:
    """An image for each question and answer of a split, of cells drawn from another split's images.

    Cells are also mirrored, and get other colours.

    Args:
        folder: With `QUESTIONS.query_str.txt`, `QUESTIONS.output` and `CELLS.input.npy`.
        questions: The split of the questions and answers.
        cells: The split of the cells.
        seed: Selects the cells.

    Yields:
        Image, question and answer, in the order of the files.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file has no images, the files differ in length, a question has another form or word, or no cells
            have the given answer.
    """
    texts = inside(folder, f"{questions}.query_str.txt").read_text(encoding="utf-8").splitlines()
    answers = inside(folder, f"{questions}.output").read_text(encoding="utf-8").splitlines()
    if len(texts) != len(answers):
        raise ValueError(f"SHAPES {questions}: {len(texts)} questions and {len(answers)} answers. Complete the files.")
    pool = _vary(read_cells(read_shapes_images(folder, cells)).reshape(-1, CELL, CELL, 3))
    names = [name_cell(cell) for cell in pool]
    rng = random.Random(f"shapes {seed}")
    for text, wanted in zip(texts, answers, strict=True):
        draws = (rng.choices(range(len(pool)), k=SIZE * SIZE) for _ in range(_TRIES))
        chosen = next((draw for draw in draws if answer([names[k] for k in draw], text) == (wanted == "true")), None)
        if chosen is None:
            raise ValueError(f"SHAPES {questions}: {text!r} is never {wanted} of cells of {cells}. Correct the data.")
        grid = pool[chosen].reshape(SIZE, SIZE, CELL, CELL, 3).transpose(0, 2, 1, 3, 4)
        yield Image.fromarray(grid.reshape(SIZE * CELL, SIZE * CELL, 3)[..., ::-1]), text, wanted == "true"
