"""The interface of a benchmark (samples, parsing, scores), and helpers to find its data and open its images."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
from PIL import Image

from ...data.json_files import json_lines
from ...image_loading import load_rgb

if TYPE_CHECKING:
    from datasets import Dataset

ImageSource = Image.Image | Path | Callable[[], Image.Image]
"""A decoded image, a file, or a function that decodes the image."""


@dataclass(frozen=True)
class Sample:
    """One question of a benchmark.

    Attributes:
        id: Unique within the benchmark. Samples of two runs are paired by it.
        prompt: The user's text with the instruction suffix, without image tokens.
        images: The source of each image, opened when its batch is prepared.
        target: The correct answer, a JSON value.
        question: The question without answer instruction: the diffusion model's prompt by default.
        image_ids: One name per image, the key of pseudo-caption files.
        info: Further JSON fields that the scoring needs (task, pair, options).
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...]
    target: Any = None
    question: str = ""
    image_ids: tuple[str, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)


class Benchmark:
    """A published benchmark: reads its data, builds the prompts, parses the replies, computes the scores.

    A subclass sets the class attributes and implements `read`, `parse` and `units`, and `scores` and `chance` if they
    differ from the defaults. All scores are percentages (0 to 100).

    A *unit* is what a score averages over and what a bootstrap resamples: a pair for MMVP, a group for NaturalBench,
    a question for BLINK. Every score is a function of the means of named numbers over the units.

    Args:
        protocol: A key of `protocols`.

    Raises:
        ValueError: The benchmark has no such protocol.
    """

    name: str
    hub_id: str
    split: str
    metric: str
    max_new_tokens: int
    protocols: dict[str, str] = {}  # name -> description
    files: tuple[str, ...] = ("*",)  # patterns of the files to download from the Hub
    data_file: bool = False  # `--data` is a file, which `read` takes in place of a folder
    judge_temperature: float = 0.2
    template: str = "chat"  # "plain": image tokens and prompt, without the chat template
    image_folder: Path | None = None  # the images' folder, if it is not the annotations' folder

    def __init__(self, protocol: str = "default"):
        if protocol not in self.protocols:
            raise ValueError(
                f"{self.name} has no protocol {protocol!r}. Choose one of {', '.join(self.protocols)} with --protocol."
            )
        self.protocol = protocol
        self.notes: dict[str, str] = {}  # remarks that belong to the results, added by scoring

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of `generate`: greedy unless the official protocol samples."""
        return {"do_sample": False, "num_beams": 1, "max_new_tokens": self.max_new_tokens}

    def default_folder(self) -> Path:
        """The folder of the data without `--data`, where `hub_id` is empty. Ignored by rendered benchmarks.

        Raises:
            FileNotFoundError: The data is not on this machine. The message says where to get it.
        """
        return Path()

    def read(self, folder: Path) -> list[Sample]:
        """All samples of the published layout in `folder`, in the published order."""
        raise NotImplementedError

    def parse(self, sample: Sample, reply: str) -> Any:
        """The answer in a reply, or None if the reply contains no readable answer."""
        raise NotImplementedError

    def is_correct(self, sample: Sample, parsed: Any) -> bool | None:
        """The verdict on one reply, or None if it needs a judge or a whole corpus."""
        return parsed is not None and parsed == sample.target

    def units(self, records: Sequence[dict]) -> dict[str, dict[str, float]]:
        """Unit id -> named numbers, from the records of `samples.jsonl`."""
        return {record["id"]: {"accuracy": 100.0 * record["correct"]} for record in records}

    def scores(self, means: dict[str, float]) -> dict[str, float]:
        """Scores from the mean over units of each number in `units`."""
        return dict(means)

    def score(self, records: Sequence[dict]) -> dict[str, float]:
        """Scores of the records, empty without records."""
        return self.scores(unit_means(self.units(records))) if records else {}

    def chance(self, records: Sequence[dict]) -> dict[str, float]:
        """The scores of uniform guessing, in percent. Empty if guessing is not defined."""
        return {}

    def judge_prompt(self, record: dict) -> tuple[str, str] | None:
        """The judge's system and user message, or None if the protocol does not judge this record."""
        return None

    def apply_judgment(self, record: dict, judgment: str) -> None:
        """Write the verdict in a judge's reply into the record."""
        raise NotImplementedError


