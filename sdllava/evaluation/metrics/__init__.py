"""The benchmarks' scores as modules of the `evaluate` library: `evaluate.load(str(metric_path("mmvp")))`.

`evaluate` copies a module's file to its own cache before importing it, so these files use absolute imports.
"""

from pathlib import Path

METRICS = ("mmvp", "naturalbench", "winoground", "captions")


def metric_path(name: str) -> Path:
    """The folder to pass to `evaluate.load`.

    Raises:
        ValueError: The metric does not exist.
    """
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}. Choose one of {', '.join(METRICS)}.")
    return Path(__file__).parent / name
