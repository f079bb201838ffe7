"""The rule for which question belongs to which image, in a conversation, a rendered prompt, or training data."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .chat_templates import UserTurnMarkers

FORMAT_SUFFIXES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""LLaVA's two instructions about the form of the answer, which are left out of the diffusion model's prompt."""


def turns_about_images(image_counts: Sequence[int]) -> list[list[int]]:
    """The turns that ask about each image: from its own to the last one before another turn with images.

    Args:
        image_counts: The number of images that begin in each turn of the user.

    Returns:
        `list[list[int]]`: One list of indices of turns per image.
    """
    starts = [turn for turn, count in enumerate(image_counts) if count]
    spans = pairwise([*starts, len(image_counts)])
    return [list(range(start, end)) for start, end in spans for _ in range(image_counts[start])]


def clean_question(question: str, image_token: str = "<image>") -> str:
    """A user turn as the diffusion model's prompt: without image tokens and LLaVA's format instructions."""
    question = question.replace(image_token, " ")
    for suffix in FORMAT_SUFFIXES:
        question = question.replace(suffix, "")
    return question.strip()


def questions_in_messages(messages: Sequence[dict[str, Any]]) -> list[str]:
    """One question per image of a conversation: the last turn with text of those that ask about it.

    Args:
        messages: In the format of chat templates; content is text, or a list of blocks of type "image" or "text".
    """
    turns = []
    for message in messages:
        content = message.get("content") or []
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        images = sum(block["type"] == "image" for block in content)
        text = " ".join(block["text"] for block in content if block["type"] == "text").strip()
        if images or message["role"] == "user":
            turns.append((images, text))
    return _last_texts(turns)


def questions_in_text(text: str, image_token: str, markers: UserTurnMarkers | None) -> list[str]:
    """One question per image token of a rendered prompt, by its template's user turns, or else the text around them.

    Args:
        text: The prompt, with one image token per image.
        image_token: The placeholder, for example "<image>".
        markers: How the template frames user turns, from `user_turn_markers`. None reads the whole text.
    """
    if markers is not None and markers.start in text:
        parts = [part.split(markers.end, 1)[0] for part in text.split(markers.start)[1:]]
        if sum(part.count(image_token) for part in parts) == text.count(image_token):
            return _last_texts([(part.count(image_token), clean_question(part, image_token)) for part in parts])
    return [re.sub(r"\s+", " ", clean_question(text, image_token))] * text.count(image_token)


def _last_texts(turns: Sequence[tuple[int, str]]) -> list[str]:
    about = turns_about_images([images for images, _ in turns])
    return [next((turns[i][1] for i in reversed(indices) if turns[i][1]), "") for indices in about]
