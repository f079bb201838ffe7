"""Opening the images of a record. Paths never leave the image folder."""

import os
import posixpath
from pathlib import Path
from typing import IO, Any

import fsspec
import PIL.Image

from ..image_loading import load_rgb
from .records import RecordError


def resolve_image(path: str, folder: str) -> str:
    """The full path or address of an image that the data names `path`.

    Args:
        path: The path as the data gives it, relative to `folder`.
        folder: A local folder, or an address that fsspec knows, for example `s3://bucket/images`.

    Raises:
        RecordError: `path` leads out of the folder, also through `..` or a symbolic link.
    """
    if "://" in folder:
        if "://" in path or path.startswith("/") or ".." in Path(path).parts:
            raise _outside(path, folder)
        return posixpath.join(folder, path)
    try:
        root = Path(folder).resolve()
        full = (root / path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a zero byte
        raise RecordError(f"names the image {path!r}, which cannot be opened: {error}") from error
    if "://" in path or not full.is_relative_to(root):
        raise _outside(path, folder)
    return str(full)


def _outside(path: str, folder: str) -> RecordError:
    return RecordError(f"names the image {path!r}, which is outside the image folder {folder!r}")


def open_image(image: Any, folder: str | None) -> PIL.Image.Image:
    """Decode one image of a record, as every other part of the package decodes images.

    Args:
        image: A path inside `folder`, `{"bytes", "path"}` as `datasets` gives it undecoded, or a PIL image.
        folder: The folder of paths. None where the data contains its images.

    Returns:
        `PIL.Image.Image`: Upright 8-bit RGB. Transparent images are composited on white.

    Raises:
        RecordError: The image is missing, unreadable, or outside the folder.
    """
    name: str | None
    content: Any
    if isinstance(image, PIL.Image.Image):
        name, content = None, image
    elif isinstance(image, dict) and image.get("bytes") is not None:
        name, content = image.get("path"), image["bytes"]
    else:
        name = image["path"] if isinstance(image, dict) else image
        with _open_file(name, folder) as stream:
            content = stream.read()
    try:
        return load_rgb(content)
    except (OSError, ValueError, TypeError) as error:
        named = f", {name!r}" if name else ""
        raise RecordError(f"has an image that cannot be read{named}: {error}") from error


def _open_file(name: str, folder: str | None) -> IO[bytes]:
    if folder is None:
        raise RecordError(f"names the image file {name!r}, but there is no image folder: set `image_folder`")
    try:
        place = resolve_image(name, folder)
        if "://" not in place and not Path(place).is_file():  # opening a named pipe would wait for its other end
            raise FileNotFoundError
        return fsspec.open(place, "rb").open()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise RecordError(f"names the image {name!r}, which is not in the image folder {folder!r}") from error
    except RecordError:
        raise
    except (OSError, ValueError) as error:
        raise RecordError(f"names the image {name!r}, which cannot be opened: {error}") from error


def local_size(image: Any, folder: str | None) -> int | None:
    """The number of bytes of an image file on this machine. None for other images and missing files.

    Args:
        image: The image of a record.
        folder: The record's folder of images.
    """
    path = image.get("path") if isinstance(image, dict) and not image.get("bytes") else image
    if not isinstance(path, str) or folder is None:
        return None
    try:
        return os.path.getsize(resolve_image(path, folder))
    except (OSError, RecordError):
        return None
