"""What tells the data of two runs apart: the images of samples, and the items of matching benchmarks.

The images are recorded with each reply, not once per run: a damaged image that is replaced only concerns samples that
have no reply yet.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..image_loading import file_fingerprint
from .benchmarks.base import Sample
from .benchmarks.matching_base import MatchingItem

IMAGES = "image_fingerprint"
"""Key of the fingerprint in a record. Records of earlier versions lack it."""


def image_fingerprints(samples: Sequence[Sample] | Sequence[MatchingItem]) -> dict[str, str]:
    """Id -> hash of the images' names and, of images that are files, their sizes and first 64 KiB."""
    paths = {source for sample in samples for source in sample.images if isinstance(source, Path)}
    files = {path: _file(path) for path in paths}
    return {
        sample.id: _short_hash(
            [getattr(sample, "image_ids", ()), [files[s] for s in sample.images if isinstance(s, Path)]]
        )
        for sample in samples
    }


def check_images(records: Iterable[Mapping[str, Any]], images: Mapping[str, str], folder: Path) -> None:
    """Check that kept records belong to the images that are there now.

    Args:
        records: With ids.
        images: From `image_fingerprints`.
        folder: Folder of the run.

    Raises:
        ValueError: The images of a record have changed.
    """
    for record in records:
        now = images.get(record["id"])
        if record.get(IMAGES, now) != now:
            raise ValueError(
                f"{str(folder)!r} was written with other images of the sample {record['id']!r}. Choose another "
                "--output, or delete this folder."
            )


def items_fingerprint(items: Sequence[MatchingItem]) -> str:
    """A short hash of the ids and texts of matching items."""
    return _short_hash([(item.id, item.texts) for item in items])


def _file(path: Path) -> str | None:
    """The fingerprint of a file, None if it cannot be read: opening the image raises, with its name."""
    try:
        return file_fingerprint(path)
    except OSError:
        return None


def _short_hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
