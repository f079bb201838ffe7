"""One sample of any source as a record: messages, images and what is supervised.

The formats are LLaVA's `conversations`, TRL's `messages` and `prompt`/`completion`, and webdataset rows. Files,
tokenizers and models are not handled here.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any, TypedDict, cast

import PIL.Image

IMAGE_MARKER = "<image>"
MARKER_PATTERN = re.compile(r"\n?<image>\n?")
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
WEBDATASET_IMAGES = ("jpg", "jpeg", "png", "webp")


class RecordError(ValueError):
    """A sample that cannot be used. The message continues a sentence that begins with the sample's name."""


class Message(TypedDict):
    """One turn: `role` is "system", "user" or "assistant". Each `<image>` in `content` marks the next image."""

    role: str
    content: str


class Record(TypedDict):
    """A sample: `images` in the order of their markers, each a path, `{"path", "bytes"}` or a PIL image.

    Answers before message number `supervised_from` are context, not targets. Paths are relative to `folder`.
    """

    name: str
    images: list[Any]
    messages: list[Message]
    supervised_from: int
    folder: str | None


def to_record(row: dict[str, Any], name: str = "sample", folder: str | None = None) -> Record:
    """Read one row of any known format.

    Args:
        row: A mapping with `conversations`, `messages`, or `prompt` and `completion`, and with `image` or `images`
            where there are any. A record is returned unchanged.
        name: The sample's name in error messages.
        folder: The folder of its image paths.

    Raises:
        RecordError: The row has no known format, its turns do not alternate, or its `<image>` markers and its images
            differ in number.
    """
    if row.get("supervised_from") is not None:
        return _checked_record(row)
    if isinstance(row.get("json"), dict):  # a webdataset row: an image and its annotation
        archived = {name: row[name] for name in WEBDATASET_IMAGES if row.get(name) is not None}
        without = ("image", "images") if archived else ()  # the annotation names the archive's image by another path
        row = {**row, **{name: value for name, value in row["json"].items() if name not in without}}
    images = _images(row)
    supervised_from = 0
    if row.get("conversations"):
        messages = [_llava_turn(turn) for turn in _list(row, "conversations")]
    elif row.get("messages"):
        messages = [_message(message) for message in _list(row, "messages")]
    elif row.get("prompt") and row.get("completion"):
        prompt = _as_messages(row, "prompt", "user")
        messages = prompt + _as_messages(row, "completion", "assistant")
        supervised_from = len(prompt)
    else:
        raise RecordError(
            f"has no `conversations`, no `messages` and no `prompt` with `completion`; it has {sorted(row)}"
        )
    if messages and messages[0]["role"] == "assistant":  # LLaVA drops such a turn of LLaVA-Mix-665k, too
        messages = messages[1:]
        supervised_from = max(supervised_from - 1, 0)
    _check_turns(messages)
    _check_characters(messages, images)
    _place_markers(messages, len(images))
    return Record(name=name, images=images, messages=messages, supervised_from=supervised_from, folder=folder)


def _checked_record(row: dict[str, Any]) -> Record:
    """A row that is a record already, unchanged."""
    if missing := [field for field in Record.__annotations__ if field not in row]:
        raise RecordError(f"has `supervised_from` but not {', '.join(missing)}")
    if not isinstance(row["supervised_from"], int):
        raise RecordError(f"has {row['supervised_from']!r} as `supervised_from`; it should be a number of messages")
    messages = [_message(message) for message in _list(row, "messages")]
    _check_characters(messages, [_image(image) for image in _list(row, "images")])
    return cast(Record, {field: row[field] for field in Record.__annotations__})


def _check_characters(messages: list[Message], images: list[Any]) -> None:
    paths = [image["path"] if isinstance(image, dict) else image for image in images]
    texts = [message["content"] for message in messages] + [path for path in paths if isinstance(path, str)]
    for text in texts:
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise RecordError(
                    f"has a text with a surrogate, which is not a character: {error.object!r:.80}"
                ) from error


def split_content(content: str) -> list[dict[str, str]]:
    """Split a message into a chat template's parts: `{"type": "image"}` and `{"type": "text", "text": ...}`."""
    parts: list[dict[str, str]] = []
    for i, text in enumerate(MARKER_PATTERN.split(content)):
        if i:
            parts.append({"type": "image"})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def strip_markers(content: str) -> str:
    """The text of a message without its image markers."""
    return " ".join(MARKER_PATTERN.sub(" ", content).split())


