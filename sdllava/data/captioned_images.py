"""Images with a question or captions, in the layouts in which benchmarks are published: COCO, MMVP and MMVP-VLM."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MMVP_FOLDERS = ("MMVP Images", "MMVP_Images", "MMVP Imgaes")
MMVP_VLM_FOLDERS = ("MLLM_VLM Images", "MMVP_VLM_Images")


@dataclass(frozen=True)
class TextedImage:
    """An image file with what is known about it.

    Args:
        name (`str`): Unique name.
        path (`Path`): The file.
        question (`str`, *optional*): The question about it.
        caption (`str`, *optional*): Its first caption.
    """

    name: str
    path: Path
    question: str | None = None
    caption: str | None = None


def published_images(source: str | Path, image_folder: str | Path | None = None) -> list[TextedImage] | None:
    """The images of COCO's captions or of an MMVP folder, in the published order.

    Args:
        source: A JSON or JSON Lines file of COCO captions (see `coco_rows`), or a folder with `Questions.csv` and the
            images of MMVP or MMVP-VLM.
        image_folder: The folder of COCO's images. Default: the file's folder.

    Returns:
        The images, None if the source has another layout.

    Raises:
        FileNotFoundError: An image is missing.
    """
    path = Path(source)
    if path.is_dir():
        return _mmvp(path)
    rows = coco_rows(path) if path.suffix.lower() in (".json", ".jsonl") and path.is_file() else None
    if rows is None:
        return None
    folder = Path(image_folder) if image_folder else path.parent
    return [
        TextedImage(row["filename"], find_image(folder, row), caption=(row["sentences"] or [None])[0]) for row in rows
    ]


def coco_rows(path: Path) -> list[dict[str, Any]] | None:
    """Captions of a file: `filename`, `sentences` and, where known, `filepath` and `split`.

    Reads Karpathy's `dataset_coco.json`, rows of `yerevann/coco-karpathy` as JSON Lines (also with `image` and
    `captions`), and COCO's annotation files (`captions_val2017.json`).

    Returns:
        One row per image, None if the file has other contents.
    """
    if path.suffix.lower() == ".jsonl":
        lines = _json_lines(path)
        first = next(lines, None)
        if not isinstance(first, dict) or not _sentences(first):
            return None
        return [_row(row) for row in (first, *lines)]
    with path.open(encoding="utf-8") as file:
        if file.read(1000).lstrip()[:1] != "{":  # LLaVA's training data is a list, and may be large
            return None
    contents = json.loads(path.read_text(encoding="utf-8"))
    images = contents.get("images")
    if not isinstance(images, list) or not images:
        return None
    if "sentences" in images[0]:
        return [{**row, "sentences": [sentence["raw"] for sentence in row["sentences"]]} for row in images]
    if not all("id" in row and "file_name" in row for row in images):
        return None
    captions: dict[int, list[str]] = {}
    for annotation in contents.get("annotations", ()):
        captions.setdefault(annotation["image_id"], []).append(annotation.get("caption", ""))
    rows = [{"filename": row["file_name"], "sentences": captions.get(row["id"], [])} for row in images]
    return rows if captions else None


def find_image(folder: Path, row: dict[str, Any]) -> Path:
    """The file of a row, in the folder, or in the subfolder of its split or `images/`.

    Raises:
        FileNotFoundError: There is none.
    """
    name = row["filename"]
    subfolders = [row["filepath"]] if row.get("filepath") else []
    for subfolder in (*subfolders, "", "images", "val2017", "val2014"):
        if (path := folder / subfolder / name).is_file():
            return path
    raise FileNotFoundError(
        f"The image {name!r} is missing from {str(folder)!r}. COCO's annotations contain no images: give their folder "
        "with --image-folder."
    )


def _sentences(row: dict[str, Any]) -> bool:
    return bool(row.get("filename") and row.get("sentences")) or bool(row.get("image") and row.get("captions"))


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return {"filename": row.get("image"), "sentences": row.get("captions"), **row}


def _json_lines(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _mmvp(folder: Path) -> list[TextedImage] | None:
    questions = folder / "Questions.csv"
    if not questions.is_file():
        return None
    with questions.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row][1:]
    if (images := _subfolder(folder, MMVP_FOLDERS)) is not None:
        return [TextedImage(f"{k}.jpg", images / f"{k}.jpg", question=row[1]) for k, row in enumerate(rows, 1)]
    if (images := _subfolder(folder, MMVP_VLM_FOLDERS)) is not None:
        return [
            TextedImage(f"{kind}/{number.strip()}.jpg", images / kind / f"{number.strip()}.jpg", caption=statement)
            for number, kind, statement in rows
        ]
    return None


def _subfolder(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)
