"""Scores of a diffusion model's attention to its prompt, from the inputs of stock diffusers modules.

They are computed from the query that a module computed and from its own key projections, so the module's values and
output need not exist.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb

from .taps import Tap


@dataclass(frozen=True)
class AttentionScores:
    """Scaled products of an attention's queries and keys before the softmax, in float32.

    Attributes:
        text (`torch.FloatTensor` of shape `(n, heads, positions, tokens)`): With keys of the prompt. Padding that the
            denoiser masks has large negative values.
        image (`torch.FloatTensor` of shape `(n, heads, positions, positions)`, *optional*): With keys of the image,
            where positions attend to text and image in one softmax.
    """

    text: torch.Tensor
    image: torch.Tensor | None = None

    def probabilities(self) -> torch.Tensor:
        """The text's part of the softmax, `(n, heads, positions, tokens)`."""
        if self.image is None:
            return self.text.softmax(dim=-1)
        return torch.cat([self.text, self.image], dim=-1).softmax(dim=-1)[..., : self.text.shape[-1]]


def is_joint(attention: Any, query: Tap) -> bool:
    """Whether an attention's positions attend to text and image in one softmax."""
    return getattr(attention, "added_kv_proj_dim", None) is not None or query.after_text


def attention_scores(
    attention: Any,
    query: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> AttentionScores:
    """Scores of cross-attention.

    Args:
        attention: A diffusers `Attention`; its value projection is not needed.
        query (`torch.Tensor` of shape `(n, positions, heads * width)`): The output of `to_q`.
        encoder_hidden_states (`torch.Tensor` of shape `(n, tokens, channels)`): The prompt.
        attention_mask (`torch.Tensor` of shape `(n, 1, tokens)`, *optional*): Added to the scores: large negative
            values for padding, as the denoiser gives them to the module.
    """
    if attention.norm_cross:
        encoder_hidden_states = attention.norm_encoder_hidden_states(encoder_hidden_states)
    key = attention.to_k(encoder_hidden_states)
    query, key = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
    query = query if attention.norm_q is None else attention.norm_q(query)
    key = key if attention.norm_k is None else attention.norm_k(key)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.float() @ key.float().transpose(-1, -2) * attention.scale
        mask = attention.prepare_attention_mask(attention_mask, key.shape[2], len(key), out_dim=4)
        return AttentionScores(scores if mask is None else scores + mask.float())


def joint_scores(
    attention: Any,
    query: torch.Tensor,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    num_text: int,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> AttentionScores:
    """Scores of the image's queries with the keys of text and image.

    Args:
        attention: A diffusers `Attention` with added key projections, or a `FluxAttention`.
        query (`torch.Tensor` of shape `(n, tokens, heads * width)`): The output of `to_q`.
        hidden_states (`torch.Tensor` of shape `(n, tokens, channels)`): Its input: the image's tokens, or those of the
            text and then of the image.
        encoder_hidden_states (`torch.Tensor` of shape `(n, num_text, channels)`, *optional*): The text's tokens where
            `hidden_states` does not have them.
        num_text: Number of the text's tokens.
        rotary: Cosines and sines of FLUX's rotary position embedding, for text and image.
    """

    def by_head(x: torch.Tensor, norm: str) -> torch.Tensor:
        module = getattr(attention, norm, None)
        x = x.unflatten(2, (attention.heads, -1))
        return x if module is None else module(x)

    query, key = by_head(query, "norm_q"), by_head(attention.to_k(hidden_states), "norm_k")
    if encoder_hidden_states is None:
        query = query[:, num_text:]
    else:
        if getattr(attention, "norm_cross", None):
            encoder_hidden_states = attention.norm_encoder_hidden_states(encoder_hidden_states)
        text_key = by_head(attention.add_k_proj(encoder_hidden_states), "norm_added_k")
        only_text = getattr(attention, "only_cross_attention", False)
        key = text_key if only_text else torch.cat([text_key, key], dim=1)
    if rotary is not None:
        key = apply_rotary_emb(key, rotary, sequence_dim=1)
        query = apply_rotary_emb(query, (rotary[0][num_text:], rotary[1][num_text:]), sequence_dim=1)
    with torch.autocast(query.device.type, enabled=False):
        scores = torch.einsum("nqhd,nkhd->nhqk", query.float(), key.float()) / math.sqrt(query.shape[-1])
        text, image = scores[..., :num_text], scores[..., num_text:]
        return AttentionScores(text, image if image.shape[-1] else None)
