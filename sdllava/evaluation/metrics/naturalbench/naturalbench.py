"""NaturalBench's Acc, Q-Acc, I-Acc and G-Acc for the `evaluate` library."""

import datasets
import evaluate

from sdllava.evaluation.benchmarks.naturalbench import score

DESCRIPTION = "NaturalBench's accuracies over groups of two questions and two images, in percent (arXiv 2410.14669)."
CITATION = "Li et al., NaturalBench: Evaluating Vision-Language Models on Natural Adversarial Samples, NeurIPS 2024."


class NaturalBenchMetric(evaluate.Metric):
    """Predictions and references are 1 (yes, A), 0 (no, B) or -1 (none), in groups of q0i0, q0i1, q1i0, q1i1."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=self.__doc__, features=features
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        if len(predictions) % 4:
            raise ValueError(
                f"NaturalBench is scored in groups of four, but there are {len(predictions)} predictions. Give a "
                "multiple of four."
            )
        right = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
        return score([right[start : start + 4] for start in range(0, len(right), 4)])
