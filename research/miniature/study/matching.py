"""(b) S3, Tables 1 and 6: the UNet's cross-attention and CLIP match the two scenes of a minimal pair with captions."""

from pathlib import Path
from typing import Any

from sdllava.evaluation.benchmarks import get_matching_benchmark
from sdllava.evaluation.bootstrap import Units
from sdllava.evaluation.evaluate import weights_fingerprint
from sdllava.evaluation.match import load_matcher, match
from sdllava.evaluation.matching import MatchingOptions
from sdllava.evaluation.results import read_records

from .claims import claim
from .scales import StudyScale

MATCHERS = {"UNet": "diffusion", "CLIP": "clip"}
CLEARER = ("orientation", "presence", "viewpoint")
"""The patterns on which S3 finds diffusion ahead of CLIP by 11 to 20 points."""


def measure(parts: Path, work: Path, scale: StudyScale) -> dict[str, Any]:
    """Both matchers on the same pairs through `sdllava match`."""
    benchmark = get_matching_benchmark("mini_pairs")
    options = MatchingOptions(trials=scale.match_trials)
    results, units = {}, {}
    for name, folder in MATCHERS.items():
        matcher = load_matcher(str(parts / folder), options, batch_size=32)
        weights = weights_fingerprint(parts / folder / "unet") or weights_fingerprint(parts / folder)
        model = {"id": folder, "revision": weights}
        results[name] = match(
            matcher, "mini_pairs", work / name, model, options, limit=scale.match_items, progress=_progress(name)
        )
        units[name] = benchmark.units(read_records(work / name / "samples.jsonl"))
    trends = {"average": "the UNet's cross-attention matches more minimal pairs than CLIP (S3, Table 1)"}
    trends |= {p: f"the UNet is ahead of CLIP in {p} (S3, 4.1)" for p in CLEARER if p in results["UNet"]["scores"]}
    kept = ("scores", "spread", "intervals_95", "trials", "samples", "chance", "timesteps")
    return {
        "rows": {name: {key: result[key] for key in kept} for name, result in results.items()},
        "claims": [
            claim(trend, _of(units["CLIP"], metric), _of(units["UNet"], metric), benchmark.scores, metric)
            for metric, trend in trends.items()
        ],
    }


def _of(units: Units, metric: str) -> Units:
    """The units that a score is made of, so that no resample is without any."""
    return units if metric == "average" else {k: values for k, values in units.items() if f"count {metric}" in values}


def _progress(name: str):
    from tqdm import tqdm

    bar = tqdm(desc=f"matching, {name}")

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
