"""Checks of what users type that need no model: repository ids and questions. Imports nothing heavy."""

import re
from typing import Any

REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@.+)?")
"""A repository id on the Hub, with a revision or without."""


def check_question(question: Any) -> str:
    """Return a question that is text.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty.
    """
    if not isinstance(question, str):
        raise TypeError(f"Question {question!r} is not a string. Give text.")
    if not question.strip():
        raise ValueError(f"Question {question!r} is empty. Ask something about the image.")
    return question
