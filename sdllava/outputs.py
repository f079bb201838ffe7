"""What the model returns, and the image features that are cached between questions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput


@dataclass
class SDLlavaImageEncodings(ModelOutput):
    """What does not depend on the question, one row per image; pass it back as `image_encodings`.

    Args:
        latents (`torch.FloatTensor` of shape `(n, channels, h, w)`): z0, float32.
        vision_features (`torch.FloatTensor` of shape `(n, tokens, channels)`): The vision encoder's selected layer.
        image_embeds (`torch.FloatTensor` of shape `(n, channels)`): Its global feature, for the implicit captioner.
        unconditional_features (`torch.FloatTensor` of shape `(n, grid_size ** 2, channels)`): The diffusion features
            of the empty prompt with the configuration's noise, where a guidance scale needs them.
        conditional_features (`torch.FloatTensor` of shape `(n, grid_size ** 2, channels)`): The same for one question
            per image, where a feature cache holds them.
    """

    latents: torch.Tensor | None = None
    vision_features: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    unconditional_features: torch.Tensor | None = None
    conditional_features: torch.Tensor | None = None

    def rows(self) -> list["SDLlavaImageEncodings"]:
        """One encoding per image."""
        length = len(next(iter(self.values())))
        return [type(self)(**{name: x[i : i + 1] for name, x in self.items()}) for i in range(length)]

    def to(self, *args: Any, **kwargs: Any) -> "SDLlavaImageEncodings":
        """All tensors moved or cast, as `torch.Tensor.to`."""
        return type(self)(**{name: x.to(*args, **kwargs) for name, x in self.items()})

    @classmethod
    def cat(cls, encodings: Sequence["SDLlavaImageEncodings"]) -> "SDLlavaImageEncodings":
        """Several encodings as one, in order."""
        return cls(**{name: torch.cat([e[name] for e in encodings]) for name in encodings[0]})


@dataclass
class SDLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Adds `image_hidden_states` (`torch.FloatTensor` of shape `(image tokens, hidden_size)`): Projected features."""

    image_hidden_states: torch.Tensor | None = None


@dataclass
class SDLlavaCausalLMOutputWithPast(ModelOutput):
    """The language-modelling output.

    Args:
        loss (`torch.FloatTensor` of shape `()`): Next-token loss over labels other than -100.
        logits (`torch.FloatTensor` of shape `(batch, sequence, vocab_size)`): Scores before softmax.
        past_key_values, hidden_states, attentions: The language model's.
        image_hidden_states (`torch.FloatTensor` of shape `(image tokens, hidden_size)`): Projected features.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
