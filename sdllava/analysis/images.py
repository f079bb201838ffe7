"""The images of an analysis, with their questions: image files, folders, or any data that training reads."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from ..data.captioned_images import TextedImage, published_images
from ..data.images import open_image
from ..data.ordering import natural_key
from ..data.prompts import PromptOptions, training_prompts
from ..data.records import RecordError, to_record
from ..image_loading import file_fingerprint, load_rgb

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")

DatasetPrompt = Literal["question", "caption", "none"]


@dataclass(frozen=True)
class PromptedImage:
    """An image and the question that conditions the diffusion model.

    Args:
        name (`str`): File name, or the record's name.
        image (`PIL.Image.Image`): Upright RGB.
        question (`str`, *optional*): None for the empty prompt.
    """

    name: str
    image: Image.Image
    question: str | None


class ImageFiles(Sequence[PromptedImage]):
    """Image files with their prompts, opened on access.

    Args:
        files: Names and paths, in order.
        prompts: The prompt of every image, or one of each. None for the empty prompt.
    """

    def __init__(self, files: Sequence[tuple[str, Path]], prompts: str | Sequence[str | None] | None):
        self.files = list(files)
        self.prompts: list[str | None] = []
        if prompts is None or isinstance(prompts, str):
            self.prompts = [prompts] * len(self.files)
        else:
            self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> PromptedImage:  # type: ignore[override]  # slices are not supported
        name, path = self.files[index]
        return PromptedImage(name, load_rgb(path), self.prompts[index])

    @property
    def has_questions(self) -> bool:
        """Whether an image has a prompt."""
        return any(prompt is not None for prompt in self.prompts)

    def fingerprint(self) -> str:
        """Hash of the names, the files (size and first 64 KiB) and the prompts, computed without decoding."""
        return _fingerprint([[name, file_fingerprint(path)] for name, path in self.files], self.prompts)


class DatasetImages(Sequence[PromptedImage]):
    """The first image of each record of a dataset, with its last question or its caption.

    Args:
        path: Anything that [`~sdllava.data.sources.DataSource`] reads.
        prompt: "question", "caption" or "none".
        image_folder: The folder of the image paths.
        question: The question about every image, instead of `prompt`.
    """

    def __init__(self, path: str, prompt: DatasetPrompt, image_folder: str | None, question: str | None = None):
        from ..data.sources import DataSource, load_data  # needs the optional package datasets

        self.rows = load_data([DataSource(path, image_folder=image_folder)])
        self.options = PromptOptions(source=prompt, question="last")
        self.question = question

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> PromptedImage:  # type: ignore[override]  # slices are not supported
        row = self.rows[index]
        if row["error"] or not row["images"]:
            raise RecordError(f"Row {index} {row['error'] or 'has no image'}.")
        record = to_record(row)
        image = open_image(record["images"][0], record["folder"])
        if self.question is not None or not self.has_questions:
            return PromptedImage(record["name"], image, self.question)
        question = training_prompts(record, self.options, seed=0, epoch=0, sample=index)[0]
        return PromptedImage(record["name"], image, question)

    @property
    def has_questions(self) -> bool:
        """Whether the images have a question or a caption."""
        return self.question is not None or self.options.source != "none"

    def fingerprint(self) -> str:
        """Hash of the dataset and of what the prompt is, computed without reading rows."""
        if self.question is not None:
            return _fingerprint(self.rows._fingerprint, "every image", self.question)
        return _fingerprint(self.rows._fingerprint, self.options.source)


def _fingerprint(*values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def open_images(
    sources: Sequence[str],
    question: str | None = None,
    prompt: DatasetPrompt = "question",
    image_folder: str | None = None,
) -> ImageFiles | DatasetImages:
    """Open the images of an analysis.

    Args:
        sources: Image files and folders of image files, or one dataset: COCO's captions or a folder of MMVP or
            MMVP-VLM, as `sdllava evaluate` reads them, or anything that [`~sdllava.data.sources.DataSource`] reads. A
            folder gives the images in it and in its subfolders, in the
            natural order of their paths: `2.jpg` comes before `10.jpg`. A folder that has data files, and images only
            in subfolders, is a dataset.
        question: The question about every image. None for the empty prompt, or the prompts of a dataset.
        prompt: The prompt of a dataset's images where `question` is None: "question", "caption" or "none".
        image_folder: The folder of a dataset's image paths.

    Raises:
        FileNotFoundError: A file does not exist, or a folder has neither images nor a dataset.
    """
    if len(sources) == 1 and (texted := published_images(sources[0], image_folder)) is not None:
        return _with_own_texts(texted, question, prompt)
    files: list[tuple[str, Path]] = []
    for source in sources:
        path = Path(source)
        if path.is_dir() and (images := _images_in_folder(path)):
            files += images
        elif path.suffix.lower() in IMAGE_SUFFIXES:
            if not path.is_file():
                raise FileNotFoundError(f"The image {source!r} does not exist. Check the path.")
            files.append((path.name, path))
        elif path.is_dir() and not _has_data(path):
            raise FileNotFoundError(
                f"The folder {source!r} has neither images ({', '.join(IMAGE_SUFFIXES)}) nor a dataset. Give a folder "
                "that has."
            )
        elif len(sources) == 1:
            return DatasetImages(source, prompt, image_folder, question)
        else:
            raise FileNotFoundError(
                f"{source!r} is neither an image file ({', '.join(IMAGE_SUFFIXES)}) nor a folder of image files. Give "
                "a dataset as the only source."
            )
    return ImageFiles(files, question)


def _with_own_texts(texted: Sequence[TextedImage], question: str | None, prompt: DatasetPrompt) -> ImageFiles:
    """The images of a published set with one question, or with their own questions or captions."""
    files = [(image.name, image.path) for image in texted]
    if question is not None:
        return ImageFiles(files, question)
    if prompt == "none":
        return ImageFiles(files, None)
    return ImageFiles(files, [image.question if prompt == "question" else image.caption for image in texted])


def _images_in_folder(folder: Path) -> list[tuple[str, Path]]:
    """Relative names and paths of the images of a folder, in natural order. Empty for a dataset."""
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not any(path.parent == folder for path in paths) and _has_data(folder):
        return []
    return sorted(
        ((path.relative_to(folder).as_posix(), path) for path in paths),
        key=lambda file: (natural_key(file[0]), file[0]),
    )


def _has_data(folder: Path) -> bool:
    return any(path.suffix.lower() in DATA_SUFFIXES for path in folder.rglob("*"))
