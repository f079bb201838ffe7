"""One matching run from model name to results folder: what `sdllava match` does for each model and benchmark."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .benchmarks import get_matching_benchmark
from .benchmarks.base import locate, open_image
from .benchmarks.matching_base import MatchingBenchmark, MatchingItem
from .bootstrap import intervals
from .matching import DiffusionMatcher, MatchingOptions, published_timesteps
from .results import RunFolder
from .runner import command_line, versions

PAPERS_ENSEMBLE = frozenset(published_timesteps(5))


class Matcher(Protocol):
    """What scores images against texts; without timesteps, a model that has none."""

    @property
    def timesteps(self) -> tuple[int, ...]: ...

    def score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Scores of shape (trials, timesteps or 1, texts, images)."""


def load_matcher(
    name: str,
    options: MatchingOptions,
    revision: str | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device=None,
) -> Matcher:
    """A published diffusion repository or folder, a CLIP-style model of transformers, or `open_clip:...`.

    Raises:
        OSError, ValueError: there is no such model, or it cannot match.
    """
    import torch
    from transformers.utils import cached_file

    from .clip_matching import ClipMatcher, OpenClipMatcher
    from .processes import default_device

    if name.startswith("open_clip:"):
        return OpenClipMatcher(name, device)
    where, _, pinned = (name, "", "") if Path(name).exists() else name.partition("@")
    options_ = {"_raise_exceptions_for_missing_entries": False, "revision": revision or pinned or None}
    if cached_file(where, "model_index.json", **options_) is None:
        try:
            return ClipMatcher(where, revision or pinned or None, device)
        except (OSError, ValueError) as error:
            raise OSError(
                f"{name!r} can match neither as a diffusers repository (no model_index.json) nor as a CLIP-style model "
                f"of transformers: {str(error).splitlines()[0]}"
            ) from error
    from sdllava import SDLlavaDiffusionModel

    from ..diffusion_loading import load_diffusion_tokenizers

    source = f"{where}@{revision or pinned}" if revision or pinned else where
    tower = SDLlavaDiffusionModel.from_component_pretrained(
        source, truncate=False, dtype=getattr(torch, dtype), **_tower_fields(source)
    )
    tokenizers = load_diffusion_tokenizers(source, tower.config.text_encoder_2_config is not None)
    return DiffusionMatcher(tower.to(device or default_device()), tokenizers, options, batch_size)


def _tower_fields(source: str) -> dict[str, Any]:
    """The image size that the UNet was published for (512 for SD 2.1-base), and a tap that it has."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from ..repositories import split_revision
    from ..taps import list_taps

    unet = UNet2DConditionModel.load_config(subfolder="unet", **split_revision(source))
    vae = AutoencoderKL.load_config(subfolder="vae", **split_revision(source))
    taps = [tap.name for tap in list_taps(unet) if tap.name.endswith("Cross-Q")]
    return {"image_size": unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1), "taps": taps[-1:]}


def match(
    matcher: Matcher,
    name: str,
    output: str | Path,
    model: dict[str, Any],
    options: MatchingOptions = MatchingOptions(),  # noqa: B008
    data: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    prefix: str | None = None,
    progress=None,
) -> dict[str, Any]:
    """Scores a matching benchmark and writes `samples.jsonl` and `results.json` into `output`; see `tabulate`.

    A run that was stopped goes on where it stopped; `accelerate launch` shares the items out.
    """
    benchmark = get_matching_benchmark(name)
    if data and (Path(data) / name).is_dir():
        data = str(Path(data) / name)
    folder, source = (None, {"id": name, "revision": None})
    if benchmark.hub_id:
        folder, source = locate(data, benchmark.hub_id, revision, benchmark.files)
    items = benchmark.read(folder)
    if limit is not None and limit < 1:
        raise ValueError(f"--limit is a number of items, at least 1, not {limit}.")
    if limit is not None:
        items = items[:: max(1, -(-len(items) // limit))]
    settings = {
        "benchmark": name,
        "model": model,
        "data": {**source, "samples": len(items)},
        "prefix": benchmark.prefix if prefix is None else prefix,
        "matching": {**asdict(options), "layers_read": getattr(matcher, "layers", None)} if matcher.timesteps else None,
    }
    records = _score_items(matcher, items, Path(output), settings, progress)
    if records is None:
        return {}
    results = {**settings, **tabulate(benchmark, items, records, matcher.timesteps)}
    results.update(versions=versions(), command=command_line())
    RunFolder(output, settings).finish(records, results)
    return results


def _score_items(matcher, items, path: Path, settings, progress) -> list[dict] | None:
    """A record with the scores of each item, on the main process; None on the others."""
    from accelerate.utils import gather_object

    from .processes import process_state

    state = process_state()
    with state.main_process_first():
        folder = RunFolder(path, settings, state.process_index)
    state.wait_for_everyone()
    done = {record["id"]: record for record in folder.finished()}
    mine = items[state.process_index :: state.num_processes]
    for number, item in enumerate(mine, 1):
        if item.id not in done:
            images = [open_image(source, f"{item.id}, image {k}") for k, source in enumerate(item.images, 1)]
            scores = matcher.score(images, [settings["prefix"] + text for text in item.texts])
            done[item.id] = {"id": item.id, "texts": list(item.texts), **item.info, "scores": scores.tolist()}
            folder.append([done[item.id]])
        if progress and state.is_main_process:
            progress(number, len(mine))
    records = [done[item.id] for item in mine]
    if state.num_processes > 1:
        records = gather_object(records)
        if not state.is_main_process:
            return None
    order = {item.id: number for number, item in enumerate(items)}
    return sorted(records, key=lambda record: order[record["id"]])


def tabulate(
    benchmark: MatchingBenchmark, items: Sequence[MatchingItem], records: list[dict], timesteps: Sequence[int]
) -> dict[str, Any]:
    """Every single timestep and the ensemble (the mean score over timesteps), mean and spread over the noise draws.

    Where the papers' five timesteps are among more, as with ten, their ensemble has a row of its own. `scores` are the
    ensemble's; the spread is the sample standard deviation over draws (n - 1), as the papers' +-. The records get the
    verdicts of the ensemble, averaged over draws.
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
        "chance": benchmark.chance(),
        "samples": len(records),
    }


def _over_trials(benchmark, items, scores: np.ndarray) -> dict[str, dict[str, float] | None]:
    """Mean and spread over the second axis of scores (items, trials, texts, images)."""
    runs = [benchmark.score(items, scores[:, trial].tolist()) for trial in range(scores.shape[1])]
    table = np.array([[run[key] for key in runs[0]] for run in runs])
    spread = table.std(axis=0, ddof=1).tolist() if len(runs) > 1 else None
    return {
        "mean": dict(zip(runs[0], table.mean(axis=0).tolist(), strict=True)),
        "spread": None if spread is None else dict(zip(runs[0], spread, strict=True)),
    }


def timestep_markdown(results: dict[str, Any]) -> str:
    """A row per timestep and the ensemble, mean ± spread over the noise draws, as S3's Tables 6 and 7 have it."""
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
    return "\n".join(lines) + "\n"
