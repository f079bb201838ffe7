"""The diffusion model's prompts in an evaluation, independent of those it was trained with.

| choice | prompt |
|---|---|
| `question` | the sample's question, without options and answer instruction |
| `prompt` | the whole text that the language model reads |
| `caption` | the image's caption: from a file of pseudo-captions, else the benchmark's first reference caption |
| `question+caption` | both, in this order (the rows marked with a dagger in S4's Table 7) |
| `none` | the empty prompt |
| `other` | the text of another sample, by a seeded derangement: its caption if captions exist, else its question |
"""

import random
from collections.abc import Mapping, Sequence

from .benchmarks.base import Sample

CHOICES = ("question", "prompt", "caption", "question+caption", "none", "other")


def derangement(count: int, seed: int) -> list[int]:
    """Draw a permutation of `0..count-1` without fixed points, uniformly over all of them.

    Raises:
        ValueError: `count` is less than 2.
    """
    if count < 2:
        raise ValueError(f"Swapping texts between samples needs at least two samples, not {count}. Raise --limit.")
    generator = random.Random(seed)
    while True:
        order = list(range(count))
        generator.shuffle(order)
        if all(position != item for position, item in enumerate(order)):
            return order


def prompts_for_samples(
    samples: Sequence[Sample], choice: str, captions: Mapping[str, str] | None = None, seed: int = 0
) -> dict[str, list[str]]:
    """The diffusion model's prompts for an evaluation, one per image of each sample.

    Args:
        samples: The samples of the evaluation.
        choice: One of `CHOICES`, see the table above.
        captions: Image name -> caption, in the format of `--write-pseudo-captions`.
        seed: Seed of the derangement that `other` draws.

    Returns:
        `dict[str, list[str]]`: Sample id -> one prompt per image.

    Raises:
        ValueError: `choice` is unknown, or an image has no caption.
    """
    if choice not in CHOICES:
        raise ValueError(f"Unknown --diffusion-prompt {choice!r}. Choose one of {', '.join(CHOICES)}.")
    if choice == "other":
        donors = derangement(len(samples), seed)
        known = bool(captions) or _references(samples[0]) is not None
        texts = [caption_of(sample, 0, captions) if known else sample.question for sample in samples]
        return {sample.id: [texts[donor]] * len(sample.images) for sample, donor in zip(samples, donors, strict=True)}
    return {
        sample.id: [_text(sample, image, choice, captions) for image in range(len(sample.images))] for sample in samples
    }


def _text(sample: Sample, image: int, choice: str, captions: Mapping[str, str] | None) -> str:
    match choice:
        case "question":
            return sample.question
        case "prompt":
            return sample.prompt
        case "none":
            return ""
        case "caption":
            return caption_of(sample, image, captions)
        case _:
            return f"{sample.question} {caption_of(sample, image, captions)}"


def caption_of(sample: Sample, image: int, captions: Mapping[str, str] | None) -> str:
    """The caption of one image: from the file, else the first reference of a captioning benchmark.

    Raises:
        ValueError: The image has no caption.
    """
    if captions is None:
        references = _references(sample)
        if references is None:
            raise ValueError(
                "This benchmark has no captions of its own. Give a file with --captions "
                "(`sdllava evaluate --write-pseudo-captions FILE` writes one)."
            )
        return references[0]
    name = sample.image_ids[image]
    if name not in captions:
        raise ValueError(f"The caption file has no caption for the image {name!r}. Write captions for this benchmark.")
    return captions[name]


def _references(sample: Sample) -> list[str] | None:
    return sample.target if isinstance(sample.target, list) and sample.target else None
