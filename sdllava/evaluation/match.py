"""One matching run, from model name to results folder, as `sdllava match` runs it for each model and benchmark."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from .. import mini_path, register
from ..configuration import SDLlavaConfig
from ..fingerprints import weights_hash
from ..image_loading import ImageLike
from ..repositories import as_dtype, is_gated, missing, read_json, split_revision
from ..run_records import locked
from ..towers import is_diffusion_repository, load_tower
from ..version import installed_versions
from .benchmarks import get_matching_benchmark
from .benchmarks.base import locate, open_image
from .benchmarks.matching_base import MatchingBenchmark, MatchingItem
from .bootstrap import intervals
from .clip_matching import ClipMatcher, OpenClipMatcher
from .identity import IMAGES, check_images, image_fingerprints, items_fingerprint
from .matching import DEFAULT_MATCHING, DiffusionMatcher, MatchingOptions, published_timesteps
from .processes import default_device, gather_records, process_state
from .results import RunFolder
from .runner import Progress, command_line

PAPERS_ENSEMBLE = frozenset(published_timesteps(5))


class Matcher(Protocol):
    """A model that scores images against texts."""

    @property
    def model(self) -> nn.Module:
        """The module whose weights identify the model."""

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the scores, empty for models without them."""

    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> np.ndarray:
        """Scores of shape `(trials, timesteps or 1, texts, images)`."""


