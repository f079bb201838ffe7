"""Checks of what users type that need no model: repository ids, questions, messages. Imports nothing heavy."""

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


def check_conversation(conversation: Any) -> None:
    """Check that a conversation, or each of a list of them, has messages of the form of chat templates.

    Raises:
        ValueError: A message has no role, or its content is neither a text nor a list of blocks.
    """
    entries = conversation if isinstance(conversation, list | tuple) else []
    is_batch = bool(entries) and all(isinstance(entry, list | tuple) for entry in entries)
    for messages in entries if is_batch else [conversation]:
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"{messages!r:.80} is not a conversation. Give a list of messages.")
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            parts = content if isinstance(content, list | tuple) else []
            has_role = isinstance(message, dict) and isinstance(message.get("role"), str)
            is_content = content is None or isinstance(content, str | list | tuple)
            if not has_role or not is_content or not all(isinstance(part, dict) for part in parts):
                raise ValueError(
                    f"{message!r:.80} is not a message. Give a dictionary with a role, and content: a text, or a list "
                    'such as [{"type": "image"}, {"type": "text", "text": "What is it?"}].'
                )
            for block in parts:
                _check_block(block)


def _check_block(block: dict[str, Any]) -> None:
    for field in ("type", "text") if block.get("type") == "text" else ("type",):
        if not isinstance(block.get(field), str):
            raise ValueError(
                f"The {field} of the content block {block!r:.80} is missing or not a string. Give a block such as "
                '{"type": "image"} or {"type": "text", "text": "What is it?"}.'
            )
