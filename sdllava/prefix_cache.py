"""Keys and values of prompts up to the last token that does not depend on the question, for follow-up questions.

With `fusion="concat_tokens"` an image's vision tokens come before its diffusion tokens. Another question about the
image changes only the diffusion tokens and the text that follows, so the keys and values of what precedes are reused.
"""

import copy
import hashlib
from collections import OrderedDict

import torch
from transformers.cache_utils import Cache


class PrefixCache:
    """The key-value caches of the prefixes of the last prompts, for `SDLlavaForConditionalGeneration.generate`.

    Use it with one model, and clear it when the weights change.

    ```python
    >>> prefixes = PrefixCache()
    >>> for question in questions:
    ...     model.generate(**inputs_of(question), image_encodings=encodings, prefix_cache=prefixes)
    ```

    Args:
        size (`int`): The number of prefixes; one takes the memory of its tokens in the language model's cache.
    """

    def __init__(self, size: int = 2):
        self.size = size
        self.hits = 0
        self._kept: OrderedDict[str, Cache] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget every prefix."""
        self._kept.clear()

    def get(self, input_ids: torch.Tensor, vision_features: torch.Tensor) -> Cache | None:
        """A copy of a prefix's key-value cache, for the caller to continue, or None for an unknown prefix.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`): The prefix.
            vision_features (`torch.FloatTensor` of shape `(1, tokens, channels)`): Of the image at its end.
        """
        key = _digest(input_ids, vision_features)
        if key not in self._kept:
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return copy.deepcopy(self._kept[key])

    def put(self, input_ids: torch.Tensor, vision_features: torch.Tensor, computed: Cache) -> None:
        """Keep a copy of a new prefix's key-value cache, in place of the one that was not used for longest.

        Args:
            input_ids, vision_features: As for `get`.
            computed: Of the prefix, without what follows it.
        """
        self._kept[_digest(input_ids, vision_features)] = copy.deepcopy(computed)
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)


def _digest(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.device} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
