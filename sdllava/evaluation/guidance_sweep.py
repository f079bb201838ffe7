"""One benchmark at several guidance scales, each as a run of its own, for one table with intervals."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .evaluate import EvaluationOptions, LoadedModel, evaluate
from .judge import Judge
from .results import load_results
from .runner import Progress


def guidance_sweep(
    loaded: LoadedModel,
    name: str,
    folder: Path,
    scales: Sequence[float],
    options: EvaluationOptions,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Evaluate a model at each guidance scale. A stopped sweep resumes; a scale that is finished is not run again.

    Args:
        loaded: The model, with a single guidance scale.
        name: Name of the benchmark.
        folder: Each scale has a run in `guidance-SCALE` below it, equal to a run with `--guidance SCALE`.
        scales: The scales, in the order of the table.
        options: All other options.
        judge: For protocols that need one.
        progress: Called with the number of answered samples and their total, per scale.

    Returns:
        `list[Path]`: The folders of the runs, empty on other processes than the main one.

    Raises:
        ValueError: The model has no diffusion model, or several scales.
    """
    folders = []
    for scale in scales:
        run = folder / f"guidance-{scale:g}"
        if evaluate(loaded, name, run, replace(options, guidance=(float(scale),)), judge, progress):
            folders.append(run)
    return folders


def sweep_scores(folders: Sequence[Path]) -> dict[float, dict[str, dict[str, Any]]]:
    """The headline score and its 95% interval by guidance scale, under the name of benchmark and metric.

    A run without a score, because its replies were not judged, is left out.

    Args:
        folders: From `guidance_sweep`.
    """
    found: dict[float, dict[str, dict[str, Any]]] = {}
    for folder in folders:
        for results, _ in load_results(folder):
            metric, (scale,) = results["metric"], results["guidance_scales"]
            if metric not in results["scores"]:
                continue
            score = {"score": results["scores"][metric], "interval": results["intervals_95"][metric]}
            found.setdefault(float(scale), {})[f"{results['benchmark']} {metric}"] = score
    return found
