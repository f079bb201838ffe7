"""Maps of a diffusion model's attention to its prompt, read by hooks on stock diffusers modules.

The probabilities are computed from the query that the module computed and from its own key projections. Nothing is
replaced, and the hooks are removed when the capture ends.
"""

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn
from torch.utils.hooks import RemovableHandle

from .taps import Tap, canonical_tap_name
from .unet_pass import removed_at_exit

_SUFFIX = re.compile("-(Cross|Joint)-Q")


class AttentionMaps(Mapping):
    """Attention of image positions to prompt tokens, by layer and timestep: of one call, one row per image.

    `maps[layer, timestep]` is a `torch.FloatTensor` of shape `(n, heads, tokens, height, width)` on the CPU, with the
    layer's own height and width; `heads` is 1 where heads were averaged. Over tokens it sums to one in
    cross-attention. Where positions attend to text and image in one softmax (Stable Diffusion 3, FLUX, DeepFloyd IF),
    it sums to the share of the text.

    Attributes:
        layers (`list[str]`): Transformer blocks whose maps are kept, e.g. `U-L1-R1-B0`, in the order in which they ran.
        prompt_ids (`list[torch.LongTensor]` of shapes `(n, tokens)`): The prompts of the call, as each tokenizer gives
            them whose tokens are attended to, in the order of `tokens`.
    """

    def __init__(self, layers: Sequence[str]):
        self.layers = list(layers)
        self.prompt_ids: list[torch.Tensor] = []
        self._maps: dict[tuple[str, int], torch.Tensor] = {}

    def set_call(self, prompt_ids: list[torch.Tensor], maps: dict[tuple[str, int], torch.Tensor]) -> None:
        """Replace the maps by those of another call."""
        self.prompt_ids, self._maps = prompt_ids, maps

    def __getitem__(self, key: tuple[str, int]) -> torch.Tensor:
        return self._maps[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    @property
    def timesteps(self) -> list[int]:
        """The noise levels of the call."""
        return list(dict.fromkeys(timestep for _, timestep in self._maps))

    @property
    def resolutions(self) -> list[int]:
        """Heights (and widths) of the layers' maps, smallest first."""
        return sorted({probabilities.shape[-1] for probabilities in self._maps.values()})

    def average(
        self,
        resolution: int | None = None,
        layers: Sequence[str] | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """The mean over heads, layers and timesteps at one resolution; S3, Figure 4, has it at 16.

        Args:
            resolution: Only layers whose maps have this height; not needed where all have the same.
            layers, timesteps: Only these. Default: all.

        Returns:
            `torch.FloatTensor` of shape `(n, tokens, resolution, resolution)`.
        """
        if not self._maps:
            raise ValueError("No attention was captured. Call the model with a question inside the context.")
        chosen = {
            key: value.mean(dim=1)
            for key, value in self._maps.items()
            if (layers is None or key[0] in layers) and (timesteps is None or key[1] in timesteps)
        }
        sizes = sorted({value.shape[-1] for value in chosen.values()})
        if resolution is None and len(sizes) == 1:
            resolution = sizes[0]
        if resolution not in sizes:
            raise ValueError(f"No captured layer has the resolution {resolution!r}. Use one of {sizes}.")
        return torch.stack([value for value in chosen.values() if value.shape[-1] == resolution]).mean(dim=0)


def attention_layers(known: Sequence[Tap], read: Sequence[Tap]) -> dict[str, Tap]:
    """The transformer blocks whose attention to the prompt runs up to the last tap that is read, in order.

    Args:
        known: Every tap of the denoiser, in the order of its forward pass.
        read: The taps that are read.

    Returns:
        `dict[str, Tap]`: Names such as `U-L1-R1-B0`, and the taps of their queries.
    """
    last = max(known.index(tap) for tap in read)
    return {_SUFFIX.sub("", tap.name): tap for tap in known[: last + 1] if _SUFFIX.search(tap.name)}


def choose_layers(layers: dict[str, Tap], names: Sequence[str] | None) -> dict[str, Tap]:
    """Those of `layers` that are named, in short or long form; all of them where `names` is None.

    Raises:
        ValueError: A name is not one of them. The message names the nearest.
    """
    if names is None:
        return layers
    chosen = {}
    for name in names:
        short = _SUFFIX.sub("", canonical_tap_name(name))
        if short not in layers:
            nearest = ", ".join(difflib.get_close_matches(short, layers, n=3, cutoff=0.0)) or "none"
            raise ValueError(
                f"No attention {name!r} to the prompt runs up to this tower's last tap. The nearest that do are "
                f"{nearest}; to reach further, load the tower with a later tap and truncate=False."
            )
        chosen[short] = layers[short]
    return chosen


class AttentionCapture:
    """Keeps the probabilities of a denoiser's attention to its prompt.

    Maps are reduced at once: only the given prompt's half of a guided pass is kept, averaged over heads. The tower
    calls `begin`, sets `timestep`, and calls `end`.

    Args:
        denoiser: The module that runs.
        layers: Names of transformer blocks and the taps of their queries, from `attention_layers`.
        per_head: Keep the heads apart.

    Attributes:
        maps (`AttentionMaps`): Of the last call with a prompt.
        timestep (`int`): Of the pass in progress.

    Raises:
        RuntimeError: A layer is compiled.
    """

    def __init__(self, denoiser: nn.Module, layers: dict[str, Tap], per_head: bool = False):
        _require_uncompiled(denoiser, layers)
        self.maps = AttentionMaps(list(layers))
        self.timestep = 0
        self._denoiser, self._layers, self._per_head = denoiser, layers, per_head
        self._rows = 0
        self._inputs: dict[str, dict[str, Any]] = {}
        self._running: dict[tuple[str, int], torch.Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside the context, passes of the denoiser are captured."""
        handles: list[RemovableHandle] = []
        with removed_at_exit(handles):
            for name, tap in self._layers.items():
                attention: Any = self._denoiser.get_submodule(tap.module_path.removesuffix(".to_q"))
                handles.append(attention.register_forward_pre_hook(self._note_inputs(name), with_kwargs=True))
                handles.append(attention.to_q.register_forward_hook(self._keep(name, attention, tap)))
            yield

    def begin(self, rows: int) -> None:
        """Start a call about that many images."""
        self._rows, self._running = rows, {}

    def end(self, prompt_ids: list[torch.Tensor], has_prompt: bool) -> None:
        """Finish a call. One without a prompt leaves the maps of the call before.

        Args:
            prompt_ids: See `AttentionMaps`.
            has_prompt: Whether the denoiser ran with a given prompt.
        """
        if has_prompt:
            self.maps.set_call(prompt_ids, self._running)
        self._running = {}

    def _note_inputs(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._inputs[name] = kwargs

        return hook

    def _keep(self, name: str, attention: nn.Module, tap: Tap) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, query: torch.Tensor) -> None:
            # the given prompt's half comes last: after the empty prompt's in one batch, or in a pass of its own
            chosen = slice(-self._rows, None)
            inputs = self._inputs.pop(name)
            text: Any = inputs.get("encoder_hidden_states")
            mask = inputs.get("attention_mask")
            text = None if text is None else text[chosen]
            if getattr(attention, "added_kv_proj_dim", None) is not None or tap.after_text:
                num_text = query.shape[1] - tap.height * tap.width if text is None else text.shape[1]
                rotary = inputs.get("image_rotary_emb")
                probabilities = joint_probabilities(attention, query[chosen], args[0][chosen], text, num_text, rotary)
            else:
                mask = None if mask is None else mask[chosen]
                probabilities = attention_probabilities(attention, query[chosen], text, mask)
            if not self._per_head:
                probabilities = probabilities.mean(dim=1, keepdim=True)
            side = math.isqrt(probabilities.shape[2])
            maps = probabilities.transpose(2, 3).unflatten(3, (side, side))
            self._running[name, self.timestep] = maps.cpu()

        return hook


def _require_uncompiled(denoiser: nn.Module, layers: dict[str, Tap]) -> None:
    compiled = [path for path, module in denoiser.named_modules() if module._compiled_call_impl is not None]
    for layer, tap in layers.items():
        if any(f"{tap.module_path}.".startswith(f"{outer}." if outer else "") for outer in compiled):
            raise RuntimeError(
                f"{layer!r} cannot be captured, because compiled code calls no hooks. Capture before compiling, or "
                "choose layers that are not compiled."
            )


def attention_probabilities(
    attention: Any,
    query: torch.Tensor,
    encoder_hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax of scaled products of queries and keys, in float32.

    Args:
        attention: A diffusers `Attention`; its value projection is not needed.
        query (`torch.Tensor` of shape `(n, positions, heads * width)`): The output of `to_q`.
        encoder_hidden_states (`torch.Tensor` of shape `(n, tokens, channels)`): The prompt.
        attention_mask (`torch.Tensor` of shape `(n, 1, tokens)`, *optional*): Added to the scores: large negative
            values for padding, as the denoiser gives them to the module.

    Returns:
        `torch.FloatTensor` of shape `(n, heads, positions, tokens)`.
    """
    if attention.norm_cross:
        encoder_hidden_states = attention.norm_encoder_hidden_states(encoder_hidden_states)
    key = attention.to_k(encoder_hidden_states)
    query, key = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in (query, key))
    query = query if attention.norm_q is None else attention.norm_q(query)
    key = key if attention.norm_k is None else attention.norm_k(key)
    with torch.autocast(query.device.type, enabled=False):
        mask = attention.prepare_attention_mask(attention_mask, key.shape[2], len(key))
        mask = None if mask is None else mask.float()
        scores = attention.get_attention_scores(query.flatten(0, 1).float(), key.flatten(0, 1).float(), mask)
    return scores.unflatten(0, (len(query), attention.heads))


def joint_probabilities(
    attention: Any,
    query: torch.Tensor,
    hidden_states: torch.Tensor,
    encoder_hidden_states: torch.Tensor | None,
    num_text: int,
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The text's part of one softmax over the keys of text and image, for the queries of the image, in float32.

    Args:
        attention: A diffusers `Attention` with added key projections, or a `FluxAttention`.
        query (`torch.Tensor` of shape `(n, tokens, heads * width)`): The output of `to_q`.
        hidden_states (`torch.Tensor` of shape `(n, tokens, channels)`): Its input: the image's tokens, or those of the
            text and then of the image.
        encoder_hidden_states (`torch.Tensor` of shape `(n, num_text, channels)`, *optional*): The text's tokens where
            `hidden_states` does not have them.
        num_text: Number of the text's tokens.
        rotary: Cosines and sines of FLUX's rotary position embedding, for text and image.

    Returns:
        `torch.FloatTensor` of shape `(n, heads, positions, num_text)`.
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
        return scores.softmax(dim=-1)[..., :num_text]
