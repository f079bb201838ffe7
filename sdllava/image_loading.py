"""Any image a user gives, as upright RGB: paths, URLs, base64, arrays; EXIF, alpha, palettes, 16 bit, CMYK."""

import base64
import binascii
import os
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

ImageLike = Any
"""PIL image, path, URL, base64 string, or array `(h, w)`, `(h, w, 3)`, `(3, h, w)`: uint8, or float in [0, 1]."""

MAX_DOWNLOAD = 64 << 20
"""Largest image that is downloaded, in bytes."""


def load_rgb(image: ImageLike) -> Image.Image:
    """Decode an image as upright 8-bit RGB.

    Transparent images are composited on white, 16-bit greyscale is scaled to 8 bits, EXIF orientation is applied.
    Pillow's limit on decompressed pixels is kept.

    Args:
        image: See [`ImageLike`].

    Raises:
        FileNotFoundError: A string is not an existing file, URL or base64.
        TypeError: It is not an image in any of these forms.
        ValueError: It cannot be decoded, has no pixels or values out of range, or is too large.
    """
    name = _name(image)
    try:
        opened = _open(image)
        if min(opened.size) == 0:
            raise ValueError(f"{name} has no pixels: its size is {opened.width} x {opened.height}. Give another image.")
        opened.load()
        return _to_rgb(ImageOps.exif_transpose(opened))
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} may be a decompression bomb ({error}). Give a smaller image.") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow can read. Give PNG, JPEG or WebP.") from error
    except (OSError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{name} is truncated or unreadable ({error}). Give an intact file.") from error


def _name(image: ImageLike) -> str:
    if isinstance(image, str | os.PathLike):
        return f"Image {str(image)[:80]!r}"
    return "The image" if isinstance(image, bytes) else f"The {type(image).__name__} image"


def _open(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray | torch.Tensor):
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu()
            image = (image.float() if image.is_floating_point() else image).numpy()
        return _from_array(image)
    if isinstance(image, bytes):
        return Image.open(BytesIO(image))
    if isinstance(image, os.PathLike):
        return Image.open(image)
    if not isinstance(image, str):
        raise TypeError(f"{image!r} is not an image. Give a PIL image, path, URL, base64 string or array.")
    if image.startswith(("http://", "https://")):
        return Image.open(BytesIO(_fetch(image)))
    if os.path.exists(image):
        return Image.open(image)
    return Image.open(BytesIO(_decode_base64(image)))


def _fetch(url: str) -> bytes:
    body = bytearray()
    try:
        with httpx.stream("GET", url, timeout=30, follow_redirects=True) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > MAX_DOWNLOAD:
                    raise ValueError(f"Image {url!r} is larger than {MAX_DOWNLOAD >> 20} MiB. Download it yourself.")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"Image {url!r} cannot be fetched ({reason}). Check the address.") from error
    return bytes(body)


def _decode_base64(text: str) -> bytes:
    body = text.split(",", 1)[1] if text.startswith("data:image/") and "," in text else text
    try:
        if len(body) < 64:
            raise binascii.Error("too short")
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise FileNotFoundError(
            f"Image {text[:80]!r} is not an existing file, a URL or base64. Check the path."
        ) from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"An array of shape {array.shape} is not an image. Give (h, w), (h, w, 3) or (3, h, w).")
    if 0 in array.shape:
        raise ValueError(f"An array of shape {array.shape} has no pixels. Give another image.")
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"A float image has values in [{array.min():g}, {array.max():g}]. Scale it to [0, 1].")
        array = (array * 255).round()
    elif array.dtype != np.uint8 and (array.min() < 0 or array.max() > 255):
        raise ValueError(f"An integer image has values in [{array.min()}, {array.max()}]. Scale it to [0, 255].")
    return Image.fromarray(array.astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.int64) // 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return _from_array(np.asarray(image)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def pad_to_square(image: Image.Image, colour: Sequence[int]) -> Image.Image:
    """Centre an RGB image on a square of its longer side, filled with `colour` (0..255), as LLaVA-1.5 does."""
    if image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(colour))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
