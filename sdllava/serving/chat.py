"""Reads and checks the body of `POST /v1/chat/completions`. Nothing is fetched, decoded or computed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .limits import Limits, RequestError

MAX_MESSAGES = 256
MAX_STOPS = 4
MAX_STOP_CHARS = 64
DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer where the request does not give their number."""
ROLES = ("system", "developer", "user", "assistant")
"""`developer` is OpenAI's present name of `system`."""
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields of OpenAI's clients without an effect on the answer."""
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "stop": ("",),
    "tool_choice": ("none", "auto"),
}
"""Values that mean the same as no value, in addition to null, false and what is empty."""


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Args:
        messages: The conversation in the format of chat templates. The images are not filled in.
        image_urls: The URL or data URL of each image, in order.
        max_new_tokens: Tokens of the answer.
        num_beams: Beams; 1 turns the beam search off.
        temperature: 0 is greedy; None is the model's own generation configuration.
        top_p: The nucleus, in (0, 1]; None is the model's own.
        seed: Of the sampling.
        stop: Strings that end the answer.
        stream: Send the answer in pieces.
        include_usage: Send the numbers of tokens after the last piece.
    """

    messages: list[dict[str, Any]]
    image_urls: list[str]
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    num_beams: int = 1
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


def read_chat_request(body: bytes, names: Sequence[str], limits: Limits) -> ChatRequest:
    """Check the body of a request.

    Args:
        body: The JSON text.
        names: The names that the served model has.
        limits: What the server accepts.

    Raises:
        RequestError: It is malformed or too expensive (HTTP 400), or names another model (HTTP 404).
    """
    try:
        given = json.loads(body, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise RequestError("The body is not valid JSON in UTF-8. Send a JSON object.") from error
    if not isinstance(given, dict):
        raise RequestError(f"The body is a {type(given).__name__}. Send a JSON object.")
    fields = {name: value for name, value in given.items() if name not in IGNORED and not _is_off(name, value)}
    model = fields.pop("model", None)
    if not isinstance(model, str):
        raise RequestError(f"Field 'model' is missing. Use {names[0]!r}.")
    check_model(model, names)
    messages, image_urls = _messages(fields.pop("messages", None), limits)
    tokens = [fields.pop(name, None) for name in ("max_completion_tokens", "max_tokens")]
    new_tokens = next((count for count in tokens if count is not None), min(DEFAULT_NEW_TOKENS, limits.max_new_tokens))
    stop, seed = fields.pop("stop", ()), fields.pop("seed", None)
    options = fields.pop("stream_options", {})
    if fields.get("temperature") == 0 and fields.get("top_p") == 0:
        del fields["top_p"]  # greedy, as without it
    request = ChatRequest(
        messages,
        image_urls,
        max_new_tokens=_integer("max_tokens", new_tokens, 1, limits.max_new_tokens),
        num_beams=_integer("num_beams", fields.pop("num_beams", 1), 1, limits.max_beams),
        temperature=_number("temperature", fields.pop("temperature", None), 0, 2),
        top_p=_number("top_p", fields.pop("top_p", None), 1e-6, 1),
        seed=None if seed is None else _integer("seed", seed, 0, 2**63 - 1),
        stop=_stops((stop,) if isinstance(stop, str) else stop),
        stream=_flag("stream", fields.pop("stream", False)),
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )
    _integer("n", fields.pop("n", 1), 1, 1)
    for name in ("frequency_penalty", "presence_penalty"):
        _number(name, fields.pop(name, 0), 0, 0)
    if fields:
        raise RequestError(f"Field {next(iter(fields))[:80]!r} is not supported. Remove it.")
    if request.num_beams > 1 and (request.stream or request.stop):
        raise RequestError("A beam search can neither be streamed nor have stop strings. Set num_beams to 1.")
    return request


def check_model(model: str, names: Sequence[str]) -> None:
    """Check the name of a model.

    Args:
        model: As the request names it.
        names: The names that the served model has.

    Raises:
        RequestError: It is another model (HTTP 404).
    """
    if model not in names:
        raise RequestError(f"Model {model[:80]!r} is not served here. Use {names[0]!r}.", 404)


def _is_off(name: str, value: Any) -> bool:
    return value is None or value is False or value == [] or value == {} or value in DEFAULTS.get(name, ())


def _not_a_number(text: str) -> None:
    raise ValueError(text)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"Field {name!r} is {_short(value)}. Use an integer in {low}..{high}.")
    return value


def _number(name: str, value: Any, low: float, high: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(f"Field {name!r} is {_short(value)}. Use a number in {low:g}..{high:g}.")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"Field {name!r} is {_short(value)}. Use true or false.")
    return value


def _short(value: Any) -> str:
    return repr(value)[:80] if isinstance(value, int | float | str) else f"of type {type(value).__name__}"


def _stops(stops: Any) -> tuple[str, ...]:
    if not isinstance(stops, list | tuple) or len(stops) > MAX_STOPS:
        raise RequestError(f"Field 'stop' is a string or a list of at most {MAX_STOPS} strings.")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise RequestError(f"A stop string is {_short(stop)}. Use 1 to {MAX_STOP_CHARS} characters.")
    return tuple(stops)


def _messages(given: Any, limits: Limits) -> tuple[list[dict[str, Any]], list[str]]:
    if not isinstance(given, list) or not given:
        raise RequestError("Field 'messages' is missing or empty. Send a list of messages.")
    if len(given) > MAX_MESSAGES:
        raise RequestError(f"There are {len(given)} messages. Send at most {MAX_MESSAGES}.")
    messages: list[dict[str, Any]] = []
    urls: list[str] = []
    for position, message in enumerate(given):
        where = f"Message {position}"
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            has = "no role" if role is None else f"the role {_short(role)}"
            raise RequestError(f"{where} has {has}. Use one of {', '.join(ROLES)}.")
        parts, found = _content(message.get("content"), where)
        if found and role != "user":
            raise RequestError(f"{where} has an image and the role {role!r}. Send images as the user.")
        if role in ("system", "developer"):
            if position:
                raise RequestError(f"{where} has the role {role!r}. Only the first message can have it.")
            messages.append({"role": "system", "content": "\n".join(part["text"] for part in parts)})
        else:
            messages.append({"role": role, "content": parts})
        urls += found
    if messages[-1]["role"] != "user":
        raise RequestError("The last message is not the user's. End with a question.")
    if len(urls) > limits.max_images:
        raise RequestError(f"There are {len(urls)} images. Send at most {limits.max_images}.")
    texts = [message["content"] for message in messages if isinstance(message["content"], str)]
    texts += [part.get("text", "") for m in messages if isinstance(m["content"], list) for part in m["content"]]
    if (length := sum(map(len, texts))) > limits.max_question_chars:
        raise RequestError(f"The text has {length} characters. Send at most {limits.max_question_chars}.")
    return messages, urls


def _content(content: Any, where: str) -> tuple[list[dict[str, str]], list[str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": _encodable(content, where)}], []
    if not isinstance(content, list) or not content:
        raise RequestError(f"{where} has no content. Send text, or a list of parts of type 'text' or 'image_url'.")
    parts: list[dict[str, str]] = []
    urls: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": _encodable(part["text"], where)})
            continue
        image = part.get("image_url") if kind == "image_url" else None
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str):
            raise RequestError(f"{where} has a part that is neither a text nor an image. See the OpenAI reference.")
        parts.append({"type": "image"})
        urls.append(url)
    return parts, urls


def _encodable(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{where} has a surrogate, which is not a character. Send text in UTF-8.") from error
    return text
