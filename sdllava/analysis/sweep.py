"""Sweeps: features at taps x timesteps x guidance scales over many images, computed on access or read from disk.

A sweep on disk is a folder. `sweep.json` records its settings, and each image has one safetensors file with a tensor of
shape `(height, width, channels)` per tap, timestep and scale, named `tap|timestep|scale`.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..atomic_files import write_tensors
from ..fingerprints import weights_hash
from ..run_records import begin_run, locked, read_run
from .images import DatasetImages, ImageFiles, PromptedImage
from .loading import AnalysisModel
from .reading import FeatureKey, FeatureMap, choose_taps, read_features


@dataclass
class FeatureSelection:
    """The taps, timesteps and guidance scales to read; see [`~sdllava.analysis.reading.read_features`].

    Args:
        taps (`list[str]`): Tap names.
        timesteps (`list[int]`): Noise levels in 0..999.
        guidance_scales (`list[float]`): Guidance scales.

    Raises:
        ValueError: A tap, timestep or scale is repeated.
    """

    taps: list[str]
    timesteps: list[int]
    guidance_scales: list[float]

    def __post_init__(self) -> None:
        for option, values in (
            ("--taps", self.taps),
            ("--timesteps", self.timesteps),
            ("--guidance-scales", self.guidance_scales),
        ):
            for position, value in enumerate(values):
                if value in values[:position]:
                    raise ValueError(f"{option} has {value!r} more than once. Give each value once.")

    @property
    def keys(self) -> list[FeatureKey]:
        """Tap, timestep and scale of every feature map, ordered by timestep, then tap, then scale."""
        return [(tap, t, s) for t in self.timesteps for tap in self.taps for s in self.guidance_scales]


def select_features(
    model: AnalysisModel,
    has_questions: bool,
    taps: Sequence[str] | None = None,
    timesteps: Sequence[int] | None = None,
    guidance_scales: Sequence[float] | None = None,
) -> FeatureSelection:
    """Complete a selection with the tower's configuration.

    Args:
        model: The model to read.
        has_questions: Whether the images have questions. Without them the default scale is 0.
        taps: Tap names. Default: the configured ones.
        timesteps: Default: the configured ones.
        guidance_scales: Default: the configured ones.

    Raises:
        ValueError: A tap does not exist, or was truncated, or a value is repeated.
    """
    config = model.tower.config
    scales = guidance_scales or (config.guidance_scales if has_questions else None) or [0.0]
    names = [tap.name for tap in choose_taps(model.tower, taps)]
    return FeatureSelection(names, list(timesteps or config.timesteps or []), [float(scale) for scale in scales])


class ComputedFeatures:
    """Features of images, computed on access.

    Args:
        model: The model to read.
        images: Images with their questions.
        selection: The features to read.
    """

    def __init__(self, model: AnalysisModel, images: Sequence[PromptedImage], selection: FeatureSelection):
        self.model, self.images, self.selection = model, images, selection

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Sequence[int]) -> Iterator[FeatureMap]:
        """The feature maps of some images, one tap, timestep and scale at a time."""
        return _read(self.model, [self.images[row] for row in rows], self.selection)


def _read(model: AnalysisModel, images: Sequence[PromptedImage], selection: FeatureSelection) -> Iterator[FeatureMap]:
    questions = [image.question for image in images]
    has_questions = any(question is not None for question in questions)
    prompts = model.prompts([question or "" for question in questions]) if has_questions else None
    latents = model.latents([image.image for image in images])
    return read_features(model.tower, latents, prompts, selection.taps, selection.timesteps, selection.guidance_scales)


class Sweep:
    """Features of images that [`write_sweep`] wrote.

    Args:
        folder: The folder of the sweep.

    Raises:
        FileNotFoundError: The folder does not hold a sweep.
        ValueError: The sweep is damaged or incomplete.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / "sweep.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} does not hold a sweep: it has no sweep.json. Write one with `sdllava inspect sweep`."
            )
        try:
            self.settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            names = ("taps", "timesteps", "guidance_scales")
            self.selection = FeatureSelection(**{name: self.settings[name] for name in names})
            self.num_images = int(self.settings["num_images"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({error!r}). Delete the folder and write it again.") from error
        missing = sum(not image_path(self.folder, i).exists() for i in range(self.num_images))
        if missing:
            raise ValueError(
                f"The sweep {str(folder)!r} lacks {missing} of {self.num_images} images. Run the same command again to "
                "complete it."
            )

    def __len__(self) -> int:
        return self.num_images

    def batch(self, rows: Sequence[int]) -> Iterator[FeatureMap]:
        """The feature maps of some images, one tap, timestep and scale at a time."""
        for key in self.selection.keys:
            values = []
            for row in rows:
                with safe_open(image_path(self.folder, row), framework="pt") as file:
                    values.append(file.get_tensor(tensor_name(key)))
            yield FeatureMap(*key, torch.stack(values))


def gather(source: ComputedFeatures | Sweep, batch_size: int = 8) -> list[FeatureMap]:
    """The feature maps of all images, on the CPU, computed or read `batch_size` images at a time."""
    found: dict[FeatureKey, list[torch.Tensor]] = {key: [] for key in source.selection.keys}
    for start in range(0, len(source), batch_size):
        for feature in source.batch(range(start, min(start + batch_size, len(source)))):
            found[feature.key].append(feature.values.cpu())
    return [FeatureMap(*key, torch.cat(parts)) for key, parts in found.items()]


def tensor_name(key: FeatureKey) -> str:
    """The name of a tensor in a sweep's files, for example `U-L1-R1-B0-Cross-Q|50|4`."""
    return f"{key[0]}|{key[1]}|{key[2]:g}"


def image_path(folder: Path, index: int) -> Path:
    """The file of an image's features in a sweep's folder."""
    return folder / f"{index:06d}.safetensors"


def write_sweep(
    model: AnalysisModel,
    images: ImageFiles | DatasetImages,
    selection: FeatureSelection,
    folder: str | os.PathLike,
    batch_size: int = 8,
    process: int = 0,
    num_processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write the features of every image. One pass per timestep gives all taps.

    Features keep the dtype in which the tower computes them. An interrupted sweep resumes, and several processes can
    share one folder. Batches are the same in every run: images `0..batch_size - 1`, and so on. Results of a batch
    differ from those of another batch size by rounding errors, so a batch with a missing file is computed as a whole.
    On a CPU, results also depend on the number of threads, so the first run's is recorded and used by all others. The
    files of an interrupted sweep therefore equal those of an uninterrupted one, byte by byte, on machines with the same
    processor, or GPU, and the same version of torch.

    Args:
        model: The model to read.
        images: From [`~sdllava.analysis.images.open_images`].
        selection: The features to read.
        folder: The folder to write, or to resume.
        batch_size: Images per batch.
        process: This process's index; it computes every `num_processes`-th batch.
        num_processes: Number of processes that share the folder.
        progress: Called after each batch with the number of images written, and the number to write, by this process.

    Returns:
        `int`: Number of images written.

    Raises:
        BlockingIOError: Another process with the same index writes this sweep.
        OSError: The folder cannot be written.
        ValueError: The folder holds a sweep with other settings, or `process` is out of range.
    """
    if not 0 <= process < num_processes:
        raise ValueError(
            f"Process {process} of {num_processes} does not exist. Use an index in 0..{num_processes - 1}."
        )
    target = Path(folder)
    with locked(target, process), _threads_of(target / "sweep.json"):
        begin_run(target / "sweep.json", _settings(model, images, selection, batch_size))
        return _write_missing(model, images, selection, target, batch_size, process, num_processes, progress)


@contextmanager
def _threads_of(record: Path) -> Iterator[None]:
    """Compute with the number of threads that a sweep records, if there is one."""
    threads = torch.get_num_threads()
    torch.set_num_threads((read_run(record) or {}).get("threads", threads))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_missing(
    model: AnalysisModel,
    images: ImageFiles | DatasetImages,
    selection: FeatureSelection,
    target: Path,
    batch_size: int,
    process: int,
    num_processes: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Compute this process's batches with a missing file. Returns the number of images written."""
    starts = range(process * batch_size, len(images), num_processes * batch_size)
    batches = [range(start, min(start + batch_size, len(images))) for start in starts]
    missing = [[row for row in rows if not image_path(target, row).exists()] for rows in batches]
    written, total = 0, sum(len(rows) for rows in missing)
    for rows, wanted in zip(batches, missing, strict=True):
        if wanted:
            _write_batch(model, {row: images[row] for row in rows}, selection, wanted, target)
            written += len(wanted)
            if progress is not None:
                progress(written, total)
    return total


def _write_batch(
    model: AnalysisModel,
    images: dict[int, PromptedImage],
    selection: FeatureSelection,
    wanted: Sequence[int],
    folder: Path,
) -> None:
    """Compute a whole batch, and write those of its images that are wanted, by their index."""
    tensors: dict[int, dict[str, torch.Tensor]] = {index: {} for index in images}
    for feature in _read(model, list(images.values()), selection):
        for index, values in zip(images, feature.values.cpu(), strict=True):
            tensors[index][tensor_name(feature.key)] = values.contiguous()
    for index in wanted:
        # one entry: safetensors writes several in random order, so equal files would differ in their bytes
        entry = {"name": images[index].name, "question": images[index].question}
        write_tensors(image_path(folder, index), tensors[index], {"image": json.dumps(entry)})


def _settings(
    model: AnalysisModel, images: ImageFiles | DatasetImages, selection: FeatureSelection, batch_size: int
) -> dict[str, Any]:
    tower = model.tower
    return {
        "model": model.name,
        "weights": weights_hash(tower.backbone),
        "noise_seed": tower.config.noise_seed,
        "image_size": tower.config.image_size,
        "dtype": str(tower.dtype).removeprefix("torch."),
        "num_images": len(images),
        "source": images.fingerprint(),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "taps": selection.taps,
        "timesteps": selection.timesteps,
        "guidance_scales": selection.guidance_scales,
    }
