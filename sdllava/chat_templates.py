"""Chat templates, and how user turns are found in a rendered prompt."""

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


def chat_template_for(language_template: str | None, image_token: str) -> str:
    """A template that places images: the language model's own after `FLATTEN_IMAGES`, or Vicuna v1.5's.

    Args:
        language_template: The language model's chat template; None where it has none.
        image_token: The placeholder, for example "<image>".
    """
    if language_template is None:
        return VICUNA_V1_5.replace("<image>", image_token)
    if image_token in language_template:
        return language_template
    return FLATTEN_IMAGES.replace("<image>", image_token) + language_template


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
    roles = ["user", "assistant", "user"]
    probes = ["\x01first\x01", "\x01answer\x01", "\x01second\x01"]
    messages = [{"role": role, "content": probe} for role, probe in zip(roles, probes, strict=True)]
    rests = []
    for add_generation_prompt in (False, True):
        try:
            rendered, _ = render_jinja_template(
                [messages], chat_template=template, add_generation_prompt=add_generation_prompt, **dict(special_tokens)
            )
        except (TemplateError, TypeError):
            return None
        pieces, rest = [], rendered[0]
        for probe in probes:
            before, found, rest = rest.partition(probe)
            if not found:
                return None
            pieces.append(before)
        rests.append(rest)
    start = _common_prefix(pieces[0][::-1], pieces[2][::-1])[::-1]
    end = _common_prefix(pieces[1], rests[1])
    without_prompt = _common_prefix(end, rests[0])  # also ends a last turn that no answer follows
    end = without_prompt if without_prompt.strip() else end
    return UserTurnMarkers(start, end) if start.strip() and end.strip() else None


def _common_prefix(first: str, second: str) -> str:
    length = next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )
    return first[:length]
