"""Chat templates, and how user turns are found in a rendered prompt."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

VICUNA_V1_5 = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}"
    "{%- set system = 'A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' -%}"
    "{%- endif -%}"
    "{%- macro render(content) -%}"
    "{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{ render(system) + ' ' }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' + render(message['content']) + ' ' }}"
    "{%- else -%}{{ 'ASSISTANT:' }}{%- generation -%}{{ ' ' + render(message['content']) + eos_token }}"
    "{%- endgeneration -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}"
)
"""Vicuna v1.5's conversation as LLaVA-1.5 uses it, with generation markers around each answer and its end token."""

FLATTEN_IMAGES = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- set text.value = text.value + ('<image>\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages -%}"
)
"""Prepended to a text-only model's template: writes each image of a message as the image token."""


GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag that marks the beginning of an answer in a template."""

MARK_ANSWERS = (
    "{%- set pieces = rendered.split(HEADER) -%}{{- pieces[0] -}}"
    "{%- for piece in pieces[1:] -%}{{- HEADER -}}{%- set parts = piece.split(END, 1) -%}"
    "{%- if parts|length == 2 -%}"
    "{%- generation -%}{{- parts[0] + END -}}{%- endgeneration -%}{{- parts[1] -}}"
    "{%- else -%}{{- piece -}}{%- endif -%}{%- endfor -%}"
)
"""Writes the text in `rendered` with generation markers between each header of an answer and the next end token."""


def chat_template_for(
    language_template: str | None, image_token: str, special_tokens: Mapping[str, Any], source: str
) -> str:
    """A template that places images and marks answers: the language model's own, or Vicuna v1.5's.

    Args:
        language_template: The language model's chat template; None where it has none.
        image_token: The placeholder, for example "<image>".
        special_tokens: Of the tokenizer, such as `bos_token`.
        source: The language model, for the message.

    Raises:
        ValueError: The template has no generation markers, and where answers begin and end cannot be found.
    """
    if language_template is None:
        return VICUNA_V1_5.replace("<image>", image_token)
    try:
        marked = mark_answers(language_template, special_tokens)
    except ValueError as error:
        raise ValueError(
            f"The chat template of {source!r} cannot be used: {error} Copy the model to a folder, write "
            "{% generation %} before each answer and {% endgeneration %} after its end token, in its "
            "chat_template.jinja or the field chat_template of tokenizer_config.json, and use the folder."
        ) from error
    return marked if image_token in language_template else FLATTEN_IMAGES.replace("<image>", image_token) + marked


def mark_answers(template: str, special_tokens: Mapping[str, Any]) -> str:
    """A template that renders the same text and marks each answer with its end token, for the loss.

    The text before and after an answer is found by rendering a conversation. The returned template renders the original
    one, and splits its text there.

    Args:
        template: With generation markers it is returned as it is.
        special_tokens: Of the tokenizer, such as `bos_token`.

    Raises:
        ValueError: The template cannot be rendered, or no text before or after the answers is common to them.
    """
    if GENERATION.search(template):
        return template
    messages = [{"role": role, "content": f"\x01{i}\x01"} for i, role in enumerate(["user", "assistant"] * 2)]
    full, question = (_render(template, messages[:count], special_tokens, count == 1) for count in (4, 1))
    pieces = re.split("\x01[0-3]\x01", full)
    if len(pieces) != 5 or question.count("\x010\x01") != 1:
        raise ValueError("It does not write each message once.")
    prompt = question.partition("\x010\x01")[2]
    header = _common_prefix(_common_prefix(pieces[1], pieces[3]), prompt)
    end = _common_prefix(pieces[2], pieces[4])
    eos = str(special_tokens.get("eos_token") or "")
    if eos and eos in end:
        end = end[: end.index(eos) + len(eos)]
    elif first_word := re.match(
        r"\s*(\S*>|\S+)", end
    ):  # "<|end|>" of "<|end|>\n<", which <|user|> and a last turn share
        end = first_word.group()
    if not header.strip() or not end.strip():
        what = "before" if not header.strip() else "after"
        raise ValueError(f"It writes no text {what} answers that marks them.")
    names = {"HEADER": _jinja_string(header), "END": _jinja_string(end)}
    marking = re.sub("HEADER|END", lambda match: names[match.group()], MARK_ANSWERS)
    marked = "{% set rendered %}" + template + "{% endset %}" + marking
    for count in (4, 3, 2):
        if _render(marked, messages[:count], special_tokens, count == 3) != _render(
            template, messages[:count], special_tokens, count == 3
        ):
            raise ValueError("Its text changes when answers are marked.")
    return marked


def training_template(template: str, image_token: str, special_tokens: Mapping[str, Any]) -> str:
    """The template with which a LLaVA is trained: its own if its answers can be marked up to their end, else Vicuna's.

    Args:
        template: The LLaVA's. That of llava-hf's checkpoints writes no end token.
        image_token: The placeholder, for example "<image>".
        special_tokens: Of the tokenizer, such as `bos_token`.
    """
    try:
        marked = mark_answers(template, special_tokens)
        if _marks_the_end(marked, special_tokens):
            return marked
    except ValueError:
        pass  # neither text nor parts of a message can be rendered
    return VICUNA_V1_5.replace("<image>", image_token)


def _marks_the_end(template: str, special_tokens: Mapping[str, Any]) -> bool:
    """Whether the marked text of an answer has more after the answer, such as an end token."""
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\x010\x01"}]}
    messages = [question, {"role": "assistant", "content": "\x011\x01"}]
    try:
        rendered, spans = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **special_tokens
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"It cannot be rendered ({error}).") from error
    answers = [rendered[0][start:end] for start, end in spans[0]]
    return any("\x011\x01" in answer and answer.rpartition("\x01")[2].strip() for answer in answers)


def _jinja_string(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"


def _render(template: str, messages: list[dict], special_tokens: Mapping[str, Any], add_prompt: bool) -> str:
    try:
        rendered, _ = render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=add_prompt, **special_tokens
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"It cannot be rendered ({error}).") from error
    return rendered[0]


@dataclass(frozen=True)
class UserTurnMarkers:
    """The strings that a template writes before and after each user turn."""

    start: str
    end: str


def user_turn_markers(processor: Any) -> UserTurnMarkers | None:
    """How a processor's chat template frames user turns, found by rendering a probe; None where it cannot be found.

    Args:
        processor: With `chat_template` and `tokenizer`.
    """
    template = processor.chat_template
    if not isinstance(template, str):
        return None
    return _markers(template, tuple(sorted(processor.tokenizer.special_tokens_map.items())))


@lru_cache(maxsize=16)
def _markers(template: str, special_tokens: tuple[tuple[str, Any], ...]) -> UserTurnMarkers | None:
    tokens = dict(special_tokens)
    probed = next((found for as_blocks in (False, True) if (found := _probe(template, tokens, as_blocks))), None)
    if probed is None:
        return None
    before, after, last, last_with_prompt = probed
    start = before[0]
    for text in before[1:]:
        common = _common_prefix(start[::-1], text[::-1])[::-1]
        start = common if common.strip() else start  # Gemma 3 writes the system message into the turn
    end = _common_prefix(after, last_with_prompt)
    without_prompt = _common_prefix(end, last)  # also ends a last turn that no answer follows
    end = (without_prompt if without_prompt.strip() else end).lstrip()  # an image may precede it without a space
    return UserTurnMarkers(start, end) if start.strip() and end else None


def _probe(template: str, special_tokens: Mapping[str, Any], as_blocks: bool) -> tuple[list[str], str, str, str] | None:
    """What a template writes before user turns, after one, and after the last one without and with an answer's prompt.

    None where it does not write the messages.

    Args:
        template: The template.
        special_tokens: Of the tokenizer.
        as_blocks: Whether contents are lists of blocks. llava-hf's templates write nothing for a text.
    """
    probes = {"user": "\x01first\x01", "assistant": "\x01answer\x01", "last": "\x01second\x01"}

    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if as_blocks else text}

    turns = [message("last" if name == "last" else name, text) for name, text in probes.items()]
    turns[-1]["role"] = "user"
    found = []
    for messages, add_prompt in ((turns, False), (turns, True), ([message("system", "\x01s\x01"), *turns], False)):
        try:
            rest = _render(template, messages, special_tokens, add_prompt)
        except ValueError:
            if messages is turns:
                return None
            continue  # the template has no system messages
        pieces = re.split("|".join(probes.values()), rest)
        if len(pieces) != len(probes) + 1:
            return None
        found.append(pieces)
    before = [pieces[position] for pieces in found for position in (0, 2)]
    return before, found[0][1], found[0][3], found[1][3]


def _common_prefix(first: str, second: str) -> str:
    length = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return first[:length]
