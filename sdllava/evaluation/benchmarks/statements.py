"""Benchmarks whose answers are true or false: SHAPES and NLVR."""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ...image_loading import load_rgb
from .base import Benchmark, ImageSource, Sample, dataset_image, inside, read_parquet, require_columns

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_TRUE_OR_FALSE = re.compile(r"\b(yes|true|no|false)\b", re.IGNORECASE)


class Statements(Benchmark):
    """Questions answered with yes or no. The first of yes, true, no and false in a reply is its answer.

    A unit of a bootstrap is what `info["group"]` names, whose samples are not independent.
    """

    metric = "accuracy"
    hub_id = ""
    max_new_tokens = 8
    source = ""

    def default_folder(self) -> Path:
        """Raises `FileNotFoundError` with the address of the data, which is not on the Hub."""
        raise FileNotFoundError(
            f"The data of {self.name} is not on the Hub. Give a folder of {self.source} with --data."
        )

    def parse(self, sample: Sample, reply: str) -> bool | None:
        """Whether the reply affirms, or None if it contains none of the four words."""
        found = _TRUE_OR_FALSE.search(reply)
        return found and found.group().lower() in ("yes", "true")

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """The numbers of correct and of all samples of each group."""
        verdicts = defaultdict(list)
        for record in records:
            verdicts[record["group"]].append(float(record["correct"]))
        return {group: {"correct": sum(values), "samples": len(values)} for group, values in verdicts.items()}

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """Accuracy over the samples, in percent."""
        return {"accuracy": 100.0 * means["correct"] / means["samples"]}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """Guessing is right in half of the cases."""
        return {"accuracy": 50.0}


class Shapes(Statements):
    """SHAPES: 30x30 images of three by three cells, and compositional questions (arXiv 1511.02799)."""

    name = "shapes"
    split = "test"
    source = "exp_shapes/shapes_dataset of github.com/ronghanghu/n2nmn"
    protocols = {
        "default": "greedy, the question with a question mark, test split",
        "val": "as default, validation split",
        "describe": "as default, with replies of up to 192 tokens, for models that describe before they answer",
    }

    def __init__(self, protocol: str = "default"):
        super().__init__(protocol)
        if protocol == "describe":
            self.max_new_tokens = 192

    def read(self, folder: Path) -> list[Sample]:
        """The questions of a split.

        Args:
            folder: With `SPLIT.input.npy` (images, BGR, uint8), `SPLIT.query_str.txt` and `SPLIT.output`.

        Raises:
            FileNotFoundError: A file is missing.
            ValueError: A file has no images, the files differ in length, or an answer is neither true nor false.
        """
        split = "val" if self.protocol == "val" else "test"
        samples = []
        for number, (image, question, answer) in enumerate(read_shapes(folder, split)):
            text = f"{question}?"
            samples.append(
                Sample(
                    id=f"{split}-{number}",
                    prompt=text,
                    images=(image,),
                    target=answer,
                    question=text,
                    image_ids=(f"{split}-{number}",),
                    info={"group": f"{split}-{number}"},
                )
            )
        return samples


def read_shapes(folder: Path, split: str) -> list[tuple[Callable[[], Image.Image], str, bool]]:
    """Image, question and answer of each row of a split of SHAPES.

    Args:
        folder: As for `Shapes.read`.
        split: "train.tiny", "train.small", "train.med", "train.large", "val" or "test".

    Raises:
        FileNotFoundError, ValueError: As `Shapes.read`.
    """
    pixels = read_shapes_images(folder, split)
    questions = inside(folder, f"{split}.query_str.txt").read_text(encoding="utf-8").splitlines()
    answers = inside(folder, f"{split}.output").read_text(encoding="utf-8").splitlines()
    if not len(pixels) == len(questions) == len(answers):
        raise ValueError(
            f"SHAPES {split}: {len(pixels)} images, {len(questions)} questions and {len(answers)} answers. Complete "
            "the files."
        )
    if wrong := next((answer for answer in answers if answer not in ("true", "false")), None):
        raise ValueError(f"SHAPES {split}: the answer {wrong!r} is neither 'true' nor 'false'. Correct the data.")

    def image(row: int) -> Callable[[], Image.Image]:
        return lambda: Image.fromarray(pixels[row][..., ::-1])  # the authors wrote them with OpenCV

    return [(image(row), question, answers[row] == "true") for row, question in enumerate(questions)]


