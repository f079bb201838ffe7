"""Frozen and costly results kept on disk: the folder's form, reading it, and writing it.

A cache is a folder with `record.json`, which says what made it, and shards `*.safetensors`, whose tensors are named
`<key>.<tensor>`; the key is that of an image, or of an image and a question.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..data.records import image_identity

RECORD = "record.json"
SHARD_BYTES = 1 << 30


def image_key(image: Any, question: str | None = None) -> str:
    """The key of an image as the data names it, or of an image with a question: 32 hexadecimal digits."""
    digest = hashlib.blake2b(image_identity(image), digest_size=16)
    if question is not None:
        digest.update(b"\0" + question.encode())
    return digest.hexdigest()


def differences(found: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """What differs between two records, in words."""
    for field in sorted(found.keys() | wanted.keys()):
        a, b = found.get(field), wanted.get(field)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{field}.")
        elif a != b:
            yield f"its {prefix}{field} is {a!r}, the run's is {b!r}"


class FeatureCache:
    """A cache to read. Tensors are mapped from disk, by whichever process asks.

    Args:
        folder: what `sdllava cache` wrote.

    Raises:
        FileNotFoundError: the folder holds no cache.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / RECORD).is_file():
            raise FileNotFoundError(
                f"{folder} holds no feature cache ({RECORD} is missing): write one with sdllava cache"
            )
        self.record: dict[str, Any] = json.loads((self.folder / RECORD).read_text(encoding="utf-8"))
        self.shards: dict[str, str] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, "pt") as shard:
                self.shards.update((name.partition(".")[0], path.name) for name in shard)
        self.read_as: torch.dtype | None = None  # of features; None leaves them as they are kept
        self._open: tuple[int, dict[str, Any]] = (0, {})

    @property
    def kind(self) -> str:
        """ "latents", "static" or "conditional"; see `write_cache`."""
        return self.record["kind"]

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, key: str) -> bool:
        return key in self.shards

    def check(self, wanted: dict[str, Any]) -> None:
        """Raise ValueError, naming what differs, unless the cache was made by what `wanted` describes."""
        found = {field: value for field, value in self.record.items() if field in wanted}
        different = list(differences(found, wanted))
        if different:
            raise ValueError(f"the feature cache {self.folder} does not fit this run: {'; '.join(different)}")

    def read(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of one key, by name.

        Raises:
            ValueError: the cache does not hold it.
        """
        if key not in self.shards:
            raise ValueError(f"the feature cache {self.folder} does not hold {key}: was it written from the same data?")
        shard = self._shard(self.shards[key])
        tensors = {name: shard.get_tensor(f"{key}.{name}") for name in self.record["tensors"]}
        return {
            name: tensor.to(torch.float32 if name == "latents" else self.read_as) for name, tensor in tensors.items()
        }

    def blank(self) -> dict[str, torch.Tensor]:
        """Zeros in the form of one key's tensors, for a sample that is left out."""
        key = next(iter(self.shards))
        return {name: torch.zeros_like(tensor) for name, tensor in self.read(key).items()}

    def _shard(self, name: str):
        if self._open[0] != os.getpid():  # an open shard does not survive a fork
            self._open = (os.getpid(), {})
        opened = self._open[1]
        if name not in opened:
            opened[name] = safe_open(self.folder / name, "pt").__enter__()
        return opened[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (0, {})}


def begin_cache(folder: Path, record: dict[str, Any]) -> FeatureCache:
    """Begin a cache, or go on with one that was interrupted.

    Raises:
        ValueError: the folder holds a cache that something else made; the difference is named.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / RECORD).exists():
        aside = folder / f"{RECORD}.{os.getpid()}.unfinished"
        aside.write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")
        os.replace(aside, folder / RECORD)
    cache = FeatureCache(folder)
    cache.check(record)
    return cache


def write_shards(
    folder: Path, items: Iterable[tuple[str, dict[str, torch.Tensor]]], process: int = 0, shard_bytes: int = SHARD_BYTES
) -> int:
    """Write (key, tensors) pairs as shards, each aside and then renamed.

    Args:
        items: what to write, in any order, no key twice.
        process: number of the writing process; its shards bear it, so that processes never meet.
        shard_bytes: a shard is closed when it holds this much.

    Returns:
        The number of keys written.
    """
    held: dict[str, torch.Tensor] = {}
    size = count = 0
    for key, tensors in items:
        for name, tensor in tensors.items():
            held[f"{key}.{name}"] = tensor.contiguous()
            size += tensor.numel() * tensor.element_size()
        count += 1
        if size >= shard_bytes:
            _write_shard(folder, held, process)
            held, size = {}, 0
    if held:
        _write_shard(folder, held, process)
    return count


def _write_shard(folder: Path, tensors: dict[str, torch.Tensor], process: int) -> None:
    name = f"{process:04}-{hashlib.blake2b(min(tensors).encode(), digest_size=6).hexdigest()}.safetensors"
    aside = folder / f"{name}.unfinished"
    save_file(tensors, aside)
    with open(aside, "rb") as stream:
        os.fsync(stream.fileno())
    os.replace(aside, folder / name)
