"""The parameters that a run trains, by part of the model, and the memory that it needs."""

from collections import Counter
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

PARTS = {
    "vision_tower": "vision encoder",
    "implicit_captioner": "implicit captioner",
    "diffusion_tower": "diffusion model",
    "fusion": "fusion",
    "multi_modal_projector": "projector",
    "language_model": "language model",
    "lm_head": "language model",
}
BYTES_PER_GIB = 1024**3


@dataclass(frozen=True)
class PartCount:
    """The number of parameters of one part of the model."""

    name: str
    trained: int
    frozen: int


def count_parameters(model: nn.Module) -> list[PartCount]:
    """Trained and frozen parameters by part. Adapters are counted with the part that they adapt."""
    trained: Counter[str] = Counter()
    frozen: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        part = next((PARTS[piece] for piece in name.split(".") if piece in PARTS), "other")
        (trained if parameter.requires_grad else frozen)[part] += _numel(parameter)
    names = [name for name in dict.fromkeys([*PARTS.values(), "other"]) if trained[name] + frozen[name]]
    return [PartCount(name, trained[name], frozen[name]) for name in names]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a process needs: exact for weights, gradients and AdamW's two moments, estimated for activations."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(model: PreTrainedModel, batch_size: int, length: int, checkpointing: bool) -> MemoryEstimate:
    """The memory of one process that holds the whole model, before sharding (FSDP, ZeRO).

    Activations are those of the language model in half precision with a fused attention, after Korthikanti et al.
    (arXiv 2205.05198, section 4): 34 bytes per token, channel and layer, or with checkpointing 2 bytes plus one whole
    layer. The logits and the activations of the diffusion model are not included.

    Args:
        model: The model, with the trained parameters marked by `requires_grad`.
        batch_size: Sequences in one forward pass.
        length: Tokens of a sequence, including image tokens.
        checkpointing: Whether activations are recomputed in the backward pass.
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    text = model.config.get_text_config()
    layer = batch_size * length * text.hidden_size
    per_layer = 2 if checkpointing else 34
    activations = layer * (per_layer * text.num_hidden_layers + (34 if checkpointing else 0))
    return MemoryEstimate(weights, trained, 2 * trained, activations)


def print_memory(model: PreTrainedModel, batch_size: int, length: int, checkpointing: bool) -> None:
    """Print the trained and frozen parameters by part, and the memory estimate. See [`estimate_memory`]."""
    table = Table("part", "trained", "frozen", title="Parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = count_parameters(model)
    for count in counts:
        table.add_row(count.name, f"{count.trained:,}", f"{count.frozen:,}")
    table.add_section()
    table.add_row("all", f"{sum(c.trained for c in counts):,}", f"{sum(c.frozen for c in counts):,}")
    memory = estimate_memory(model, batch_size, length, checkpointing)
    pieces = ("weights", "gradients", "optimizer", "activations")
    sizes = ", ".join(f"{piece} {getattr(memory, piece) / BYTES_PER_GIB:.2f}" for piece in pieces)
    console = Console()
    console.print(table)
    console.print(f"Estimated memory per process, unsharded: {memory.total / BYTES_PER_GIB:.2f} GiB ({sizes}).")


def _numel(parameter: nn.Parameter) -> int:
    quantised = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit weights into one byte
    return quantised.shape.numel() if quantised is not None else parameter.numel()
