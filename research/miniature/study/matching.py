"""(b) S3, Tables 1 and 6: the UNet's cross-attention and CLIP match the scenes of minimal pairs with captions."""

from pathlib import Path
from typing import Any

from sdllava.evaluation.benchmarks import get_matching_benchmark
from sdllava.evaluation.benchmarks.groups import COUNT
from sdllava.evaluation.bootstrap import Units
from sdllava.evaluation.match import load_matcher, match
from sdllava.evaluation.matching import MatchingOptions
from sdllava.evaluation.results import read_records

from ..progress import progress_bar
from .claims import claim
from .scales import StudyScale
from .weights import part_hash

MATCHERS = {"UNet": ("diffusion", "diffusion/unet"), "CLIP": ("clip", "clip")}
"""Each matcher, its folder, and the part whose weights identify it."""

CLEARER = ("orientation", "presence", "viewpoint")
"""The patterns in which S3 reports that diffusion exceeds CLIP by 11 to 20 points."""

TRENDS = {"average": "the UNet's cross-attention matches more minimal pairs than CLIP (S3, Table 1)"} | {
    pattern: f"the UNet matches more minimal pairs than CLIP in {pattern} (S3, 4.1)" for pattern in CLEARER
}


def measure(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Scores of both matchers on the same pairs, as `sdllava match` computes them.

    Args:
        parts: The folder of the miniature's parts.
        work: The folder of intermediate results.
        scale: The budgets.

    Returns:
        `dict[str, Any]`: `rows` and `claims`.
    """
    benchmark = get_matching_benchmark("mini_pairs")
    options = MatchingOptions(trials=scale.match_trials)
    results, units = {}, {}
    for name, (folder, part) in MATCHERS.items():
        results[name], units[name] = run_matcher(parts, folder, part, work / name, options, scale.match_items)
    return {
        "rows": results,
        "claims": [
            claim(trend, _of(units["CLIP"], metric), _of(units["UNet"], metric), benchmark.scores, metric)
            for metric, trend in TRENDS.items()
            if metric in results["UNet"]["scores"]
        ],
    }


def run_matcher(
    parts: Path, folder: str, part: str, work: Path, options: MatchingOptions, limit: int
) -> tuple[dict[str, Any], Units]:
    """The results and the units of `sdllava match` on minimal pairs.

    Args:
        parts: The folder of the miniature's parts.
        folder: The folder of the model in it.
        part: The part whose weights identify the model.
        work: The folder of intermediate results.
        options: The score.
        limit: The number of pairs.
    """
    matcher = load_matcher(str(parts / folder), options, batch_size=32)
    model = {"id": folder, "revision": f"weights {part_hash(parts, part)[:16]}"}
    with progress_bar(f"matching, {folder}, {work.name}") as progress:
        result = match(matcher, "mini_pairs", work, model, options, limit=limit, progress=progress)
    units = get_matching_benchmark("mini_pairs").units(read_records(work / "samples.jsonl"))
    kept = ("scores", "spread", "intervals_95", "trials", "samples", "chance", "timesteps")
    return {key: result[key] for key in kept}, units


def _of(units: Units, metric: str) -> Units:
    """The units of a score, so that every bootstrap sample has some."""
    return units if metric == "average" else {k: values for k, values in units.items() if f"{COUNT} {metric}" in values}
