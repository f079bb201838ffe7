"""The scores of every benchmark for the `evaluate` library.

`evaluate` copies this file to its own cache before importing it, so it uses absolute imports.
"""

import json
from typing import Any

import datasets
import evaluate

from sdllava.evaluation.benchmarks import BENCHMARKS, MATCHING_BENCHMARKS, get_benchmark, get_matching_benchmark
from sdllava.evaluation.benchmarks.base import Sample
from sdllava.evaluation.benchmarks.matching_base import MatchingItem
from sdllava.evaluation.runner import make_record

DESCRIPTION = "The scores of `sdllava evaluate` and `sdllava match`, in percent. The configuration is the benchmark."
INPUTS = """
Args:
    predictions: Replies of the model. For a matching benchmark, matrices of scores: rows texts, columns images.
    references: One JSON object per prediction with the sample's `id`, its `target` and what its scoring needs (pair,
        group, task, options), as in a line of `samples.jsonl`.
    protocol: Of the benchmark. Not for matching benchmarks.
"""


class BenchmarkScore(evaluate.Metric):
    """Scores of replies, or of matrices of matching scores."""

    @property
    def _is_matching(self) -> bool:
        return self.config_name in MATCHING_BENCHMARKS

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in (*BENCHMARKS, *MATCHING_BENCHMARKS):
            names = ", ".join((*BENCHMARKS, *MATCHING_BENCHMARKS))
            raise ValueError(f"Unknown benchmark {self.config_name!r}. Give one of {names} as the configuration.")
        text = datasets.Value("string")
        matrix = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": matrix if self._is_matching else text, "references": text}),
        )

    def _compute(self, predictions: list[Any], references: list[str], protocol: str = "default") -> dict[str, float]:
        rows = [json.loads(reference) for reference in references]
        if self._is_matching:
            items = [MatchingItem(row["id"], (), (), row) for row in rows]
            return get_matching_benchmark(self.config_name).score(items, predictions)
        benchmark = get_benchmark(self.config_name, protocol)
        verdicts = ("reply", "parsed", "correct")  # of the run that wrote the reference
        records = []
        for row, reply in zip(rows, predictions, strict=True):
            info = {key: value for key, value in row.items() if key not in verdicts}
            sample = Sample(row["id"], row.get("prompt", ""), (), row.get("target"), info=info)
            records.append(make_record(benchmark, sample, reply, None))
        return benchmark.score(records)
