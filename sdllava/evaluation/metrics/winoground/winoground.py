"""Winoground's text, image and group scores for the `evaluate` library."""

import datasets
import evaluate

from sdllava.evaluation.benchmarks.winoground import score

DESCRIPTION = "Winoground's text, image and group scores with strict inequalities, in percent (arXiv 2204.03162)."
CITATION = "Thrush et al., Winoground: Probing Vision and Language Models for Visio-Linguistic Compositionality, 2022."


class WinogroundMetric(evaluate.Metric):
    """Predictions are 2x2 score matrices, rows texts, columns images; text k belongs to image k. No references."""

    def _info(self) -> evaluate.MetricInfo:
        matrix = datasets.Sequence(datasets.Sequence(datasets.Value("float64")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=self.__doc__,
            features=datasets.Features({"predictions": matrix}),
        )

    def _compute(self, predictions: list[list[list[float]]]) -> dict[str, float]:
        return score(predictions)
