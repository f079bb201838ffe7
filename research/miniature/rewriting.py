"""Questions about scenes, rewritten as captions: the UNet was trained on captions and never saw a question."""

import re

from sdllava.scenes.language import article
from sdllava.scenes.world import DIRECTIONS, SHAPES

_THING = re.compile(rf"\b(?:the|an?) ((?:\w+ )?(?:object|{'|'.join(SHAPES)}))(?: at (the \w+ \w+))?")


def rewrite(question: str) -> str:
    """A question about a scene as the caption of what it asks about, in the words of the captions.

    "Which letter is on the red star?" becomes "a red star marked", "Does the blue arrow point up?" "a blue arrow
    pointing up", and "How many stars are there?" "stars". What a question about the whole scene is rewritten to does
    not depend on the scene.
    """
    if question.startswith("How many"):
        return question.split()[2]
    if question.startswith("From where"):
        return "seen from"
    things = _THING.findall(question)
    if re.search(r"\ban? \w+ or an? \w+", question):  # "Is the red object a star or a circle?"
        things = things[:1]
    parts = [_part(question, noun, place) for noun, place in things]
    return ", ".join(parts)


def _part(question: str, noun: str, place: str) -> str:
    text = article(f"broken {noun}" if "broken" in question else noun)
    if "point" in question:
        way = next((word for word in DIRECTIONS if f"point {word}" in question), "")
        text += f" pointing {way}".rstrip()
    text += " with a border" if "border" in question else ""
    text += " marked" if "letter" in question else ""
    return f"{text} at {place}" if place else text
