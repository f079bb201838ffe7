"""The papers' benchmarks, one file each."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Benchmark
    from .matching_base import MatchingBenchmark

# name on the command line -> (module, class)
BENCHMARKS = {
    "mmvp": ("mmvp", "MMVP"),
    "naturalbench": ("naturalbench", "NaturalBench"),
    "blink": ("blink", "BLINK"),
    "gqa": ("gqa", "GQA"),
    "llava_bench": ("llava_bench", "LLaVABench"),
    "captions": ("captions", "CocoCaptions"),
    "easy_vqa": ("easy_vqa", "EasyVQA"),
    "shapes": ("statements", "Shapes"),
    "nlvr": ("statements", "NLVR"),
    "own": ("own", "Own"),
    "mini": ("mini", "Mini"),
    "mini_captions": ("mini", "MiniCaptions"),
}
MATCHING_BENCHMARKS = {
    "mmvp_vlm": ("mmvp_vlm", "MMVPVLM"),
    "winoground": ("winoground", "Winoground"),
    "sugarcrepe": ("sugarcrepe", "SugarCrepe"),
    "mini_pairs": ("mini", "MiniPairs"),
}


def get_benchmark(name: str, protocol: str = "default", **options: Any) -> "Benchmark":
    """The question benchmark with that name.

    Args:
        name: A key of `BENCHMARKS`.
        protocol: A key of the benchmark's `protocols`.
        options: Further arguments of the benchmark's class.

    Raises:
        ValueError: The benchmark or the protocol does not exist.
    """
    return _load(BENCHMARKS, name)(protocol, **options)


def get_matching_benchmark(name: str) -> "MatchingBenchmark":
    """The image-text matching benchmark with that name.

    Raises:
        ValueError: The benchmark does not exist.
    """
    return _load(MATCHING_BENCHMARKS, name)()


def check_name(table: dict[str, tuple[str, str]], name: str) -> None:
    """Check that a benchmark exists, without importing it.

    Args:
        table: `BENCHMARKS` or `MATCHING_BENCHMARKS`.
        name: The benchmark's name.

    Raises:
        ValueError: It does not exist.
    """
    if name not in table:
        raise ValueError(f"Unknown benchmark {name!r}. Choose one of {', '.join(table)}.")


def _load(table: dict[str, tuple[str, str]], name: str) -> Any:
    check_name(table, name)
    module, attribute = table[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)


__all__ = ["BENCHMARKS", "MATCHING_BENCHMARKS", "check_name", "get_benchmark", "get_matching_benchmark"]
