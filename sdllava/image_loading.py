"""Any image a user gives, as upright RGB: paths, URLs, base64, arrays; EXIF, alpha, palettes, 16 bit, CMYK."""

import base64
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageLike = Any
"""PIL image, path, URL, base64 string, or array `(h, w)`, `(h, w, 3)`, `(3, h, w)`: uint8, or float in [0, 1]."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "PPM")
"""Formats that are decoded. Pillow reads others, some of them by starting another program."""
MAX_PIXELS = 8192 * 6144
"""Largest image that is decoded, in pixels."""
MAX_ASPECT_RATIO = 200
"""Largest ratio of the longer to the shorter side."""
MAX_SIDE = 4096
"""Longer side of a decoded image, in pixels. Larger images are scaled down, so that padding to a square is cheap."""
MAX_DOWNLOAD = 64 << 20
"""Largest image that is downloaded, in bytes."""
MAX_DOWNLOAD_SECONDS = 60
"""Longest download of an image, in seconds."""

_STRIP = 256  # rows that are converted at a time, so that no second full-size copy is held


class _RangeError(ValueError):
    """Pixel values are out of range. The message is for the user."""


def load_rgb(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image as upright 8-bit RGB, of at most `MAX_SIDE` pixels on its longer side.

    Transparent images are composited on white, 16-bit greyscale is scaled to 8 bits, EXIF orientation is applied. Of
    an animation, the first frame is decoded. The size in the header is checked before pixels are allocated.

    Args:
        image: See [`ImageLike`]. Files have one of the `FORMATS`.
        max_pixels: Images with more pixels raise.

    Raises:
        FileNotFoundError: A string is not an existing file, URL or base64.
        TypeError: It is not an image in any of these forms.
        ValueError: It cannot be decoded, has no pixels or values out of range, is too large or too thin.
    """
    name = _name(image)
    source: Any
    if isinstance(image, np.ndarray | torch.Tensor):
        if image.ndim in (2, 3):
            height, width = _height_and_width(image.shape)
            _check_size(name, width, height, max_pixels)
        source = _from_array(_to_numpy(image))
    else:
        source = image if isinstance(image, Image.Image) else _source(image)
    with _errors_of_pillow(name):
        opened = source if isinstance(source, Image.Image) else Image.open(source, formats=FORMATS)
    _check_size(name, opened.width, opened.height, max_pixels)
    with _errors_of_pillow(name):
        opened.load()
        is_file = opened.format is not None
        if opened is image:
            opened = ImageOps.exif_transpose(opened)
        else:
            ImageOps.exif_transpose(opened, in_place=True)
        if opened.mode == "I":
            opened = _grey(opened, is_file)
        rgb = Image.new("RGB", opened.size)
        for top in range(0, opened.height, _STRIP):
            strip = opened.crop((0, top, opened.width, min(top + _STRIP, opened.height)))
            rgb.paste(_to_rgb(strip), (0, top))
        return rgb if max(rgb.size) <= MAX_SIDE else rgb.resize(_limited_size(rgb), Image.Resampling.BICUBIC)


def _limited_size(image: Image.Image) -> tuple[int, int]:
    scale = MAX_SIDE / max(image.size)
    return max(round(image.width * scale), 1), max(round(image.height * scale), 1)


