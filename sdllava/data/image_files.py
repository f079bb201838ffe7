"""Whether the image files that a data set names exist, before a run begins."""

import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np

from .images import resolve_image
from .records import RecordError
from .sources import DataSource, load_data

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SAMPLED_ROWS = 1000
"""Rows per source."""
REMOTE_ROWS = 100
"""Rows per source with images at an address, where every question takes a request."""


def check_image_files(
    data: "Dataset | IterableDataset", sources: Sequence[DataSource], max_missing: float, seed: int = 0
) -> None:
    """Check that the image files of a sample of each source's rows exist.

    Args:
        data: What `load_data` returns for the sources.
        sources: The sources.
        max_missing: The largest share of missing images, 0..1.
        seed: Of the sample.

    Raises:
        FileNotFoundError: A larger share is missing. The message names the folder and the count.
    """
    for number, source in enumerate(sources):
        named, missing, folders = 0, [], set()
        for row in _sampled_rows(data, source, number, seed):
            for image in row["images"]:
                if image["bytes"] is None and row["folder"] is not None:
                    named += 1
                    folders.add(row["folder"])
                    if not _exists(image["path"], row["folder"]):
                        missing.append(image["path"])
        if len(missing) > max_missing * named:
            raise FileNotFoundError(
                f"{len(missing)} of {named} sampled images of {source.path!r} are not in the image folder "
                f"{', '.join(map(repr, sorted(folders)))}, for example {missing[0]!r}; allowed are {max_missing:.0%}. "
                "Correct image_folder or add the images. With bad_samples: skip, max_bad_samples sets the share."
            )


def _sampled_rows(data: Any, source: DataSource, number: int, seed: int) -> Iterator[Mapping[str, Any]]:
    remote = "://" in (source.image_folder or source.path)
    count = REMOTE_ROWS if remote else SAMPLED_ROWS
    if not hasattr(data, "__len__"):
        yield from islice(load_data([source], streaming=True), count)
        return
    positions = np.flatnonzero(data.with_format("numpy")["source"][:] == number).tolist()
    if len(positions) > count:
        positions = sorted(random.Random(seed).sample(positions, count))
    for position in positions:
        yield data[position]


def _exists(path: str, folder: str) -> bool:
    """Whether a file exists. A path out of the folder counts as existing: reading the sample names it."""
    try:
        full = resolve_image(path, folder)
    except RecordError:
        return True
    if "://" not in full:
        return Path(full).is_file()
    filesystem, inner = fsspec.core.url_to_fs(full)
    return filesystem.isfile(inner)
