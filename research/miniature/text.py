"""The scenes' vocabulary, and two tokenizers: one for CLIP and Stable Diffusion, one for the Llama."""

import itertools
import re
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from sdllava.atomic_files import write_json, write_text
from sdllava.scenes.world import CELLS, COLOURS, DIRECTIONS, LETTERS, SHAPES, STATES, VIEWPOINTS

MAX_LENGTH = 77
_FUNCTION_WORDS = (
    "a an the is are does do have has with at on in of or and to from there where which what way how many "
    "object objects border marked letter shape colour color point points pointing seen scene yes no 0 1 2 3 4 "
    "image picture this that it left right describe user assistant question answer"
)
WORDS = tuple(
    sorted(
        {*COLOURS, *SHAPES, *(f"{s}s" for s in SHAPES), *DIRECTIONS, *STATES, *LETTERS, *VIEWPOINTS}
        | {word for cell in CELLS for word in cell.split()}
        | set(_FUNCTION_WORDS.split())
    )
)
PUNCTUATION = (",", ".", "?", ":")
START, END = "<|startoftext|>", "<|endoftext|>"

# The generation block begins with the answer's first letter: TRL's mask would be empty if a character without a token
# stood there.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ 'ASSISTANT: ' }}{% generation %}"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.role.upper() + ': ' }}"
    "{% if message.content is string %}{{ message.content + ' ' }}{% else %}"
    "{% for part in message.content %}{{ '<image>\n' if part.type == 'image' else part.text + ' ' }}{% endfor %}"
    "{% endif %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def words_in(text: str) -> list[str]:
    """Lower-case words and punctuation marks, as both tokenizers split them."""
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def llm_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template like Vicuna's that marks the assistant's tokens for TRL."""
    specials = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    vocabulary = {word: number for number, word in enumerate([*specials, *PUNCTUATION, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _byte_symbols() -> list[str]:
    """One printable symbol per byte, in the order of GPT-2's and CLIP's vocabularies. "!" has id 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(others))]


def _split_by(merges: list[tuple[str, str]], word: str) -> list[str]:
    """The pieces of a word under byte-pair encoding."""
    rank = {pair: number for number, pair in enumerate(merges)}
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while len(pieces) > 1:
        pairs = list(itertools.pairwise(pieces))
        best = min(pairs, key=lambda pair: rank.get(pair, len(merges)))
        if best not in rank:
            break
        at = pairs.index(best)
        pieces[at : at + 2] = ["".join(best)]
    return pieces


def write_clip_tokenizer(folder: str | Path, pad_token: str) -> None:
    """Write a tokenizer in CLIP's layout, in which every word of the vocabulary is one token.

    Args:
        folder: The folder of `vocab.json`, `merges.txt` and the configuration. It is created where it is missing.
        pad_token: "!" (id 0) for Stable Diffusion 2, the end token for CLIP.
    """
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        while len(pieces := _split_by(merges, word)) > 1:
            merges.append((pieces[0], pieces[1]))
    symbols = _byte_symbols()
    vocabulary = [*symbols, *(f"{s}</w>" for s in symbols), *dict.fromkeys("".join(m) for m in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **special}
    folder = Path(folder)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(vocabulary)})
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)


def clip_tokenizer(folder: str | Path, pad_token: str = END) -> CLIPTokenizer:
    """Write the tokenizer of [`write_clip_tokenizer`] to a folder and load it."""
    write_clip_tokenizer(folder, pad_token)
    return CLIPTokenizer.from_pretrained(folder)
