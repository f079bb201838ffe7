"""The folder of a feature cache: its format, reading it, and writing its shards.

A cache is a folder with `record.json`, which describes what its tensors were computed from, and shards
`*.safetensors`, whose tensors are named `<key>.<tensor>`. The key is that of an image, or of an image and a question.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..atomic_files import is_unfinished, write_tensors
from ..data.images import local_size
from ..data.records import RecordError, image_identity
from ..run_records import begin_run, check_settings

RECORD = "record.json"
FILE_BYTES = "file_bytes"
"""The name of a shard's metadata with the size of each image file. Shards of earlier versions have none."""
SHARD_BYTES = 1 << 30
KINDS = ("latents", "vision", "conditional")
"""What a cache can hold: the VAE's latents; the features of the vision encoder and the unconditional features; both of
these and the conditional features."""
_EARLIER_KINDS = {"static": "vision"}


def cache_kind(name: str) -> str:
    """The kind of cache that a name means, also a name that earlier versions used.

    Raises:
        ValueError: The kind is unknown.
    """
    kind = _EARLIER_KINDS.get(name, name)
    if kind not in KINDS:
        raise ValueError(f"Unknown kind of cache {name!r}. Use one of {', '.join(map(repr, KINDS))}.")
    return kind


def image_key(image: Any, question: str | None = None) -> str:
    """The key of an image, or of an image and a question.

    Args:
        image: The image of a record: a path, bytes or a PIL image.
        question: The diffusion model's prompt.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(image_identity(image), digest_size=16)
    if question is not None:
        digest.update(b"\0" + question.encode())
    return digest.hexdigest()


class CacheEntry(NamedTuple):
    """The tensors of one key, and the size of its image file where there is one on this machine."""

    key: str
    tensors: dict[str, torch.Tensor]
    file_bytes: int | None = None


class FeatureCache:
    """A cache to read. Every process maps the tensors from disk by itself.

    Args:
        folder: The folder that `sdllava cache` wrote.

    Raises:
        FileNotFoundError: The folder holds no cache.
        ValueError: The cache's record is damaged, or its kind is unknown.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        record = self.folder / RECORD
        if not record.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} holds no feature cache ({RECORD} is missing). Write one with sdllava cache."
            )
        try:
            self.record: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(record)!r} is damaged ({error}). Write the cache to a new folder.") from error
        self.record["kind"] = cache_kind(self.record["kind"])
        self.shards: dict[str, str] = {}
        self.file_bytes: dict[str, int] = {}
        for path in sorted(path for path in self.folder.glob("*.safetensors") if not is_unfinished(path)):
            with safe_open(path, "pt") as shard:
                names = shard.keys()  # a `safe_open` is not iterable
                self.file_bytes.update(json.loads((shard.metadata() or {}).get(FILE_BYTES, "{}")))
            self.shards.update((name.partition(".")[0], path.name) for name in names)
        self.read_as: torch.dtype | None = None  # dtype of features; None keeps the saved dtype
        self._open: tuple[int, dict[str, Any]] = (0, {})

    @property
    def kind(self) -> str:
        """One of [`KINDS`]."""
        return self.record["kind"]

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, key: str) -> bool:
        return key in self.shards

    def check(self, wanted: dict[str, Any]) -> None:
        """Compare the cache's record with what a run needs.

        Args:
            wanted: The fields that must agree, from [`~sdllava.train.cache_writer.cache_record`].

        Raises:
            ValueError: A field differs. The message names each difference.
        """
        check_settings({name: value for name, value in self.record.items() if name in wanted}, wanted, self.folder)

    def require_same_file(self, key: str, image: Any, folder: str | None) -> None:
        """Check that an image file has the size of the file that a key was computed from, as far as both are known.

        Keys have the path of a file within its folder, which another data set may have, too.

        Raises:
            RecordError: The sizes differ.
        """
        cached = self.file_bytes.get(key)
        found = None if cached is None else local_size(image, folder)
        if found is not None and found != cached:
            name = image["path"] if isinstance(image, dict) else image
            raise RecordError(
                f"has the image {name!r} of {found} bytes in {folder!r}, but the features in {str(self.folder)!r} are "
                f"of a file of {cached} bytes. Write a cache of its own for this data"
            )

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one key, by name. Latents are float32, features of dtype `read_as`.

        Raises:
            ValueError: The cache does not hold the key.
        """
        if key not in self.shards:
            raise ValueError(
                f"The feature cache {str(self.folder)!r} does not hold {key!r}. Write it again from the run's data."
            )
        shard = self._shard(self.shards[key])
        tensors = {name: shard.get_tensor(f"{key}.{name}") for name in self.record["tensors"]}
        return {
            name: tensor.to(torch.float32 if name == "latents" else self.read_as) for name, tensor in tensors.items()
        }

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros with the shapes of one key's tensors, for a sample that is skipped."""
        key = next(iter(self.shards))
        return {name: torch.zeros_like(tensor) for name, tensor in self.read(key).items()}

    def _shard(self, name: str) -> Any:
        if self._open[0] != os.getpid():  # an open shard does not survive a fork
            self._open = (os.getpid(), {})
        opened = self._open[1]
        if name not in opened:
            opened[name] = safe_open(self.folder / name, "pt").__enter__()
        return opened[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (0, {})}


def begin_cache(folder: Path, record: dict[str, Any], model: str) -> FeatureCache:
    """Begin a cache, or resume one that was interrupted, also with a copy of its model at another place.

    Args:
        folder: The cache's folder, created where it is missing.
        record: What the tensors are computed from, as JSON values.
        model: The name of the model for a new record. It is not compared; the fingerprints of its weights are.

    Raises:
        ValueError: The folder holds a cache with another record. The message names each difference.
    """
    if not (folder / RECORD).exists():
        begin_run(folder / RECORD, record | {"model": model})
    cache = FeatureCache(folder)
    cache.check(record)
    return cache


def write_shards(
    folder: Path,
    batches: Iterable[Sequence[CacheEntry]],
    process: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write batches of entries as shards. Each shard appears whole or not at all.

    Args:
        folder: The cache's folder.
        batches: What to write, each key once. A shard ends with a batch.
        process: The number of the writing process. It is part of the shards' names, so that they do not collide.
        shard_bytes: Size at which a shard is written.

    Returns:
        `int`: The number of keys written.
    """
    held: list[CacheEntry] = []
    size = count = 0
    for batch in batches:
        held += batch
        count += len(batch)
        size += sum(tensor.numel() * tensor.element_size() for entry in batch for tensor in entry.tensors.values())
        if size >= shard_bytes:
            _write_shard(folder, held, process)
            held, size = [], 0
    if held:
        _write_shard(folder, held, process)
    return count


def _write_shard(folder: Path, entries: list[CacheEntry], process: int) -> None:
    tensors = {f"{key}.{name}": tensor.contiguous() for key, found, _ in entries for name, tensor in found.items()}
    sizes = {entry.key: entry.file_bytes for entry in entries if entry.file_bytes is not None}
    name = f"{process:04}-{hashlib.blake2b(min(tensors).encode(), digest_size=6).hexdigest()}.safetensors"
    write_tensors(folder / name, tensors, {FILE_BYTES: json.dumps(sizes)})