def read_shapes_images(folder: Path, split: str) -> "np.ndarray":
    """The images of a split of SHAPES, `(images, 30, 30, 3)`, BGR, uint8.

    Args:
        folder, split: As for `read_shapes`.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It has no array, or an array of another type or shape.
    """
    import numpy as np

    file = inside(folder, f"{split}.input.npy")
    try:
        pixels = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{str(file)!r} cannot be read ({error}). Download it again.") from error
    if pixels.dtype != np.uint8 or pixels.shape[1:] != (30, 30, 3):
        raise ValueError(
            f"{str(file)!r} contains {pixels.dtype} of shape {pixels.shape}, not images of uint8 and shape "
            "(images, 30, 30, 3). Download it again."
        )
    return pixels


class NLVR(Statements):
    """NLVR's development set: statements about three boxes of shapes, six orders of the boxes each (P17-2034).

    The training set is a large download, so half of the development set can serve for training: that of the sentences
    with an odd number.
    """

    name = "nlvr"
    split = "dev"
    source = "the folder nlvr/dev of github.com/lil-lab/nlvr, or its rows as parquet"
    protocols = {
        "default": 'greedy, the statement and "True or false?", the whole development set',
        "even": "as default, only the sentences with an even number; those with an odd number are for training",
    }

    def read(self, folder: Path) -> list[Sample]:
        """The statements with each of their six images.

        Args:
            folder: With `dev.json` and `images/DIRECTORY/dev-IDENTIFIER-PERMUTATION.png`, or with parquet files that
                have the columns image, sentence, label, identifier and permutation.

        Raises:
            FileNotFoundError: There are neither, or an image is missing.
        """
        rows = read_nlvr(folder)
        if self.protocol == "even":
            rows = [row for row in rows if int(row[0].partition("-")[0]) % 2 == 0]
        return [self._sample(*row) for row in rows]

    def _sample(self, identifier: str, permutation: int, sentence: str, label: bool, image: ImageSource) -> Sample:
        name = f"{identifier}-{permutation}"
        return Sample(
            id=name,
            prompt=f"{sentence.strip()} True or false?",
            images=(image,),
            target=label,
            question=sentence.strip(),
            image_ids=(name,),
            info={"group": identifier.partition("-")[0]},
        )


def read_nlvr(folder: Path) -> list[tuple[str, int, str, bool, ImageSource]]:
    """Identifier, permutation, sentence, label and image of each row of NLVR, from either layout.

    Raises:
        FileNotFoundError: As `NLVR.read`.
    """
    if (folder / "dev.json").is_file():
        lines = (folder / "dev.json").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
        return [
            (row["identifier"], order, row["sentence"], row["label"] == "true", _nlvr_image(folder, row, order))
            for row in found
            for order in range(6)
        ]
    table = read_parquet(folder, "*.parquet")
    if table is None:
        raise FileNotFoundError(f"{str(folder)!r} has neither dev.json nor parquet files. Arrange it as published.")
    columns = ("identifier", "permutation", "sentence", "label")
    require_columns("nlvr", table.column_names, (*columns, "image"))
    return [
        (*(row[column] for column in columns), _table_image(table, number))
        for number, row in enumerate(table.select_columns(list(columns)))
    ]


def _nlvr_image(folder: Path, row: dict, order: int) -> Path:
    return inside(folder, f"images/{row['directory']}/dev-{row['identifier']}-{order}.png")


def _table_image(table: "Dataset", row: int) -> Callable[[], Image.Image]:
    read = dataset_image(table, row, "image")

    def image() -> Image.Image:
        found = read()
        return load_rgb(found["bytes"]) if isinstance(found, dict) else found

    return image
