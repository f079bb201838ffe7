"""MMVP's pair and single accuracy for the `evaluate` library."""

import datasets
import evaluate

from sdllava.evaluation.benchmarks.mmvp import score

DESCRIPTION = "Share of MMVP pairs with both answers correct, and of single answers, in percent (arXiv 2401.06209)."
CITATION = "Tong et al., Eyes Wide Shut? Exploring the Visual Shortcomings of Multimodal LLMs, CVPR 2024."


class MMVPMetric(evaluate.Metric):
    """Predictions and references are letters in the published order: rows 2k and 2k + 1 form a pair."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=self.__doc__, features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, float]:
        return score([prediction == reference for prediction, reference in zip(predictions, references, strict=True)])
