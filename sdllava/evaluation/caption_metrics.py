"""BLEU 1-4, ROUGE-L and CIDEr-D in plain Python, equal to pycocoevalcap's on the same tokens (to 1e-9).

Captions are strings of tokens separated by single ASCII spaces (see `tokenization.py`). Sources: BLEU, Papineni et al.
2002, corpus level with the closest reference length; ROUGE-L, Lin 2004, beta 1.2; CIDEr-D, Vedantam et al. 2015,
n = 1..4, sigma 6. `caption_scores` returns each score times 100, as in the papers' tables.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

MAX_N = 4
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0
SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap's guards against division by zero, which affect its scores

Ngrams = Counter[tuple[str, ...]]
Vector = tuple[list[dict[tuple[str, ...], float]], list[float], int]
"""TF-IDF weights by n, their norms, and the length (in bigrams, as in pycocoevalcap)."""


def ngrams(caption: str) -> Ngrams:
    """Counts of the 1- to 4-grams of a caption."""
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for n in range(1, MAX_N + 1) for i in range(len(words) - n + 1))


# ----------------------------------------------------------------------------------------------------------- BLEU


def bleu_counts(candidate: str, references: Sequence[str]) -> dict[str, float]:
    """One caption's contribution to corpus-level BLEU: matches and guesses for n = 1..4, and two lengths in words.

    The reference length is the closest one, and the shorter of two equally close ones.
    """
    counts = ngrams(candidate)
    most: Ngrams = Counter()
    for reference in references:
        most |= ngrams(reference)
    length = len(candidate.split())
    closest = min((abs(len(r.split()) - length), len(r.split())) for r in references)[1]
    result = {"length": float(length), "reference_length": float(closest)}
    for n in range(1, MAX_N + 1):
        result[f"guesses_{n}"] = float(max(0, length - n + 1))
        result[f"matches_{n}"] = float(sum(min(c, most[gram]) for gram, c in counts.items() if len(gram) == n))
    return result


def bleu_from_counts(total: Mapping[str, float]) -> dict[str, float]:
    """BLEU 1-4 in [0, 1] from the sums of `bleu_counts` over all captions."""
    ratio = (total["length"] + TINY) / (total["reference_length"] + SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    product, result = 1.0, {}
    for n in range(1, MAX_N + 1):
        product *= (total[f"matches_{n}"] + TINY) / (total[f"guesses_{n}"] + SMALL)
        result[f"BLEU-{n}"] = product ** (1 / n) * penalty
    return result


# -------------------------------------------------------------------------------------------------------- ROUGE-L


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for a in first:
        diagonal = 0
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidate: str, references: Sequence[str]) -> float:
    """The F score, in [0, 1], of the largest precision and the largest recall, each maximised over the references.

    Tokens are split only at ASCII spaces, because PTB tokens can contain a no-break space ("22 3/4").
    """
    words = candidate.split(" ")
    precision = recall = 0.0
    for reference in references:
        other = reference.split(" ")
        common = longest_common_subsequence(other, words)
        precision, recall = max(precision, common / len(words)), max(recall, common / len(other))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


# -------------------------------------------------------------------------------------------------------- CIDEr-D


def cider_d(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption, in [0, 10], with inverse document frequencies from these references.

    With a single image all inverse document frequencies, and so all scores, are 0.
    """
    reference_counts = [[ngrams(reference) for reference in group] for group in references]
    frequency: Counter = Counter()
    for group in reference_counts:
        frequency.update({gram for counts in group for gram in counts})
    log_images = math.log(len(references))
    idf = {gram: log_images - math.log(count) for gram, count in frequency.items()}
    scores = []
    for candidate, group in zip(candidates, reference_counts, strict=True):
        vector = _tf_idf(ngrams(candidate), idf, log_images)
        totals = [_similarity(vector, _tf_idf(counts, idf, log_images)) for counts in group]
        scores.append(10.0 * float(np.mean(np.sum(totals, axis=0))) / len(group))
    return scores


def _tf_idf(counts: Ngrams, idf: Mapping[tuple[str, ...], float], unseen: float) -> Vector:
    weights: list[dict] = [{} for _ in range(MAX_N)]
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * idf.get(gram, unseen)
    norms = [math.sqrt(sum(value * value for value in part.values())) for part in weights]
    return weights, norms, sum(count for gram, count in counts.items() if len(gram) == 2)


def _similarity(first: Vector, second: Vector) -> list[float]:
    (a, a_norms, a_length), (b, b_norms, b_length) = first, second
    penalty = math.exp(-((a_length - b_length) ** 2) / (2 * CIDER_SIGMA**2))
    values = []
    for n in range(MAX_N):
        value = sum(min(weight, b[n].get(gram, 0.0)) * b[n].get(gram, 0.0) for gram, weight in a[n].items())
        norm = a_norms[n] * b_norms[n]
        values.append(value / norm * penalty if norm else value * penalty)
    return values


# ------------------------------------------------------------------------------------------------------- together


def caption_units(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """The numbers of each image whose means determine all scores, from tokenised captions.

    Args:
        candidates: Image id -> caption.
        references: Image id -> reference captions.

    Raises:
        ValueError: Candidates and references have different images, or an image has no reference.
    """
    if set(candidates) != set(references):
        odd = sorted(set(candidates) ^ set(references))[0]
        raise ValueError(
            f"The image {odd!r} has a candidate without references, or references without a candidate. Give both for "
            "every image."
        )
    if empty := [image for image, group in references.items() if not group]:
        raise ValueError(f"The image {empty[0]!r} has no reference captions. Give at least one per image.")
    if not candidates:
        return {}
    images = list(candidates)
    ciders = cider_d([candidates[i] for i in images], [references[i] for i in images])
    units = {}
    for image, cider in zip(images, ciders, strict=True):
        units[image] = {
            "images": float(len(images)),
            "rouge": rouge_l(candidates[image], references[image]),
            "cider": cider,
            **bleu_counts(candidates[image], references[image]),
        }
    return units


def scores_from_means(means: Mapping[str, float]) -> dict[str, float]:
    """ROUGE-L, CIDEr, BLEU 4-1 and, if present, SPICE, times 100, from the means of `caption_units`."""
    bleu = bleu_from_counts({key: value * means["images"] for key, value in means.items()})
    scores = {"ROUGE-L": 100 * means["rouge"], "CIDEr": 100 * means["cider"]}
    scores.update({name: 100 * value for name, value in sorted(bleu.items(), reverse=True)})
    if "spice" in means:
        scores["SPICE"] = 100 * means["spice"]
    return scores


def caption_scores(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """All scores, times 100, of tokenised captions: image id -> caption, image id -> reference captions."""
    units = caption_units(candidates, references)
    means = {key: sum(unit[key] for unit in units.values()) / len(units) for key in next(iter(units.values()))}
    return scores_from_means(means)
