"""Configurations and tokenizers of the text encoders of published diffusion models, and whether they fit together."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTokenizer, PreTrainedTokenizerBase, T5Config

from .prompts import prompt_length
from .repositories import MissingFileError, find_file


def _require(where: dict[str, Any], *names: str) -> None:
    source, revision = where["pretrained_model_name_or_path"], where.get("revision")
    for name in names:  # transformers reads other files in their place, or defaults
        if find_file(source, name, {"revision": revision}) is None:
            raise MissingFileError(f"{name} is missing")


def read_clip(where: dict[str, Any], number: str = "") -> tuple[CLIPTextConfig, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of a CLIP text encoder.

    Args:
        where: From `split_revision`.
        number: End of the names of both folders, for example `"_2"`.

    Raises:
        OSError: They cannot be read.
    """
    _require(where, f"text_encoder{number}/config.json", f"tokenizer{number}/tokenizer_config.json")
    config = CLIPTextConfig.from_pretrained(subfolder=f"text_encoder{number}", **where)
    return config, CLIPTokenizer.from_pretrained(subfolder=f"tokenizer{number}", **where)


def read_t5(
    where: dict[str, Any], number: str, length: int, lower_case: bool = False
) -> tuple[T5Config, PreTrainedTokenizerBase]:
    """The configuration and the tokenizer of a T5 encoder.

    Args:
        where: From `split_revision`.
        number: End of the names of both folders, for example `"_3"`.
        length: Tokens to which the published pipeline pads prompts.
        lower_case: Whether it makes prompts lower case.

    Raises:
        OSError: They cannot be read.
    """
    _require(where, f"text_encoder{number}/config.json", f"tokenizer{number}/tokenizer_config.json")
    config = T5Config.from_pretrained(subfolder=f"text_encoder{number}", **where)
    options = {"model_max_length": length, "lower_case_prompts": lower_case, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(subfolder=f"tokenizer{number}", **options, **where)
    return config, tokenizer


def empty_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The empty prompt, padded as prompts are."""
    options = {"padding": "max_length", "max_length": prompt_length(tokenizer), "truncation": True}
    return tokenizer("", **options)["input_ids"]


def attention_mask(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """Which tokens of T5's prompts are not padding at the end, `(n, tokens)`; "<pad>" written in a prompt is text."""
    is_text = input_ids != config.pad_token_id
    return is_text.flip(1).cummax(1).values.flip(1).long()


def check_vocabularies(tokenizers: Sequence[PreTrainedTokenizerBase], encoders: Sequence[Any]) -> None:
    """Check that text encoders have an embedding for each token.

    Raises:
        ValueError: A tokenizer has more tokens than its encoder.
    """
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        if len(tokenizer) > encoder.vocab_size:
            raise ValueError(
                f"The diffusion tokenizer has {len(tokenizer)} tokens, its text encoder only {encoder.vocab_size}. "
                "Use the parts of one repository."
            )


def check_width(denoiser: str, expected: int, given: int, what: str = "prompts") -> None:
    """Check that text encoders make what a denoiser reads.

    Raises:
        ValueError: The widths differ.
    """
    if expected != given:
        raise ValueError(
            f"The {denoiser} is conditioned on {what} of width {expected}, but the text encoders give {given}. Use the "
            "parts of one repository."
        )


def check_channels(expected: int, vae: dict[str, Any]) -> None:
    """Check that a VAE makes the latents that a transformer reads.

    Raises:
        ValueError: The numbers of channels differ.
    """
    if expected != vae["latent_channels"]:
        raise ValueError(
            f"The transformer takes {expected} channels but the VAE gives {vae['latent_channels']}. Use the parts of "
            "one repository."
        )
