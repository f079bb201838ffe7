"""The diffusion model's prompts in training, and the seeds of its noise.

Every random choice is a function of (seed, epoch, sample). It does not depend on the number of workers or processes,
or on the order of the data.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..questions import turns_about_images
from .records import IMAGE_MARKER, Record, RecordError, strip_markers

PromptSource = Literal["none", "question", "caption", "noisy_caption"]
_SOURCES = ("none", "question", "caption", "noisy_caption")
_QUESTIONS = ("random", "last")


@dataclass(frozen=True)
class PromptOptions:
    """How the prompt of an image is made.

    Args:
        source: "none" (empty), "question" (S3, 5.2), "caption" (the answer to the image's own turn: S3, 4.3) or
            "noisy_caption" (the same, each word dropped with probability `word_dropout`: S4, 6.1).
        question: "random" (one of the questions about the image: S4, 6.1) or "last".
        word_dropout: Probability in [0, 1] of dropping a word of a noisy caption.
        dropout: Probability in [0, 1] of an empty prompt (S3, 4.3: 0.3).
        pseudo_captions: Text by image path, appended to the question (the rows with a dagger in S4, Table 7).

    Raises:
        ValueError: An option has a value that it does not allow.
    """

    source: PromptSource = "question"
    question: Literal["random", "last"] = "random"
    word_dropout: float = 0.3
    dropout: float = 0.0
    pseudo_captions: Mapping[str, str] | None = None

    def __post_init__(self):
        for name, choices in (("source", _SOURCES), ("question", _QUESTIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"The diffusion prompt's {name} is {getattr(self, name)!r}. Use one of {choices}.")
        for name in ("word_dropout", "dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"The diffusion prompt's {name} is {getattr(self, name)}. Use a value in [0, 1].")
        if self.pseudo_captions is not None and self.source != "question":
            raise ValueError(
                f"The diffusion prompt's source is {self.source!r}, to which pseudo-captions cannot be appended. Use "
                "'question'."
            )


def sample_generator(seed: int, epoch: int, sample: int, purpose: str) -> np.random.Generator:
    """The generator of one choice. Each purpose has its own, so that options do not change each other's draws."""
    return np.random.default_rng(np.random.SeedSequence([seed, epoch, sample, zlib.crc32(purpose.encode())]))


def noise_seeds(seed: int, epoch: int, sample: int, n_images: int) -> list[int]:
    """The seeds of the noise on the latents, one per image, each below 2**63."""
    return sample_generator(seed, epoch, sample, "noise").integers(2**63 - 1, size=n_images).tolist()


def drop_words(text: str, probability: float, generator: np.random.Generator) -> str:
    """Drop each word independently with the given probability in [0, 1] (S4, 6.1: 0.3)."""
    words = text.split()
    kept = generator.random(len(words)) >= probability
    return " ".join(word for word, keep in zip(words, kept, strict=True) if keep)


def image_turns(record: Record) -> list[list[int]]:
    """The user messages about each image, by their index: those of [`~sdllava.questions.turns_about_images`]."""
    if not record["images"]:
        return []
    users = [i for i, message in enumerate(record["messages"]) if message["role"] == "user"]
    counts = [record["messages"][i]["content"].count(IMAGE_MARKER) for i in users]
    return [[users[turn] for turn in turns] for turns in turns_about_images(counts)]


def training_prompts(record: Record, options: PromptOptions, seed: int, epoch: int, sample: int) -> list[str]:
    """Draw one prompt per image of a record.

    Args:
        record: The sample. Without images it has no prompts.
        options: How prompts are made.
        seed: The seed of the run.
        epoch: The number of the epoch.
        sample: The sample's key, from [`~sdllava.data.records.sample_key`].

    Returns:
        `list[str]`: Prompts without image markers. The processor's `tokenize_questions` removes LLaVA's format
        instructions.

    Raises:
        RecordError: The options have pseudo-captions, and none for an image.
    """
    choice = sample_generator(seed, epoch, sample, "question")
    words = sample_generator(seed, epoch, sample, "words")
    dropout = sample_generator(seed, epoch, sample, "dropout")
    prompts = []
    for image, turns in zip(record["images"], image_turns(record), strict=True):
        questions = _questions(record, turns)
        random_question = questions[int(choice.integers(len(questions)))]
        dropped = dropout.random() < options.dropout
        if options.source == "none" or dropped:
            prompt = ""
        elif options.source == "question":
            question = random_question if options.question == "random" else questions[-1]
            prompt = _with_pseudo_caption(question, image, options)
        else:
            prompt = _caption(record, turns)
            if options.source == "noisy_caption":
                prompt = drop_words(prompt, options.word_dropout, words)
        prompts.append(prompt)
    return prompts


def possible_prompts(record: Record, options: PromptOptions) -> list[list[str]]:
    """For each image of a record, every prompt that [`training_prompts`] can draw.

    Raises:
        ValueError: The prompts are noisy captions, which cannot be enumerated.
    """
    if options.source == "noisy_caption":
        raise ValueError(
            "The features of noisy captions cannot be cached, because noisy captions differ in every epoch. Use the "
            "prompt source 'caption', or train without a cache."
        )
    prompts = []
    for image, turns in zip(record["images"], image_turns(record), strict=True):
        if options.source == "none":
            found = [""]
        elif options.source == "caption":
            found = [_caption(record, turns)]
        else:
            questions = _questions(record, turns)
            chosen = questions if options.question == "random" else questions[-1:]
            found = [_with_pseudo_caption(question, image, options) for question in chosen]
        prompts.append(list(dict.fromkeys(found + [""] * (options.dropout > 0))))
    return prompts


def _questions(record: Record, turns: list[int]) -> list[str]:
    """The texts of an image's turns. Turns that only show the image are left out, as the processor leaves them out."""
    texts = [strip_markers(record["messages"][turn]["content"]) for turn in turns]
    return [text for text in texts if text] or [""]


def _caption(record: Record, turns: list[int]) -> str:
    return strip_markers(record["messages"][turns[0] + 1]["content"])


def _with_pseudo_caption(question: str, image: Any, options: PromptOptions) -> str:
    return f"{question} {pseudo_caption(image, options.pseudo_captions)}".strip()


def read_pseudo_captions(path: str | Path) -> dict[str, str]:
    """Captions by image path, from a JSON object or from JSON Lines with `image` and `caption`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has neither form.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        try:
            captions = json.loads(text)
        except json.JSONDecodeError:
            captions = None
        if captions is None or "caption" in captions:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            captions = {row["image"]: row["caption"] for row in rows}
        if not isinstance(captions, dict) or not all(isinstance(caption, str) for caption in captions.values()):
            raise TypeError("the captions are not all text")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} does not hold captions ({error}). Give a JSON object of image path to caption, or JSON "
            "Lines with `image` and `caption`."
        ) from error
    return captions


def pseudo_caption(image: Any, captions: Mapping[str, str] | None) -> str:
    """The pseudo-caption of a record's image. Empty where `captions` is None.

    Raises:
        RecordError: `captions` has none for this image.
    """
    if captions is None:
        return ""
    path = image.get("path") if isinstance(image, dict) else image
    if path is None or path not in captions:
        raise RecordError(f"has the image {path!r}, for which there is no pseudo-caption")
    return captions[path]
