"""Damaged images through the decoder and the padding: `python tests/faults/image_mutations.py --count 1000 --seed 0`.

Prints, as JSON, how many images were decoded and how many raised a documented error, the slowest one in seconds, the
growth of the process's peak memory in MB, and every failure: another exception, or an image that took too long.
"""

import argparse
import io
import json
import random
import resource
import struct
import time
import zlib
from collections import Counter
from functools import cache

import numpy as np
from PIL import Image

from sdllava.image_loading import load_rgb, pad_to_square

MAX_SECONDS = 2.0
"""Longest time for one image."""
DOCUMENTED = (ValueError, TypeError, FileNotFoundError)
PADDING = (122, 116, 104)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def bases() -> dict[str, bytes]:
    """Intact images of every kind, by name."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    alpha = noise.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(noise.size))
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (48, 64), dtype=np.uint16))
    palette = noise.quantize(16)
    frames = {"save_all": True, "append_images": [noise.rotate(90), noise.rotate(180)], "duration": 50}
    found = {
        "png": encoded(noise, "PNG"),
        "png-alpha": encoded(alpha, "PNG"),
        "png-16": encoded(deep, "PNG"),
        "png-palette": encoded(palette, "PNG", transparency=0),
        "jpeg": encoded(noise, "JPEG"),
        "jpeg-progressive": encoded(noise, "JPEG", progressive=True),
        "jpeg-cmyk": encoded(noise.convert("CMYK"), "JPEG"),
        "webp": encoded(alpha, "WEBP"),
        "webp-lossless": encoded(noise, "WEBP", lossless=True),
        "webp-animated": encoded(noise, "WEBP", **frames),
        "gif": encoded(palette, "GIF", transparency=0),
        "gif-animated": encoded(noise, "GIF", **frames),
        "png-animated": encoded(noise, "PNG", **frames),
        "tiff": encoded(noise, "TIFF"),
        "tiff-lzw": encoded(alpha, "TIFF", compression="tiff_lzw"),
        "tiff-float": encoded(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"),
        "bmp": encoded(noise, "BMP"),
        "avif": encoded(noise, "AVIF"),
    }
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        found[f"jpeg-exif-{orientation}"] = encoded(noise, "JPEG", exif=exif)
    return found


def png(width: int, height: int, rows: bytes, bit_depth: int = 8, colour_type: int = 0) -> bytes:
    """A PNG with any header. Its checksums are right."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


SIDES = (0, 1, 2, 63, 4096, 5000, 8192, 20_000, 30_000, 65_535, 178_000_000, 2**31 - 1, 2**32 - 1)


def forged_png(source: random.Random) -> bytes:
    """A PNG whose header claims any size, depth and colour type; a few of them with all of their rows."""
    width, height = source.choice(SIDES), source.choice(SIDES)
    depth, colour = source.choice((1, 2, 4, 8, 16)), source.choice((0, 2, 3, 4, 6))
    rows = bytes(source.randrange(10_000))
    if width * height < 2**25 and depth <= 8:
        rows = bytes((width * 4 + 1) * height)
    return png(width, height, rows, depth, colour)


def mutated(data: bytes, source: random.Random) -> bytes:
    """One to three mutations: flipped bits, a truncation, forged numbers, a removed or repeated part, rubbish."""
    changed = bytearray(data)
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        if not changed:
            break
        place = source.randrange(min(len(changed), source.choice((32, 128, len(changed), len(changed)))))
        match source.randrange(6):
            case 0:
                changed[place] ^= 1 << source.randrange(8)
            case 1:
                del changed[place:]
            case 2:  # a number of the header
                number = struct.pack(source.choice("<>") + "I", source.choice(SIDES))
                changed[place : place + 4] = number[: source.choice((2, 4))]
            case 3:
                del changed[place : place + source.randint(1, 64)]
            case 4:
                changed[place:place] = changed[place : place + source.randint(1, 64)]
            case _:
                changed[place : place + 16] = source.randbytes(16)
    return bytes(changed)


def examples(count: int, seed: int):
    """Yield names and damaged images, the same for one seed."""
    source = random.Random(seed)
    names = sorted(bases())
    for number in range(count):
        if number % 10 == 0:
            yield f"{number}: forged png", forged_png(source)
        else:
            name = source.choice(names)
            yield f"{number}: {name}", mutated(bases()[name], source)


def run(count: int, seed: int) -> dict:
    """Decode and pad damaged images.

    Args:
        count: Their number.
        seed: Decides which they are.

    Returns:
        `dict`: `decoded`, `errors`, `slowest`, `memory` and `failures`; see the module.
    """
    outcomes: Counter = Counter()
    failures, slowest = [], (0.0, "")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, data in examples(count, seed):
        start = time.process_time()
        try:
            pad_to_square(load_rgb(data), PADDING)
            outcomes["decoded"] += 1
        except DOCUMENTED:
            outcomes["errors"] += 1
        except Exception as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        seconds = time.process_time() - start
        slowest = max(slowest, (seconds, name))
        if seconds > MAX_SECONDS:
            failures.append(f"{name}: {seconds:.1f} s")
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000
    return {**outcomes, "slowest": slowest, "memory": memory, "failures": failures}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None, help="Default: another one for each run; it is printed.")
    given = parser.parse_args()
    seed = random.randrange(2**32) if given.seed is None else given.seed
    result = run(given.count, seed)
    print(json.dumps({"seed": seed, **result}, indent=1))
    raise SystemExit(bool(result["failures"]) or result["memory"] > 500)
