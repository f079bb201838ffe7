"""Checks of what users type that need no model: repository ids and questions. Imports nothing heavy."""

import re
from typing import Any

REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@.+)?")
"""A repository id on the Hub, with a revision or without."""


def check_question(question: Any) -> str:
    """Return a question that is text.

    Raises:
        TypeError: It is not a string.
        ValueError: It is empty, or has a surrogate.
    """
    if not isinstance(question, str):
        raise TypeError(f"Question {question!r} is not a string. Give text.")
    if not question.strip():
        raise ValueError(f"Question {question!r} is empty. Ask something about the image.")
    check_encodable(question, "Question")
    return question


def check_encodable(text: str, what: str) -> None:
    """Check that a text has no surrogates, as arguments that are not UTF-8 have.

    Raises:
        ValueError: It has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} {text!r:.80} has a surrogate, which is not a character. Give UTF-8.") from error
