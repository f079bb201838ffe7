"""The images that are looked at: files, a folder, or any data that training reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..data.images import open_image
from ..data.prompts import PromptOptions, training_prompts
from ..data.records import RecordError, to_record
from ..image_loading import load_rgb

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass(frozen=True)
class AskedImage:
    """An image (upright RGB), its name, and what the diffusion model is asked about it, if anything."""

    name: str
    image: Any
    question: str | None


class ImageSet(Sequence[AskedImage]):
    """Images that are opened when they are asked for."""

    def __init__(self, paths: Sequence[Path], question: str | None):
        self.paths, self.question = list(paths), question

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> AskedImage:  # type: ignore[override]  # no slices
        return AskedImage(self.paths[index].name, load_rgb(self.paths[index]), self.question)


class RecordSet(Sequence[AskedImage]):
    """The first image of each record of a dataset, with its last question or its caption."""

    def __init__(self, path: str, prompt: Literal["question", "caption", "none"], image_folder: str | None):
        from ..data.sources import DataSource, load_data

        self.rows = load_data([DataSource(path, image_folder=image_folder)])
        self.options = PromptOptions(source=prompt, question="last")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> AskedImage:  # type: ignore[override]  # no slices
        row = self.rows[index]
        if row["error"] or not row["images"]:
            raise RecordError(f"row {index} {row['error'] or 'has no image'}")
        record = to_record(row)
        question = training_prompts(record, self.options, seed=0, epoch=0, sample=index)[0]
        image = load_rgb(open_image(record["images"][0], record["folder"]))
        return AskedImage(record["name"], image, None if self.options.source == "none" else question)


def open_images(
    sources: Sequence[str],
    question: str | None = None,
    prompt: Literal["question", "caption", "none"] = "question",
    image_folder: str | None = None,
) -> ImageSet | RecordSet:
    """Open what is looked at.

    Args:
        sources: image files and folders of image files (in the order of their names); or one dataset, anything that
            [`~sdllava.data.sources.DataSource`] names.
        question: asked about every image of files and folders; None for the empty prompt.
        prompt: what is asked about a dataset's images: its own question, the caption, or nothing.
        image_folder: where a dataset's image paths are looked up.

    Raises:
        FileNotFoundError: there is no such file, or no image in the folder.
    """
    paths: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir() and (images := sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES)):
            paths += images
        elif path.suffix.lower() in SUFFIXES:
            if not path.is_file():
                raise FileNotFoundError(f"there is no image {source!r}")
            paths.append(path)
        elif path.is_dir() and not any(p.suffix in (".json", ".jsonl", ".parquet", ".arrow") for p in path.rglob("*")):
            raise FileNotFoundError(f"the folder {source!r} holds no images ({', '.join(SUFFIXES)}) and no dataset")
        elif len(sources) == 1:
            return RecordSet(source, prompt, image_folder)
        else:
            raise FileNotFoundError(f"{source!r} is no image file and no folder of image files ({', '.join(SUFFIXES)})")
    return ImageSet(paths, question)
