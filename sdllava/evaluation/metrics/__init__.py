"""The benchmarks' scores as a module of the `evaluate` library, one configuration per benchmark.

`sdllava evaluate` and `sdllava match` use the same benchmark classes, so the scores are those of a run.
"""

from pathlib import Path


def metric_path() -> Path:
    """The folder to pass to `evaluate.load`, with the benchmark as configuration.

    Example:
        `evaluate.load(str(metric_path()), "mmvp").compute(predictions=replies, references=references)`
    """
    return Path(__file__).parent / "benchmark_score"
