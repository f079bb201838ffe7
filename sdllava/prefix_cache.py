"""Keys and values of prompts up to the last token that does not depend on the question, for follow-up questions.

With `fusion="concat_tokens"` an image's vision tokens come before its diffusion tokens. Another question about the
image changes only the diffusion tokens and the text that follows, so the keys and values of what precedes are reused.
"""

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable

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

    def continued(self, input_ids: torch.Tensor, vision_features: torch.Tensor, compute: Callable[[], Cache]) -> Cache:
        """A key-value cache that holds a prefix, to be continued by the caller.

        Args:
            input_ids (`torch.LongTensor` of shape `(1, length)`): The prefix.
            vision_features (`torch.FloatTensor` of shape `(1, tokens, channels)`): Of the image at its end.
            compute: Called for a new prefix.
        """
        digest = hashlib.sha256(f"{input_ids.device} {vision_features.dtype}".encode())
        for tensor in (input_ids, vision_features):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        key = digest.hexdigest()
        if key in self._kept:
            self.hits += 1
        else:
            self._kept[key] = compute()
        self._kept.move_to_end(key)
        prefix = copy.deepcopy(self._kept[key])
        while len(self._kept) > self.size:
            self._kept.popitem(last=False)
        return prefix
