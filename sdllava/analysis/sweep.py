"""Taps x timesteps x guidance scales over many images: computed as asked for, or written to disk once and read again.

A sweep is a folder: `sweep.json` says what it holds, and each image has one safetensors file with a tensor of shape
`(height, width, channels)` for every place, named `tap|timestep|scale`.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .images import AskedImage, RecordSet
from .loading import Subject
from .reading import FeatureMap, choose_taps, read_features
from .similarity import MinibatchCKA, pair_similarity

Key = tuple[str, int, float]


@dataclass
class Places:
    """Where features are read, and how: see [`~sdllava.analysis.reading.read_features`]."""

    taps: list[str]
    timesteps: list[int]
    guidance_scales: list[float]

    @property
    def keys(self) -> list[Key]:
        return [(tap, t, s) for t in self.timesteps for tap in self.taps for s in self.guidance_scales]


def choose_places(
    subject: Subject,
    asked: bool,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> Places:
    """The given places with the tower's defaults; without a question the only scale is 0."""
    config = subject.tower.config
    scales = guidance_scales or (config.guidance_scales if asked else [0.0])
    names = [tap.name for tap in choose_taps(subject.tower, taps)]
    return Places(names, list(timesteps or config.timesteps), [float(s) for s in scales])


def _read(subject: Subject, images: Sequence[AskedImage], places: Places) -> Iterator[FeatureMap]:
    questions = [image.question for image in images]
    asked = any(question is not None for question in questions)
    prompts = subject.prompts([question or "" for question in questions]) if asked else None
    latents = subject.latents([image.image for image in images])
    return read_features(subject.tower, latents, prompts, places.taps, places.timesteps, places.guidance_scales)


class LiveFeatures:
    """Features of images, computed when a batch is asked for."""

    def __init__(self, subject: Subject, images: Sequence[AskedImage], places: Places):
        self.subject, self.images, self.places = subject, images, places

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int]) -> Iterator[FeatureMap]:
        """The feature maps of some images, place by place."""
        return _read(self.subject, [self.images[i] for i in rows], self.places)


class Sweep:
    """Features of images that [`write_sweep`] wrote."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / "sweep.json"
        if not path.is_file():
            raise FileNotFoundError(f"{str(folder)!r} holds no sweep: there is no sweep.json")
        self.manifest = json.loads(path.read_text(encoding="utf-8"))
        self.places = Places(**{name: self.manifest[name] for name in ("taps", "timesteps", "guidance_scales")})
        missing = [i for i in range(len(self)) if not image_path(self.folder, i).exists()]
        if missing:
            raise ValueError(
                f"the sweep {str(folder)!r} lacks {len(missing)} of {len(self)} images: run the same command again"
            )

    def __len__(self) -> int:
        return self.manifest["num_images"]

    def batch(self, rows: Sequence[int]) -> Iterator[FeatureMap]:
        """The feature maps of some images, place by place."""
        for key in self.places.keys:
            values = []
            for row in rows:
                with safe_open(image_path(self.folder, row), framework="pt") as file:
                    values.append(file.get_tensor(tensor_name(key)))
            yield FeatureMap(*key, torch.stack(values))


def gather(source: "LiveFeatures | Sweep", batch_size: int = 8) -> list[FeatureMap]:
    """The feature maps of all images, computed or read `batch_size` images at a time, on the CPU."""
    found: dict[Key, list[torch.Tensor]] = {key: [] for key in source.places.keys}
    for start in range(0, len(source), batch_size):
        for feature in source.batch(range(start, min(start + batch_size, len(source)))):
            found[feature.key].append(feature.values.cpu())
    return [FeatureMap(*key, torch.cat(parts)) for key, parts in found.items()]


def tensor_name(key: Key) -> str:
    """How a sweep's files name a place."""
    return f"{key[0]}|{key[1]}|{key[2]:g}"


def image_path(folder: Path, index: int) -> Path:
    """Where a sweep keeps an image's features."""
    return folder / f"{index:06d}.safetensors"


