"""BLEU 1-4, ROUGE-L and CIDEr-D for the `evaluate` library, equal to pycocoevalcap's on the same tokens."""

import datasets
import evaluate

from sdllava.evaluation.caption_metrics import caption_scores
from sdllava.evaluation.tokenization import tokenize

DESCRIPTION = "BLEU 1-4, ROUGE-L and CIDEr-D, times 100, on PTB tokens if Java is installed (see `tokenizer`)."
CITATION = "Chen et al., Microsoft COCO Captions: Data Collection and Evaluation Server, 2015."


class CaptionMetric(evaluate.Metric):
    """Predictions are captions, references lists of captions. `tokenizer`: "ptb" (needs Java), "simple" or None."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.Sequence(datasets.Value("string"))}
        )
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=self.__doc__, features=features
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], tokenizer: str | None = None
    ) -> dict[str, float | str]:
        flat = [caption for pair in zip(predictions, references, strict=True) for caption in (pair[0], *pair[1])]
        tokens, name = tokenize(flat, tokenizer)
        remaining = iter(tokens)
        candidates, groups = {}, {}
        for number, group in enumerate(references):
            candidates[str(number)] = next(remaining)
            groups[str(number)] = [next(remaining) for _ in group]
        suffix = "" if name == "ptb" else " (simple tokens)"
        scores = {f"{key}{suffix}": value for key, value in caption_scores(candidates, groups).items()}
        return {**scores, "tokenizer": name}
