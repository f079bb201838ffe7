"""Text for a diffusion model's tokenizers: how long prompts are, and how the published pipeline cleans them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

CLIP_LENGTH = 77
_LONGEST = 512


def prompt_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of tokens to which a tokenizer's prompts are padded: its own maximum, or CLIP's where it has none."""
    length = tokenizer.model_max_length
    return length if length <= _LONGEST else CLIP_LENGTH


def clean_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Prompts as the published pipeline gives them to a tokenizer: in lower case where it is set so."""
    if not tokenizer.init_kwargs.get("lower_case_prompts"):
        return list(prompts)
    return [prompt.lower().strip() for prompt in prompts]