def write_sweep(
    subject: Subject,
    images: Sequence[AskedImage],
    places: Places,
    folder: str | os.PathLike,
    batch_size: int = 8,
    process: int = 0,
    num_processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write features of every image at every place; all taps of a timestep come from one forward.

    Features are kept in the type the tower computes. Images that are already there are skipped, so an interrupted
    sweep goes on where it stopped, and several processes share one folder.

    Args:
        batch_size: images at once.
        process, num_processes: this process takes every `num_processes`-th image from number `process` on.
        progress: called with the number of images done and to do by this process.

    Returns:
        `int`: number of images written.

    Raises:
        ValueError: the folder holds a sweep of something else.
    """
    if not 0 <= process < num_processes:
        raise ValueError(f"process {process} of {num_processes} does not exist: count from 0")
    target = Path(folder)
    _begin(target, _manifest(subject, images, places))
    todo = [i for i in range(process, len(images), num_processes) if not image_path(target, i).exists()]
    for start in range(0, len(todo), batch_size):
        rows = todo[start : start + batch_size]
        _write_batch(subject, [images[i] for i in rows], places, [image_path(target, i) for i in rows])
        if progress is not None:
            progress(start + len(rows), len(todo))
    return len(todo)


def _write_batch(subject: Subject, images: Sequence[AskedImage], places: Places, paths: Sequence[Path]) -> None:
    found: list[dict[str, torch.Tensor]] = [{} for _ in images]
    for feature in _read(subject, images, places):
        for tensors, values in zip(found, feature.values.cpu()):
            tensors[tensor_name(feature.key)] = values.contiguous()
    for image, tensors, path in zip(images, found, paths):
        aside = path.with_suffix(f".{os.getpid()}.tmp")
        save_file(tensors, aside, metadata={"name": image.name, "question": image.question or ""})
        os.replace(aside, path)


def _manifest(subject: Subject, images: Sequence[AskedImage], places: Places) -> dict[str, Any]:
    tower = subject.tower
    digest = hashlib.sha256()
    for parameter in tower.unet.parameters():
        digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return {
        "model": subject.name,
        "weights": digest.hexdigest()[:16],
        "noise_seed": tower.config.noise_seed,
        "image_size": tower.config.image_size,
        "dtype": str(tower.dtype).removeprefix("torch."),
        "num_images": len(images),
        "source": _source(images),
        "taps": places.taps,
        "timesteps": places.timesteps,
        "guidance_scales": places.guidance_scales,
    }


def _source(images: Sequence[AskedImage]) -> str:
    """Names the images without opening them all, and what is asked: files by their names, a dataset by its print."""
    paths, rows = getattr(images, "paths", None), getattr(images, "rows", None)
    named = [str(path.name) for path in paths] if paths is not None else getattr(rows, "_fingerprint", "")
    asked = images.options.source if isinstance(images, RecordSet) else getattr(images, "question", None)
    return hashlib.sha256(repr([named, asked]).encode()).hexdigest()[:16]


def _begin(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "sweep.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        for name, value in manifest.items():
            if known.get(name) != value:
                raise ValueError(
                    f"{str(folder)!r} holds a sweep with another {name} ({known.get(name)} instead of {value}): "
                    "choose another folder"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"sweep.json.{os.getpid()}"
    aside.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    os.replace(aside, path)


@dataclass
class SimilarityGrid:
    """Mean cosine similarity of paired images, by place (S3, Figure 2c).

    Args:
        taps, timesteps, guidance_scales: the axes.
        positions, pooled (`np.ndarray` of shape `(taps, timesteps, scales)`, float64): see
            [`~sdllava.analysis.similarity.PairSimilarity`], averaged over pairs.
        num_pairs (`int`)
    """

    taps: list[str]
    timesteps: list[int]
    guidance_scales: list[float]
    positions: np.ndarray
    pooled: np.ndarray
    num_pairs: int


def similarity_grid(source: LiveFeatures | Sweep, batch_size: int = 8) -> SimilarityGrid:
    """Compare images 0 and 1, 2 and 3, and so on, at every place of `source`.

    Args:
        batch_size: images at once, rounded down to whole pairs.
    """
    if len(source) < 2 or len(source) % 2:
        raise ValueError(f"pairs need an even number of images, in the order first, second; there are {len(source)}")
    places = source.places
    shape = (len(places.taps), len(places.timesteps), len(places.guidance_scales))
    positions, pooled = np.zeros(shape), np.zeros(shape)
    step = max(2, batch_size // 2 * 2)
    for start in range(0, len(source), step):
        for feature in source.batch(range(start, min(start + step, len(source)))):
            at = (
                places.taps.index(feature.tap),
                places.timesteps.index(feature.timestep),
                places.guidance_scales.index(feature.guidance_scale),
            )
            found = pair_similarity(feature.values[0::2], feature.values[1::2])
            positions[at] += found.positions.sum()
            pooled[at] += found.pooled.sum()
    pairs = len(source) // 2
    return SimilarityGrid(
        places.taps, places.timesteps, places.guidance_scales, positions / pairs, pooled / pairs, pairs
    )


@dataclass
class CKAResult:
    """Linear CKA between places (S3, Figures 5c and 9).

    Args:
        keys: `(tap, timestep, guidance scale)` of each row and column.
        matrix (`np.ndarray` of shape `(keys, keys)`, float64)
        num_images (`int`)
    """

    keys: list[Key]
    matrix: np.ndarray
    num_images: int

    def between_taps(self, timestep: int, guidance_scale: float) -> tuple[list[str], np.ndarray]:
        """The taps at one timestep and scale, and their matrix (Figure 9)."""
        rows = [i for i, key in enumerate(self.keys) if key[1:] == (timestep, guidance_scale)]
        return [self.keys[i][0] for i in rows], self.matrix[np.ix_(rows, rows)]

    def with_unconditional(self, tap: str, timestep: int) -> tuple[list[float], np.ndarray]:
        """The scales of one tap, and their similarity with scale 0 (Figure 5c)."""
        rows = [i for i, key in enumerate(self.keys) if key[:2] == (tap, timestep)]
        return [self.keys[i][2] for i in rows], self.matrix[self.keys.index((tap, timestep, 0.0)), rows]


def cka(source: LiveFeatures | Sweep, batch_size: int = 16) -> CKAResult:
    """Linear CKA between every two places of `source`, over all of its images.

    Args:
        batch_size: images at once; batches are made as even as possible, with at least 4 images.
    """
    count = len(source)
    if count < 4:
        raise ValueError(f"the unbiased estimate needs at least 4 images, not {count}")
    keys = source.places.keys
    meter = MinibatchCKA([tensor_name(key) for key in keys])
    num_batches = min(math.ceil(count / batch_size), count // 4)
    for rows in np.array_split(np.arange(count), num_batches):
        features = source.batch(rows.tolist())
        meter.update((tensor_name(feature.key), feature.values) for feature in features)
    return CKAResult(keys, meter.matrix(), count)
