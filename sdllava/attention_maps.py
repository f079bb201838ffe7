"""Cross-attention maps of a diffusion tower, read by hooks on stock diffusers modules.

The probabilities are computed from the query that the module computed and from its own key projection, with
`Attention.get_attention_scores`, so the module's scale and upcasting hold. Nothing is replaced, and the hooks are
removed when the context ends.
"""

import difflib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from .taps import canonical_tap_name, list_taps

_SUFFIX = "-Cross-Q"


class AttentionMaps(Mapping):
    """What the image's positions looked at in the prompt, by layer and timestep: of one call, one row an image.

    `maps[layer, timestep]` is a `torch.FloatTensor` of shape `(n, heads, tokens, height, width)` on the CPU, with the
    layer's own height and width; `heads` is 1 where heads were averaged. Over tokens it sums to one.

    Attributes:
        layers (`list[str]`): transformer blocks whose maps are kept, e.g. `U-L1-R1-B0`, in the order in which they ran.
        input_ids (`torch.LongTensor` of shape `(n, 77)`, *optional*): the prompts of the call.
    """

    def __init__(self, layers: Sequence[str]):
        self.layers = list(layers)
        self.input_ids: torch.Tensor | None = None
        self._maps: dict[tuple[str, int], torch.Tensor] = {}

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
        """The mean over heads, layers and timesteps at one resolution, as in S3, Figure 4 (there 16).

        Args:
            resolution: only layers whose maps have this height; not needed where all have the same.
            layers, timesteps: only these; default all.

        Returns:
            `torch.FloatTensor` of shape `(n, tokens, resolution, resolution)`, summing to one over tokens.
        """
        if not self._maps:
            raise ValueError("no attention was captured: call the model with a question inside the context")
        chosen = {
            key: value.mean(dim=1)
            for key, value in self._maps.items()
            if (layers is None or key[0] in layers) and (timesteps is None or key[1] in timesteps)
        }
        sizes = sorted({value.shape[-1] for value in chosen.values()})
        if resolution is None and len(sizes) == 1:
            resolution = sizes[0]
        if resolution not in sizes:
            raise ValueError(f"no captured layer has the resolution {resolution}: there are {sizes}")
        return torch.stack([value for value in chosen.values() if value.shape[-1] == resolution]).mean(dim=0)


def attention_layers(tower: nn.Module) -> list[str]:
    """The transformer blocks whose cross-attention runs in a tower, up to its deepest tap, in order."""
    return list(_layers(tower))


def _layers(tower: Any) -> dict[str, str]:
    """Names and the paths of their `attn2` modules."""
    taps = list_taps(tower.config.unet_config, tower.config.latent_size)
    deepest = max(taps.index(tap) for tap in tower.taps)
    return {
        tap.name.removesuffix(_SUFFIX): tap.module_path.removesuffix(".to_q")
        for tap in taps[: deepest + 1]
        if tap.name.endswith(_SUFFIX)
    }


def _chosen_layers(tower: nn.Module, names: Sequence[str] | None) -> dict[str, str]:
    known = _layers(tower)
    if names is None:
        return known
    chosen = {}
    for name in names:
        short = canonical_tap_name(name).removesuffix(_SUFFIX)
        if short not in known:
            nearest = ", ".join(difflib.get_close_matches(short, known, n=3, cutoff=0.0)) or "none"
            raise ValueError(
                f"no cross-attention {name!r} runs up to this tower's tap(s) {[tap.name for tap in tower.taps]}: the "
                f"nearest that do are {nearest}; a tower loaded with a deeper tap and truncate=False reaches further"
            )
        chosen[short] = known[short]
    return chosen


@contextmanager
def capture_attention(
    tower: nn.Module, layers: Sequence[str] | None = None, per_head: bool = False
) -> Iterator[AttentionMaps]:
    """Keep the cross-attention probabilities of calls of `tower`, or of a model that holds it, inside the context.

    Maps are reduced as they come: only the prompt's half of a guided pass is kept, averaged over heads, and each call
    with a prompt replaces the maps of the one before. The call's outputs are the same as without.

    Args:
        tower: a `SDLlavaDiffusionModel`.
        layers: transformer blocks, e.g. `["U-L1-R1-B0"]`; default all that run.
        per_head: keep the heads apart.

    Raises:
        ValueError: a layer does not exist, or lies behind the tower's deepest tap.
        RuntimeError: a layer was compiled.
    """
    paths = _chosen_layers(tower, layers)
    _refuse_compiled(tower.unet, paths)
    capture = _Capture(tower, AttentionMaps(list(paths)), per_head)
    with ExitStack() as stack:
        for handle in capture.register(paths):
            stack.callback(handle.remove)
        yield capture.maps