def unit_means(units: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of each named number over the units. A unit without a number counts as 0 for it."""
    totals: dict[str, float] = {}
    for values in units.values():
        for key, value in values.items():
            totals[key] = totals.get(key, 0.0) + value
    return {key: total / len(units) for key, total in totals.items()}


def fingerprint(samples: Sequence[Sample]) -> str:
    """A short hash of ids, prompts and answers. Equal for two runs on the same questions."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.prompt, sample.target], sort_keys=True).encode())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------------------- finding data


def locate(
    data: str | None, hub_id: str, revision: str | None, files: Iterable[str] = ("*",)
) -> tuple[Path, dict[str, str | None]]:
    """Find a benchmark's folder, downloading it from the Hub if needed.

    Args:
        data: A local folder in the published layout, or a Hub data set id. None uses the published id.
        hub_id: The published data set id.
        revision: A branch, tag or commit of the Hub repository.
        files: Patterns of the files to download.

    Returns:
        `tuple[Path, dict]`: The folder, and `{"id", "revision"}` with the commit (None for a local folder).

    Raises:
        FileNotFoundError: The folder does not exist, or the Hub does not have it or cannot be reached.
    """
    name = data or hub_id
    if Path(name).is_dir():
        return Path(name), {"id": str(name), "revision": None}
    if Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(
            f"{name!r} is neither a folder nor the id of a data set on the Hub (owner/name). Correct --data."
        )
    try:
        folder = Path(
            snapshot_download(
                name,
                repo_type="dataset",
                revision=revision,
                allow_patterns=list(files),
                max_workers=4,
                local_files_only=is_offline_mode(),  # huggingface_hub 1 would ask the Hub for a commit's files
            )
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"The data set {name!r} (revision {revision or 'main'}) could not be downloaded from the Hub: {reason} "
            "Give a local folder in the published layout with --data, or accept a gated data set's terms and log in."
        ) from error
    return folder, {"id": name, "revision": folder.name}


def inside(folder: Path, name: str) -> Path:
    """`folder / name`, which must exist inside the folder.

    Raises:
        ValueError: The name is absolute or leads out of the folder.
        FileNotFoundError: The file does not exist.
    """
    path = folder / name
    # the Hub's cache stores a snapshot's files as links into its own folder of blobs
    roots = [folder.resolve(), *(p.parent / "blobs" for p in folder.resolve().parents if p.name == "snapshots")]
    if ".." in PurePosixPath(name).parts or not any(path.resolve().is_relative_to(root) for root in roots):
        raise ValueError(
            f"The file name {name!r} in the data leads out of {str(folder)!r}. Files outside are not read."
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"The image or file {name!r} is missing from {str(folder)!r}. Complete the folder, then run the same "
            "command again."
        )
    return path


def find_folder(folder: Path, *names: str) -> Path:
    """The first of the named subfolders that exists.

    Raises:
        FileNotFoundError: None of them exists.
    """
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    raise FileNotFoundError(
        f"{str(folder)!r} has no folder {' or '.join(map(repr, names))}. Arrange it in the published layout."
    )


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a UTF-8 CSV file with a header, with or without a byte order mark."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def read_json_lines(path: Path) -> list[dict]:
    """The rows of a JSON Lines file, blank lines skipped.

    Raises:
        ValueError: A line is not a JSON object in UTF-8. The message has its number.
    """
    rows = []
    with path.open("rb") as stream:
        for number, row in json_lines(stream):
            if not isinstance(row, dict):
                raise ValueError(f"{str(path)!r}, line {number}, is not a JSON object: {row!s:.200}. Repair it.")
            rows.append(row)
    return rows


def read_parquet(folder: Path, pattern: str, split: str | None = None) -> "Dataset | None":
    """The parquet files under `folder` that match, joined in name order, or None if there are none.

    Args:
        folder: Searched recursively.
        pattern: Of the file names.
        split: Keeps only files whose name starts with it.
    """
    paths = [path for path in sorted(folder.rglob(pattern)) if split is None or path.name.startswith(split)]
    if not paths:
        return None
    from datasets import load_dataset

    return load_dataset("parquet", data_files=[str(path) for path in paths], split="train")


def require_columns(benchmark: str, found: Iterable[str], needed: Iterable[str]) -> None:
    """Check that the data has its columns.

    Raises:
        ValueError: A column is missing.
    """
    found = list(found)
    for column in needed:
        if column not in found:
            raise ValueError(
                f"{benchmark}: the column {column!r} is missing (found: {', '.join(found)}). The data may have "
                "changed upstream: pin the revision that had it with --revision."
            )


def require_option(benchmark: str, sample_id: str, answer: str, options: Sequence[str]) -> str:
    """Check that an answer is one of the options, and return it.

    Raises:
        ValueError: It is not.
    """
    if answer not in options:
        raise ValueError(
            f"{benchmark}: the answer {answer!r} of {sample_id} is not one of {', '.join(options)}. Correct the data, "
            "or pin another revision with --revision."
        )
    return answer


# -------------------------------------------------------------------------------------------------------- images


def open_image(source: ImageSource, name: str = "image") -> Image.Image:
    """Decode an image from any source of a sample, as upright RGB on white; see `load_rgb`.

    Raises:
        FileNotFoundError: The image is missing.
        ValueError: The image cannot be read. The message has its name.
    """
    try:
        return load_rgb(source() if callable(source) else source)
    except FileNotFoundError:
        raise FileNotFoundError(f"The image {name!r} is missing. Complete the data.") from None
    except (OSError, SyntaxError, TypeError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {name!r} cannot be read: {error}") from error


def blank_image(image: Image.Image) -> Image.Image:
    """A mid-grey image of the same size, the input of a blind run."""
    return Image.new("RGB", image.size, (127, 127, 127))


def dataset_image(dataset: "Dataset", row: int, column: str) -> Callable[[], Image.Image]:
    """A function that decodes one image of a `datasets.Dataset`, without the row's other images."""
    return lambda: dataset.select_columns([column])[row][column]
