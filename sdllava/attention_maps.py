"""Maps of a diffusion model's attention to its prompt, read by hooks on stock diffusers modules.

Nothing is replaced, and the hooks are removed when the capture ends.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .attention_scores import AttentionScores, attention_scores, is_joint, joint_scores
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
        of_outputs (`bool`): The values are not probabilities but products of outputs, see `ConceptCapture`.
        prompt_ids (`list[torch.LongTensor]` of shapes `(n, tokens)`): The prompts of the call, as each tokenizer gives
            them whose tokens are attended to, in the order of `tokens`.
    """

    def __init__(self, layers: Sequence[str], of_outputs: bool = False):
        self.layers, self.of_outputs = list(layers), of_outputs
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


def concept_layers(denoiser: nn.Module, known: Sequence[Tap], read: Sequence[Tap]) -> dict[str, Tap]:
    """The transformer blocks up to the last tap whose attention also has outputs for the text, in order.

    These are Stable Diffusion 3's blocks except for the last, and FLUX's blocks of two streams.

    Args:
        denoiser: The module in which taps are paths.
        known: Every tap of the denoiser, in the order of its forward pass.
        read: The taps that are read.

    Returns:
        `dict[str, Tap]`: Names such as `T-B9`, and the taps of their attention.

    Raises:
        ValueError: There is none.
    """
    last = max(known.index(tap) for tap in read)
    joint = {tap.name.removesuffix("-Joint-Out"): tap for tap in known[: last + 1] if tap.name.endswith("-Joint-Out")}
    found = {
        name: tap
        for name, tap in joint.items()
        if getattr(denoiser.get_submodule(tap.module_path), "to_add_out", None) is not None
    }
    if not found:
        raise ValueError(
            f"No joint attention of text and image runs up to the last tap, {known[last].name!r}, so there are no "
            "concept maps. Use attention maps, or a later tap of Stable Diffusion 3 or FLUX."
        )
    return found


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


@contextmanager
def hooked_scores(
    denoiser: nn.Module,
    layers: dict[str, Tap],
    keep: Callable[[str, AttentionScores], None],
    last_rows: Callable[[], int] | None = None,
) -> Iterator[None]:
    """Inside the context, passes of the denoiser call `keep` with each layer's name and scores.

    Args:
        denoiser: The module that runs.
        layers: Names and the taps of their queries.
        keep: Called while the layer's query is computed, before the layer's output.
        last_rows: Gives the number of rows, at the end of the batch, whose scores are computed. Default: all.
    """
    handles: list[RemovableHandle] = []

    def hook_layer(name: str, tap: Tap) -> None:
        """Register the hooks that read a layer's inputs and query."""
        attention: Any = denoiser.get_submodule(tap.module_path.removesuffix(".to_q"))
        inputs: dict[str, Any] = {}

        def note_inputs(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs.update(kwargs)

        @torch.no_grad()
        def read(module: nn.Module, args: Any, query: torch.Tensor) -> None:
            rows = slice(None) if last_rows is None else slice(-last_rows(), None)
            keep(name, _scores_of_call(attention, tap, query[rows], args[0][rows], inputs, rows))
            inputs.clear()

        handles.append(attention.register_forward_pre_hook(note_inputs, with_kwargs=True))
        handles.append(attention.to_q.register_forward_hook(read))

    with removed_at_exit(handles):
        for name, tap in layers.items():
            hook_layer(name, tap)
        yield


def _scores_of_call(
    attention: Any, tap: Tap, query: torch.Tensor, hidden_states: torch.Tensor, inputs: dict[str, Any], rows: slice
) -> AttentionScores:
    text, mask = inputs.get("encoder_hidden_states"), inputs.get("attention_mask")
    text = None if text is None else text[rows]
    if is_joint(attention, tap):
        num_text = query.shape[1] - tap.height * tap.width if text is None else text.shape[1]
        return joint_scores(attention, query, hidden_states, text, num_text, inputs.get("image_rotary_emb"))
    if text is None:
        raise ValueError(f"The attention of {tap.name!r} has no prompt. Use a layer that attends to text.")
    return attention_scores(attention, query, text, None if mask is None else mask[rows])


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

    of_outputs = False

    def __init__(self, denoiser: nn.Module, layers: dict[str, Tap], per_head: bool = False):
        _require_uncompiled(denoiser, layers)
        self.maps = AttentionMaps(list(layers), self.of_outputs)
        self.timestep = 0
        self._denoiser, self._layers, self._per_head = denoiser, layers, per_head
        self._rows = 0
        self._running: dict[tuple[str, int], torch.Tensor] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside the context, passes of the denoiser are captured."""
        with hooked_scores(self._denoiser, self._layers, self._keep_probabilities, lambda: self._rows):
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

    def _keep_probabilities(self, name: str, scores: AttentionScores) -> None:
        probabilities = scores.probabilities()
        self._keep(name, probabilities if self._per_head else probabilities.mean(dim=1, keepdim=True))

    def _keep(self, name: str, values: torch.Tensor) -> None:
        """Keep values `(n, heads, positions, tokens)` as maps."""
        side = math.isqrt(values.shape[2])
        self._running[name, self.timestep] = values.transpose(2, 3).unflatten(3, (side, side)).cpu()


class ConceptCapture(AttentionCapture):
    """Keeps products of what joint attention gives to image positions and to prompt tokens.

    ConceptAttention (arXiv 2502.04320) compares an attention's outputs, before their projections, instead of its
    queries and keys. Its concepts are tokens in addition to the prompt's, here they are the prompt's own. The values
    are those of the given prompt's half, summed over heads.

    Args:
        denoiser: The module that runs.
        layers: Names of transformer blocks and the taps of their attention, from `concept_layers`.
    """

    of_outputs = True

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside the context, passes of the denoiser are captured."""
        handles: list[RemovableHandle] = []
        with removed_at_exit(handles):
            for name, tap in self._layers.items():
                attention: Any = self._denoiser.get_submodule(tap.module_path)
                handles += self._compare_outputs(name, attention)
            yield

    def _compare_outputs(self, name: str, attention: Any) -> list[RemovableHandle]:
        outputs: dict[str, torch.Tensor] = {}

        def note(part: str) -> Any:
            return lambda module, args: outputs.update({part: args[0][-self._rows :].float()})

        def compare(module: nn.Module, args: Any, output: Any) -> None:
            self._keep(name, (outputs["image"] @ outputs["text"].transpose(1, 2))[:, None].detach())

        return [
            attention.to_out[0].register_forward_pre_hook(note("image")),
            attention.to_add_out.register_forward_pre_hook(note("text")),
            attention.register_forward_hook(compare),
        ]


def _require_uncompiled(denoiser: nn.Module, layers: dict[str, Tap]) -> None:
    compiled = [path for path, module in denoiser.named_modules() if module._compiled_call_impl is not None]
    for layer, tap in layers.items():
        if any(f"{tap.module_path}.".startswith(f"{outer}." if outer else "") for outer in compiled):
            raise RuntimeError(
                f"{layer!r} cannot be captured, because compiled code calls no hooks. Capture before compiling, or "
                "choose layers that are not compiled."
            )
