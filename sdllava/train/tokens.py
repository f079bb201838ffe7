"""Tokenizing a conversation, with the loss only on answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..chat_templates import GENERATION
from ..data.records import Message, Record, RecordError, split_content

if TYPE_CHECKING:
    from ..processors import SDLlavaProcessor

IGNORED = -100
"""The label of tokens without a loss."""

LLAVA_PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'image' -%}<image>{%- endif -%}{%- endfor -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- generation -%}{{ message['content'] + '\\n' + eos_token }}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""LLaVA's template of stage 1: image tokens, caption, line break; with the end token added, so that the model stops."""


@dataclass(frozen=True)
class Tokens:
    """Token ids of a conversation, and labels: equal to the ids where they are supervised, else -100."""

    input_ids: list[int]
    labels: list[int]


def tokenize_record(
    processor: "SDLlavaProcessor", record: Record, template: str | None = None, max_length: int | None = None
) -> Tokens:
    """Render a record with its chat template, expand its image tokens, and label its answers.

    Args:
        processor: The processor, whose tokenizer and chat template are used.
        record: The conversation.
        template: A chat template that replaces the processor's, with `{% generation %}` markers around the answers.
        max_length: Number of tokens to keep. Image placeholders are not cut off.

    Raises:
        RecordError: The image placeholders do not fit into `max_length`, or no token is supervised.
        ValueError: The template has no generation markers.
    """
    chosen: Any = template or processor.chat_template
    if not GENERATION.search(chosen):
        raise ValueError(
            "The chat template does not mark answers with {% generation %} and {% endgeneration %}, so the loss cannot "
            "be restricted to answers. Give one that does (chat_template_path)."
        )
    conversation = [_chat_message(message) for message in record["messages"]]
    tokenizer: Any = processor.tokenizer
    image = processor.image_token
    rendered, spans = render_jinja_template(
        [conversation],
        chat_template=chosen,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    text, growth = rendered[0], (processor.num_image_tokens - 1) * len(image)
    if text.count(image) != len(record["images"]):
        raise RecordError(f"has {len(record['images'])} images, but its template writes {text.count(image)} {image}")
    first = sum(message["role"] == "assistant" for message in record["messages"][: record["supervised_from"]])
    answers = [[p + growth * text.count(image, 0, p) for p in span] for span in spans[0][first:]]
    has_start = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    encoding = tokenizer(
        text.replace(image, image * processor.num_image_tokens),
        add_special_tokens=not has_start,
        return_offsets_mapping=True,
    )
    ids = encoding["input_ids"]
    labels = _labels(ids, encoding["offset_mapping"], answers)
    if all(label == IGNORED for label in labels):
        raise RecordError(
            f"has no supervised token among its {len(ids)}: its chat template writes no answer between its generation "
            "markers. It gets answers as text, not as lists of parts; give another one (chat_template_path)"
        )
    if max_length is not None and len(ids) > max_length:
        end = len(ids) - ids[::-1].index(processor.image_token_id) if processor.image_token_id in ids else 0
        if end > max_length:
            raise RecordError(f"has image placeholders up to token {end}, beyond max_length={max_length}")
        ids, labels = ids[:max_length], labels[:max_length]
    if all(label == IGNORED for label in labels):
        raise RecordError(f"has no supervised token among its first {len(ids)}: max_length={max_length} is too short")
    return Tokens(ids, labels)


def max_tokens_before_supervision(processor: "SDLlavaProcessor", record: Record, fixed: int) -> int:
    """An upper bound of the tokens before a record's first supervised token, without running the tokenizer.

    Args:
        processor: Of the run.
        record: The record.
        fixed: An upper bound of the chat template's own tokens before the messages.
    """
    before = record["messages"][: max(record["supervised_from"], 2) + 1]
    text = sum(len(message["content"].encode()) + 64 for message in before)
    return fixed + text + len(record["images"]) * processor.num_image_tokens


def approximate_length(processor: "SDLlavaProcessor", row: Mapping[str, Any]) -> int:
    """The approximate number of tokens of a row, at four characters per token, without running the tokenizer."""
    text = sum(len(message["content"]) for message in row["messages"])
    return text // 4 + len(row["images"]) * processor.num_image_tokens


def _chat_message(message: Message) -> dict[str, Any]:
    content = message["content"]
    return {"role": message["role"], "content": split_content(content) if message["role"] == "user" else content}


def _labels(ids: list[int], offsets: list[tuple[int, int]], answers: list[list[int]]) -> list[int]:
    labels, current = [IGNORED] * len(ids), 0
    for i, (start, end) in enumerate(offsets):
        while current < len(answers) and answers[current][1] <= start:
            current += 1
        if current < len(answers) and start < end and end > answers[current][0]:
            labels[i] = ids[i]
    return labels
