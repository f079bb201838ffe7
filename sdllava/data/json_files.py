"""JSON arrays and JSON Lines, with the line of every value and of every error."""

import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

TOO_DEEP = "is nested too deeply"


def _text(data: bytes, path: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line} is not UTF-8: {error.reason}. Convert the file, for example with iconv."
        ) from error


def json_lines(stream: Iterable[bytes]) -> Iterator[tuple[int, Any]]:
    """The lines of a JSON Lines file.

    Args:
        stream: Its lines.

    Yields:
        The number of each line that is not empty, from 1, with its value, or with a text that says what is wrong.
    """
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8-sig"))
            except RecursionError:
                yield number, TOO_DEEP
            except UnicodeDecodeError as error:
                yield number, f"the line is not UTF-8: {error.reason}"
            except ValueError as error:  # also an integer of too many digits
                yield number, str(error)


def json_array(data: bytes, path: str) -> Iterator[tuple[str, Any]]:
    """The values of a JSON array.

    Args:
        data: The file.
        path: Its path, for messages.

    Yields:
        The line on which each value begins with its number, and the value.

    Raises:
        ValueError: The file is not one JSON array. The message names the line.
    """
    text = _text(data, path)
    decode = json.JSONDecoder().raw_decode
    line, counted = 1, 0
    position = _skip(text, 0, "[", path)
    for number in itertools.count():
        if text[position : position + 1] == "]":
            position += 1
            break
        try:
            line, counted = line + text.count("\n", counted, position), position
            sample, position = decode(text, position)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno} is not JSON: {error.msg}.") from error
        except RecursionError as error:
            raise ValueError(f"{path}:{line} {TOO_DEEP}.") from error
        except ValueError as error:  # an integer of too many digits
            raise ValueError(f"{path}:{line} is not JSON: {error}.") from error
        yield f"{line} sample {number}", sample
        position = _skip(text, position, ",]", path)
        if text[position - 1] == "]":
            break
    if rest := text[position:].strip():
        line = text.count("\n", 0, len(text.rstrip()) - len(rest)) + 1
        raise ValueError(f"{path}:{line} continues after the array: {rest[:20]!r}. Write all samples in one array.")


def _skip(text: str, position: int, expected: str, path: str) -> int:
    """The position after the expected character and the whitespace around it."""
    while text[position : position + 1].isspace():
        position += 1
    if text[position : position + 1] not in tuple(expected):
        line = text.count("\n", 0, position) + 1
        raise ValueError(f"{path}:{line} is not a JSON array of samples: {text[position : position + 20]!r}.")
    position += 1
    while text[position - 1] != "]" and text[position : position + 1].isspace():
        position += 1
    return position