def load_matcher(
    name: str,
    options: MatchingOptions,
    revision: str | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> Matcher:
    """Load a model for image-text matching.

    Args:
        name: A published diffusion repository or folder, a model of this package whose tower is not truncated, "mini",
            a CLIP-style model of transformers, or `open_clip:...`.
        options: Of diffusion models.
        revision: Branch, tag or commit on the Hub.
        batch_size: Rows per pass of the denoiser.
        dtype: Of diffusion models: "float32", "bfloat16" or "float16".
        device: None uses this process's accelerator, or the CPU.

    Raises:
        OSError, ValueError: The model does not exist, or does not support matching.
    """
    if name.startswith("open_clip:"):
        return OpenClipMatcher(name, device)
    source = str(mini_path()) if name == "mini" else f"{name}@{revision}" if revision else name
    config = read_json(source, "config.json") or {}
    if config.get("model_type") != SDLlavaConfig.model_type and not is_diffusion_repository(source):
        where = split_revision(source)
        try:
            return ClipMatcher(where["pretrained_model_name_or_path"], where.get("revision"), device)
        except (OSError, ValueError) as error:
            if is_gated(error):
                raise missing(source, "model", error) from error
            raise OSError(
                f"{name!r} is neither a diffusers repository (no model_index.json), nor a model of this package, nor a "
                f"CLIP-style model of transformers ({str(error).splitlines()[0]}). Choose another --model."
            ) from error
    register()
    tower, processor = load_tower(source, as_dtype(dtype))
    tokenizers = [part for key, part in vars(processor).items() if key.startswith("diffusion_tokenizer")]
    return DiffusionMatcher(tower.to(device or default_device()), tokenizers, options, batch_size)


def match(
    matcher: Matcher,
    name: str,
    output: str | Path,
    model: dict[str, Any],
    options: MatchingOptions = DEFAULT_MATCHING,
    data: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    prefix: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a matching benchmark and write `samples.jsonl` and `results.json`.

    Resumes a stopped run. Under `accelerate launch` the processes share the items.

    Args:
        matcher: The model.
        name: Name of the benchmark.
        output: Folder of the run.
        model: The model's identity, recorded in the results with a hash of the matcher's weights.
        options: The matcher's options, recorded in the results.
        data: Local folder in the published layout, or a Hub data set id. None uses the published id.
        revision: Branch, tag or commit of the data on the Hub.
        limit: Approximate number of items, spread evenly. None uses all.
        prefix: Prepended to every text. None uses the benchmark's.
        progress: Called with the number of scored items and their total.

    Returns:
        `dict`: The contents of `results.json` (see `tabulate`), empty on other processes than the main one.

    Raises:
        FileNotFoundError, ValueError: Data is missing or invalid, or the folder contains another run or scores of
            other images.
    """
    benchmark = get_matching_benchmark(name)
    if data and (Path(data) / name).is_dir():
        data = str(Path(data) / name)
    folder, source = Path(), {"id": name, "revision": None}
    if benchmark.hub_id or data:
        folder, source = locate(data, benchmark.hub_id, revision, benchmark.files)
    items = benchmark.read(folder)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit} is too small. Use at least 1.")
    if limit is not None:
        items = items[:: max(1, -(-len(items) // limit))]
    layers = getattr(matcher, "layers", None)  # CLIP-style models have none
    settings = {
        "benchmark": name,
        "model": {**model, "weights": weights_hash(matcher.model)[:16]},
        "data": {**source, "fingerprint": items_fingerprint(items), "samples": len(items)},
        "prefix": benchmark.prefix if prefix is None else prefix,
        "matching": None if layers is None else {**asdict(options), "layers_read": layers},
    }
    with locked(output, process_state().process_index):
        records = _score_items(matcher, items, Path(output), settings, progress)
        if records is None:
            return {}
        results = {**settings, **tabulate(benchmark, items, records, matcher.timesteps)}
        results.update(versions=installed_versions(), command=command_line())
        RunFolder(output, settings).finish(records, results)
    return results


def _score_items(
    matcher: Matcher,
    items: Sequence[MatchingItem],
    path: Path,
    settings: dict[str, Any],
    progress: Progress | None,
) -> list[dict] | None:
    """A record with the scores of each item on the main process, None on the others."""
    state = process_state()
    with state.main_process_first():
        folder = RunFolder(path, settings, state.process_index)
    state.wait_for_everyone()
    done = {record["id"]: record for record in folder.finished()}
    fingerprints = image_fingerprints(items)
    check_images(done.values(), fingerprints, path)
    mine = items[state.process_index :: state.num_processes]
    for number, item in enumerate(mine, 1):
        if item.id not in done:
            images = [open_image(source, f"{item.id}, image {k}") for k, source in enumerate(item.images, 1)]
            scores = matcher.score(images, [settings["prefix"] + text for text in item.texts])
            done[item.id] = {"id": item.id, "texts": list(item.texts), **item.info, "scores": scores.tolist()}
            done[item.id][IMAGES] = fingerprints[item.id]
            folder.append([done[item.id]])
        if progress and state.is_main_process:
            progress(number, len(mine))
    return gather_records([done[item.id] for item in mine], {item.id: number for number, item in enumerate(items)})


def tabulate(
    benchmark: MatchingBenchmark, items: Sequence[MatchingItem], records: list[dict], timesteps: Sequence[int]
) -> dict[str, Any]:
    """Tabulate every timestep and the ensemble (the mean score over timesteps), with mean and spread over noise draws.

    `scores` are those of the ensemble. If the papers' five timesteps are a subset, as with ten, their ensemble has its
    own row. The spread is the sample standard deviation over draws (n - 1), as in the papers.

    Args:
        benchmark: The benchmark.
        items: Its items.
        records: Their scores. The verdicts of the ensemble, averaged over draws, are added to each record.
        timesteps: Timesteps of the scores.

    Returns:
        `dict`: Scores, spread, intervals, chance level and tables, as in `results.json`.
    """
    scores = np.array([record["scores"] for record in records])  # (items, trials, timesteps, texts, images)
    ensemble = scores.mean(axis=2)
    for record, by_trial in zip(records, ensemble, strict=True):
        verdicts = [benchmark.verdicts(matrix.tolist()) for matrix in by_trial]
        record["verdicts"] = {key: float(np.mean([v[key] for v in verdicts])) for key in verdicts[0]}
    tables = {f"t = {t}": scores[:, :, position] for position, t in enumerate(timesteps)}
    published = [position for position, t in enumerate(timesteps) if t in PAPERS_ENSEMBLE]
    if len(published) == len(PAPERS_ENSEMBLE) < len(timesteps):
        tables["the papers' ensemble"] = scores[:, :, published].mean(axis=2)
    total = _over_trials(benchmark, items, ensemble)
    return {
        "metric": benchmark.metric,
        "scores": total["mean"],
        "spread": total["spread"],
        "trials": scores.shape[1],
        "intervals_95": intervals(benchmark.units(records), benchmark.scores),
        "timesteps": {title: _over_trials(benchmark, items, part) for title, part in tables.items()},
        "own_pairs": _own_pairs(records, ensemble),
        "chance": benchmark.chance(),
        "samples": len(records),
    }


def _own_pairs(records: Sequence[dict], scores: np.ndarray) -> dict[str, Any] | None:
    """Percent of items whose two matching pairs together score higher than the two others. Chance: 50.

    The level of an image or a text cancels in this comparison, which no choice between images or texts makes.

    Args:
        records: With ids.
        scores: `(items, trials, texts, images)`.

    Returns:
        `dict`: Score and 95% interval, None for items that are not two texts with two images.
    """
    if scores.shape[2:] != (2, 2):
        return None
    own = np.trace(scores, axis1=2, axis2=3)
    right = (own > scores.sum(axis=(2, 3)) - own).mean(axis=1) * 100
    units = {record["id"]: {"own_pairs": float(value)} for record, value in zip(records, right, strict=True)}
    return {"score": float(right.mean()), "interval": intervals(units, dict)["own_pairs"]}


def _over_trials(
    benchmark: MatchingBenchmark, items: Sequence[MatchingItem], scores: np.ndarray
) -> dict[str, dict[str, float] | None]:
    """Mean and spread over the second axis of scores `(items, trials, texts, images)`."""
    runs = [benchmark.score(items, scores[:, trial].tolist()) for trial in range(scores.shape[1])]
    table = np.array([[run[key] for key in runs[0]] for run in runs])
    spread = table.std(axis=0, ddof=1).tolist() if len(runs) > 1 else None
    return {
        "mean": dict(zip(runs[0], table.mean(axis=0).tolist(), strict=True)),
        "spread": None if spread is None else dict(zip(runs[0], spread, strict=True)),
    }


def timestep_markdown(results: dict[str, Any]) -> str:
    """A Markdown table of each timestep and the ensemble, mean ± spread over noise draws, as in S3's Tables 6 and 7."""
    columns = list(results["scores"])
    rows = list(results["timesteps"].items())
    rows.append(("ensemble" if rows else "score", {"mean": results["scores"], "spread": results["spread"]}))
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for title, table in rows:
        cells = []
        for column in columns:
            spread = f" ± {table['spread'][column]:.2f}" if table["spread"] else ""
            cells.append(f"{table['mean'][column]:.2f}{spread}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if own := results["own_pairs"]:
        low, high = own["interval"]
        lines += [
            "",
            f"Both matching pairs together score higher than both others: {own['score']:.2f} [{low:.2f}, {high:.2f}] "
            "(chance 50; levels of images and texts cancel)",
        ]
    return "\n".join(lines) + "\n"