def split_turns(record: Record) -> Iterator[Record]:
    """Yield one record per supervised answer: the conversation up to it, with only this answer supervised."""
    n_images = 0
    for i, message in enumerate(record["messages"]):
        n_images += message["content"].count(IMAGE_MARKER)
        if message["role"] == "assistant" and i >= record["supervised_from"]:
            yield Record(
                name=f"{record['name']} turn {i // 2}",
                images=record["images"][:n_images],
                messages=record["messages"][: i + 1],
                supervised_from=i,
                folder=record["folder"],
            )


def sample_key(record: Record) -> int:
    """A number below 2**63 computed from the sample's content. It does not depend on the source or the position."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps([record["messages"], record["supervised_from"]], sort_keys=True).encode())
    for image in record["images"]:
        digest.update(image_identity(image))
    return int.from_bytes(digest.digest(), "little") >> 1


def image_identity(image: Any) -> bytes:
    """The bytes that identify an image: its content where the data holds it, otherwise its path."""
    if isinstance(image, dict):
        return image["bytes"] or (image.get("path") or "").encode()
    return image.encode() if isinstance(image, str) else image.tobytes()


def _images(row: dict[str, Any]) -> list[Any]:
    for field in ("images", "image", *WEBDATASET_IMAGES):
        images = row.get(field)
        if images is not None and len(images if isinstance(images, (list, str)) else [images]):
            return [_image(image) for image in (images if isinstance(images, list) else [images])]
    return []


def _image(image: Any) -> Any:
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    known = isinstance(image, dict) and (isinstance(image.get("bytes"), bytes) or isinstance(image.get("path"), str))
    if not known and not isinstance(image, (str, PIL.Image.Image)):
        raise RecordError(f"has the image {image!r}; an image is a path, bytes or a PIL image")
    return image


def _llava_turn(turn: Any) -> Message:
    if not isinstance(turn, dict) or str(turn.get("from")) not in LLAVA_ROLES or not isinstance(turn.get("value"), str):
        raise RecordError(f"has the turn {turn!r}; a turn is {{'from': 'human' or 'gpt', 'value': text}}")
    return Message(role=LLAVA_ROLES[turn["from"]], content=turn["value"])


def _message(message: Any) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise RecordError(f"has the message {message!r}; its role should be system, user or assistant")
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part) for part in content).removeprefix("\n")
    if not isinstance(content, str):
        raise RecordError(f"has a message whose content is {content!r}; it should be text or a list of parts")
    return Message(role=message["role"], content=content)


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "image":
        return f"\n{IMAGE_MARKER}\n"  # `split_content` removes both line breaks
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    raise RecordError(f"has the part {part!r}; a part is {{'type': 'image'}} or {{'type': 'text', 'text': text}}")


def _as_messages(row: dict[str, Any], field: str, role: str) -> list[Message]:
    if isinstance(row[field], str):
        return [Message(role=role, content=row[field])]
    return [_message(message) for message in _list(row, field)]


def _list(row: dict[str, Any], field: str) -> list[Any]:
    if not isinstance(row[field], list):
        raise RecordError(f"has {row[field]!r} as `{field}`; it should be a list")
    return row[field]


def _check_turns(messages: list[Message]) -> None:
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    for i, message in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise RecordError(f"has a turn of the {message['role']} where one of the {expected} should be (turn {i})")
    if len(turns) < 2 or len(turns) % 2:
        raise RecordError(f"has {len(turns)} turns; it should end with an answer of the assistant")


def _place_markers(messages: list[Message], n_images: int) -> None:
    """Put missing markers before the first question, and the marker of a turn with one image before its text."""
    users = [message for message in messages if message["role"] == "user"]
    if any(IMAGE_MARKER in message["content"] for message in messages if message["role"] != "user"):
        raise RecordError(f"has an {IMAGE_MARKER} marker outside the user's turns")
    n_markers = sum(message["content"].count(IMAGE_MARKER) for message in users)
    if n_markers == 0 and n_images:
        users[0]["content"] = f"{IMAGE_MARKER}\n" * n_images + users[0]["content"]
    elif n_markers != n_images:
        raise RecordError(f"has {n_markers} {IMAGE_MARKER} markers in its turns and {n_images} images")
    for message in users:
        if message["content"].count(IMAGE_MARKER) == 1:
            message["content"] = f"{IMAGE_MARKER}\n" + message["content"].replace(IMAGE_MARKER, "").strip()