def _refuse_compiled(unet: Any, paths: dict[str, str]) -> None:
    compiled = [path for path, module in unet.named_modules() if module._compiled_call_impl is not None]
    for layer, path in paths.items():
        if any(f"{path}.".startswith(f"{outer}." if outer else "") for outer in compiled):
            raise RuntimeError(
                f"{layer} cannot be captured, as compiled code calls no hooks: capture before compiling, or choose "
                "layers that were not compiled"
            )


class _UncompiledCalls:
    """Until it is removed, a tower runs uncompiled, as compiled code calls no hooks."""

    def __init__(self, tower: Any):
        self.tower = tower
        tower._captures += 1

    def remove(self) -> None:
        self.tower._captures -= 1


class _Capture:
    """The hooks, and what they know of the call in progress."""

    def __init__(self, tower: nn.Module, maps: AttentionMaps, per_head: bool):
        self.tower, self.maps, self.per_head = tower, maps, per_head
        self.rows, self.timestep = 0, 0
        self.prompts: dict[str, torch.Tensor] = {}
        self.running: dict[tuple[str, int], torch.Tensor] = {}

    def register(self, paths: dict[str, str]) -> Iterator[Any]:
        unet = self.tower.unet
        yield _UncompiledCalls(self.tower)
        yield self.tower.register_forward_pre_hook(self._begin, with_kwargs=True)
        yield self.tower.register_forward_hook(self._end, with_kwargs=True)
        yield unet.register_forward_pre_hook(self._note_timestep, with_kwargs=True)
        for name, path in paths.items():
            attention = unet.get_submodule(path)
            yield attention.register_forward_pre_hook(self._note_prompt(name), with_kwargs=True)
            yield attention.to_q.register_forward_hook(self._keep(name, attention))

    def _begin(self, module, args, kwargs) -> None:
        arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        images = arguments.get("latents") if arguments.get("latents") is not None else arguments.get("pixel_values")
        self.rows, self.running = 0 if images is None else len(images), {}

    def _end(self, module, args, kwargs, output) -> None:
        if output.conditional_features is not None:  # a call without a prompt has nothing to show
            arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
            self.maps.input_ids = arguments.get("input_ids")
            self.maps._maps = self.running
        self.running = {}

    def _note_timestep(self, module, args, kwargs) -> None:
        self.timestep = int(inspect.signature(module.forward).bind(*args, **kwargs).arguments["timestep"])

    def _note_prompt(self, name: str):
        def hook(module, args, kwargs) -> None:
            self.prompts[name] = kwargs["encoder_hidden_states"]

        return hook

    def _keep(self, name: str, attention: nn.Module):
        @torch.no_grad()
        def hook(module, args, query) -> None:
            # the prompt's half comes last: behind the empty prompt's in one batch, or in a pass of its own
            chosen = slice(-self.rows, None)
            probabilities = attention_probabilities(attention, query[chosen], self.prompts.pop(name)[chosen])
            if not self.per_head:
                probabilities = probabilities.mean(dim=1, keepdim=True)
            side = math.isqrt(probabilities.shape[2])
            maps = probabilities.transpose(2, 3).unflatten(3, (side, side))
            self.running[name, self.timestep] = maps.cpu()

        return hook


def attention_probabilities(attention: Any, query: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
    """Softmax of scaled products of queries and keys, in float32.

    Args:
        attention: a diffusers `Attention`; its value projection is not needed.
        query (`torch.Tensor` of shape `(n, positions, heads * width)`): what `to_q` gave.
        encoder_hidden_states (`torch.Tensor` of shape `(n, tokens, channels)`): what it attends to.

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
        scores = attention.get_attention_scores(query.flatten(0, 1).float(), key.flatten(0, 1).float())
    return scores.unflatten(0, (len(query), attention.heads))
