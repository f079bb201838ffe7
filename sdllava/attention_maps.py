"""Cross-attention maps of a diffusion model, read by hooks on stock diffusers modules.

The probabilities are computed from the query that the module computed and from its own key projection, with
`Attention.get_attention_scores`, so the module's scale and upcasting hold. Nothing is replaced, and the hooks are
removed when the capture ends.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .taps import Tap, canonical_tap_name
from .unet_pass import removed_at_exit

_SUFFIX = "-Cross-Q"


class AttentionMaps(Mapping):
    """Cross-attention of image positions over prompt tokens, by layer and timestep: of one call, one row per image.

    `maps[layer, timestep]` is a `torch.FloatTensor` of shape `(n, heads, tokens, height, width)` on the CPU, with the
    layer's own height and width; `heads` is 1 where heads were averaged. Over tokens it sums to one.

    Attributes:
        layers (`list[str]`): Transformer blocks whose maps are kept, e.g. `U-L1-R1-B0`, in the order in which they ran.
        input_ids (`torch.LongTensor` of shape `(n, 77)`, *optional*): The prompts of the call.
    """

    def __init__(self, layers: Sequence[str]):
        self.layers = list(layers)
        self.input_ids: torch.Tensor | None = None
        self._maps: dict[tuple[str, int], torch.Tensor] = {}

    def set_call(self, input_ids: torch.Tensor | None, maps: dict[tuple[str, int], torch.Tensor]) -> None:
        """Replace the maps by those of another call."""
        self.input_ids, self._maps = input_ids, maps

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
            `torch.FloatTensor` of shape `(n, tokens, resolution, resolution)`, summing to one over tokens.
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


def attention_layers(known: Sequence[Tap], read: Sequence[Tap]) -> dict[str, str]:
    """The transformer blocks whose cross-attention runs up to the last tap that is read, in order.

    Args:
        known: Every tap of the denoiser, in the order of its forward pass.
        read: The taps that are read.

    Returns:
        `dict[str, str]`: Names such as `U-L1-R1-B0`, and the paths of their `attn2` modules.
    """
    last = max(known.index(tap) for tap in read)
    return {
        tap.name.removesuffix(_SUFFIX): tap.module_path.removesuffix(".to_q")
        for tap in known[: last + 1]
        if tap.name.endswith(_SUFFIX)
    }


def choose_layers(layers: dict[str, str], names: Sequence[str] | None) -> dict[str, str]:
    """Those of `layers` that are named, in short or long form; all of them where `names` is None.

    Raises:
        ValueError: A name is not one of them. The message names the nearest.
    """
    if names is None:
        return layers
    chosen = {}
    for name in names:
        short = canonical_tap_name(name).removesuffix(_SUFFIX)
        if short not in layers:
            nearest = ", ".join(difflib.get_close_matches(short, layers, n=3, cutoff=0.0)) or "none"
            raise ValueError(
                f"No cross-attention {name!r} runs up to this tower's last tap. The nearest that do are {nearest}; "
                "to reach further, load the tower with a later tap and truncate=False."
            )
        chosen[short] = layers[short]
    return chosen


class AttentionCapture:
    """Keeps the cross-attention probabilities of a denoiser's passes.

    Maps are reduced at once: only the given prompt's half of a guided pass is kept, averaged over heads. The tower
    calls `begin`, sets `timestep`, and calls `end`.

    Args:
        denoiser: The module that runs.
        layers: Names of transformer blocks and the paths of their cross-attention modules.
        per_head: Keep the heads apart.

    Attributes:
        maps (`AttentionMaps`): Of the last call with a prompt.
        timestep (`int`): Of the pass in progress.

    Raises:
        RuntimeError: A layer is compiled.
    """

    def __init__(self, denoiser: nn.Module, layers: dict[str, str], per_head: bool = False):
        _require_uncompiled(denoiser, layers)
        self.maps = AttentionMaps(list(layers))
        self.timestep = 0
        self._denoiser, self._layers, self._per_head = denoiser, layers, per_head
        self._rows = 0
        self._prompts: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._running: dict[tuple[str, int], torch.Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside the context, passes of the denoiser are captured."""
        handles: list[RemovableHandle] = []
        with removed_at_exit(handles):
            for name, path in self._layers.items():
                attention: Any = self._denoiser.get_submodule(path)
                handles.append(attention.register_forward_pre_hook(self._note_prompt(name), with_kwargs=True))
                handles.append(attention.to_q.register_forward_hook(self._keep(name, attention)))
            yield

    def begin(self, rows: int) -> None:
        """Start a call about that many images."""
        self._rows, self._running = rows, {}

    def end(self, input_ids: torch.Tensor | None, has_prompt: bool) -> None:
        """Finish a call. One without a prompt leaves the maps of the call before.

        Args:
            input_ids (`torch.LongTensor` of shape `(n, 77)`): The prompts.
            has_prompt: Whether the denoiser ran with a given prompt.
        """
        if has_prompt:
            self.maps.set_call(input_ids, self._running)
        self._running = {}

    def _note_prompt(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            self._prompts[name] = kwargs["encoder_hidden_states"], kwargs.get("attention_mask")

        return hook

    def _keep(self, name: str, attention: nn.Module) -> Any:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, query: torch.Tensor) -> None:
            # the given prompt's half comes last: after the empty prompt's in one batch, or in a pass of its own
            chosen = slice(-self._rows, None)
            text, mask = self._prompts.pop(name)
            mask = None if mask is None else mask[chosen]
            probabilities = attention_probabilities(attention, query[chosen], text[chosen], mask)
            if not self._per_head:
                probabilities = probabilities.mean(dim=1, keepdim=True)
            side = math.isqrt(probabilities.shape[2])
            maps = probabilities.transpose(2, 3).unflatten(3, (side, side))
            self._running[name, self.timestep] = maps.cpu()

        return hook


def _require_uncompiled(denoiser: nn.Module, layers: dict[str, str]) -> None:
    compiled = [path for path, module in denoiser.named_modules() if module._compiled_call_impl is not None]
    for layer, path in layers.items():
        if any(f"{path}.".startswith(f"{outer}." if outer else "") for outer in compiled):
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
