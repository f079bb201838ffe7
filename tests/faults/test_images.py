"""Damaged, forged, huge and thin images: the decoder gives the image or a documented error, in bounded time and memory.

The long version is `make fuzz`.
"""

import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import image_mutations
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from image_mutations import DOCUMENTED, MAX_SECONDS, bases, encoded, mutated, png, run
from PIL import Image

from sdllava.image_loading import MAX_ASPECT_RATIO, MAX_PIXELS, MAX_SIDE, load_rgb, pad_to_square

SCRIPT = Path(image_mutations.__file__)


def test_intact_images_of_every_kind_are_decoded():
    sizes = {name: load_rgb(data).size for name, data in bases().items()}
    turned = {f"jpeg-exif-{orientation}" for orientation in (5, 6, 7, 8)}
    expected = {name: (48, 64) if name in turned else (64, 48) for name in sizes}
    assert sizes == {**expected, "tiff-float": (9, 9)}


def test_damaged_images_give_the_image_or_a_documented_error():
    result = run(count=60, seed=3)
    assert result["failures"] == []
    assert result["decoded"] + result["errors"] == 60
    assert result["decoded"] > 5


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(bases())), st.integers(0, 2**32))
def test_a_mutated_image_is_rgb_of_limited_size_or_a_documented_error(name, seed):
    try:
        image = load_rgb(mutated(bases()[name], random.Random(seed)))
    except DOCUMENTED:
        return
    assert image.mode == "RGB"
    assert max(image.size) <= MAX_SIDE


KINDS = st.one_of(arrays.integer_dtypes(), arrays.floating_dtypes(), arrays.complex_number_dtypes(), st.just("bool"))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(arrays.arrays(KINDS, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6)))
def test_an_array_is_an_image_of_its_size_or_a_documented_error(array):
    try:
        image = load_rgb(array)
    except DOCUMENTED:
        return
    height, width = array.shape[1:] if array.ndim == 3 and image.size == array.shape[:0:-1] else array.shape[:2]
    assert image.size == (width, height)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.one_of(st.text(), st.binary(), st.integers(), st.none()))
def test_anything_else_is_a_documented_error(value):
    with pytest.raises(DOCUMENTED):
        load_rgb(value)


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/", "http://\ud800/", "http://[::1", "https://:99999999/"])
def test_a_bad_address_is_a_documented_error(address):
    with pytest.raises(ValueError, match=r"cannot be fetched .*\. Check the address\."):
        load_rgb(address)


def row(length: int) -> bytes:
    return png(1, length, bytes(2 * length))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (row(20_000), r"is too thin: its size is 1 x 20000\. Give an image with a ratio of at most 200:1"),
        (row(30_000), "is too thin"),
        (png(1, 178_000_000, b""), "may be a decompression bomb: its size is 1 x 178000000"),
        (png(178_000_000, 1, b""), "may be a decompression bomb"),
        (png(30_000, 30_000, b""), "may be a decompression bomb"),
        (png(MAX_PIXELS + 1, 1, b""), "Give an image of at most 50 million pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image that Pillow can read"),
    ],
)
def test_forged_sizes_raise_before_pixels_are_allocated(data, message):
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_rgb(data)
    assert time.process_time() - start < 0.2


def test_arrays_and_opened_images_have_the_same_limits():
    for image in (np.zeros((1, 300, 3), np.uint8), Image.new("L", (300, 1)), Image.open(io.BytesIO(row(300)))):
        with pytest.raises(ValueError, match="is too thin"):
            load_rgb(image)
    with pytest.raises(ValueError, match="at most 0 million pixels"):
        load_rgb(np.zeros((30, 30), np.uint8), max_pixels=899)


def test_a_large_image_is_scaled_before_it_is_padded():
    large = Image.new("RGB", (2 * MAX_SIDE, 2 * MAX_SIDE // MAX_ASPECT_RATIO + 1), (200, 10, 30))
    image = load_rgb(encoded(large, "PNG"))
    assert image.size == (MAX_SIDE, 20)
    assert image.getpixel((7, 7)) == (200, 10, 30)
    assert pad_to_square(image, (0, 0, 0)).size == (MAX_SIDE, MAX_SIDE)


def test_an_image_that_was_given_open_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (40, 20)), "JPEG", exif=exif)))
    assert load_rgb(image).size == (20, 40)
    assert image.size == (40, 20)


def test_rows_are_converted_alike_wherever_they_are():
    alpha = Image.effect_noise((30, 700), 90).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(alpha.size))
    white = Image.new("RGBA", alpha.size, "white")
    assert np.array_equal(load_rgb(alpha), Image.alpha_composite(white, alpha).convert("RGB"))


@pytest.mark.slow
def test_1000_damaged_images_take_little_time_and_memory():
    command = [sys.executable, str(SCRIPT), "--count", "1000", "--seed", "0"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(finished.stdout)
    assert result["failures"] == []
    assert result["slowest"][0] < MAX_SECONDS
    assert result["memory"] < 500
    assert result["decoded"] + result["errors"] == 1000
    assert finished.returncode == 0


@pytest.mark.slow
def test_the_largest_images_take_little_memory():
    """Valid images of almost the largest number of pixels, in the modes that need most memory."""
    code = """
import io, resource, sys
from image_mutations import png
from sdllava.image_loading import load_rgb
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for colour, depth, size in ((6, 8, 4), (0, 16, 2)):
    width, height = 8000, 6000
    image = load_rgb(png(width, height, bytes((width * size + 1) * height), depth, colour))
    assert image.size == (4096, 3072)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000)
"""
    environment = {"PYTHONPATH": str(SCRIPT.parent), "PATH": "", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert float(finished.stdout) < 900  # of which the rows of the test itself are 192