def _check_size(name: str, width: int, height: int, max_pixels: int) -> None:
    size = f"its size is {width} x {height}"
    if min(width, height) == 0:
        raise ValueError(f"{name} has no pixels: {size}. Give another image.")
    if width * height > max_pixels:
        raise ValueError(
            f"{name} may be a decompression bomb: {size}. Give an image of at most {max_pixels / 1e6:.0f} million "
            "pixels."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{name} is too thin: {size}. Give an image with a ratio of at most {MAX_ASPECT_RATIO}:1.")


@contextmanager
def _errors_of_pillow(name: str) -> Iterator[None]:
    """Turn what Pillow raises for an image into a `ValueError` that names it."""
    try:
        yield
    except (FileNotFoundError, _RangeError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} may be a decompression bomb ({error}). Give a smaller image.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read. Give PNG, JPEG or WebP.") from error
    except Exception as error:  # for damaged files, its plugins raise errors of ten other types
        reason = str(error) or type(error).__name__
        raise ValueError(f"{name} is truncated or unreadable ({reason}). Give an intact file.") from error


def _name(image: ImageLike) -> str:
    if isinstance(image, str | os.PathLike):
        return f"Image {str(image)[:80]!r}"
    return "The image" if isinstance(image, bytes) else f"The {type(image).__name__} image"


def _source(image: Any) -> str | os.PathLike | BytesIO:
    """What `Image.open` reads: a path, or the bytes of a file."""
    if isinstance(image, bytes):
        return BytesIO(image)
    if isinstance(image, os.PathLike):
        return image
    if not isinstance(image, str):
        raise TypeError(f"{image!r:.80} is not an image. Give a PIL image, path, URL, base64 string or array.")
    if image.startswith(("http://", "https://")):
        return BytesIO(_fetch(image))
    if os.path.exists(image):
        return image
    return BytesIO(_decode_base64(image))


def _fetch(url: str) -> bytes:
    body = bytearray()
    end = time.monotonic() + MAX_DOWNLOAD_SECONDS
    try:
        options: dict[str, Any] = {"timeout": 30, "follow_redirects": True, "headers": {"Accept-Encoding": "identity"}}
        with httpx.stream("GET", url, **options) as response:
            response.raise_for_status()
            for chunk in response.iter_raw():  # not unpacked: a packed answer can be far larger than its chunks
                body += chunk
                if len(body) > MAX_DOWNLOAD:
                    raise ValueError(f"Image {url!r} is larger than {MAX_DOWNLOAD >> 20} MiB. Download it yourself.")
                if time.monotonic() > end:
                    raise ValueError(f"Image {url!r} took over {MAX_DOWNLOAD_SECONDS} s. Download it yourself.")
    except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"Image {url!r} cannot be fetched ({reason}). Check the address.") from error
    return bytes(body)


def _decode_base64(text: str) -> bytes:
    body = text.split(",", 1)[1] if text.startswith("data:image/") and "," in text else text
    try:
        if len(body) < 64:
            raise ValueError("It is too short.")
        return base64.b64decode("".join(body.split()), validate=True)
    except ValueError as error:
        raise FileNotFoundError(
            f"Image {text[:80]!r} is not an existing file, a URL or base64. Check the path."
        ) from error


def _to_numpy(image: np.ndarray | torch.Tensor) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    image = image.detach().cpu()
    return (image.float() if image.is_floating_point() else image).numpy()


def _channels_first(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 3, 4)


def _height_and_width(shape: Sequence[int]) -> tuple[int, int]:
    height, width = shape[1:] if _channels_first(shape) else shape[:2]
    return height, width


def _from_array(array: np.ndarray) -> Image.Image:
    if _channels_first(array.shape):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"An array of shape {array.shape} is not an image. Give (h, w), (h, w, 3) or (3, h, w).")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"An array of type {array.dtype} is not an image. Give uint8, or float in [0, 1].")
    if np.issubdtype(array.dtype, np.floating):
        if not (array.min() >= 0 and array.max() <= 1):  # false for NaN
            raise _RangeError(f"A float image has values in [{array.min():g}, {array.max():g}]. Scale it to [0, 1].")
        array = (array * 255).round()
    elif array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise _RangeError(f"An integer image has values in [{array.min()}, {array.max()}]. Scale it to [0, 255].")
    return Image.fromarray(array.astype(np.uint8))


def _grey(image: Image.Image, is_file: bool) -> Image.Image:
    """An image of mode "I" in 8 bits. Values up to 255 are taken as they are, unless a file has 16 bits for them."""
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _RangeError(f"An image of mode 'I' has values in [{low}, {high}]. Scale it to [0, 255].")
    return Image.fromarray((values // 257 if is_file or high > 255 else values).astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_array(np.asarray(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def file_fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a file's size and first 64 KiB: enough to notice an exchanged image."""
    with open(path, "rb") as file:
        head = file.read(64 << 10)
        return hashlib.sha256(b"%d " % os.fstat(file.fileno()).st_size + head).hexdigest()


def pad_to_square(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    """Centre an RGB image on a square of its longer side, filled with `colour` (0..255), as LLaVA-1.5 does."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
