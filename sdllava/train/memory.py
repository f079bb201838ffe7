"""The parameters that a run trains, by part of the model, and the memory that it needs."""

from collections import Counter
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedModel

from .activations import compute_dtype, peak_activations

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
    """Bytes that a process needs.

    Attributes:
        weights: All parameters, with half-precision copies of those that are trained in float32 under autocast.
        gradients: Of the trained parameters.
        optimizer: AdamW's two moments, and under ZeRO its float32 copy of half-precision weights.
        activations: The peak of everything else in a forward and backward pass: activations of the VAE, the UNet, the
            vision encoder and the language model, and the logits in float32.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    model: PreTrainedModel, batch_size: int, length: int, checkpointing: bool, zero_stage: int = 0, processes: int = 1
) -> MemoryEstimate:
    """The memory of one process in training.

    ZeRO (arXiv 1910.02054) divides the optimizer states among the processes from stage 1 on, the gradients from stage
    2 on, and the parameters in stage 3. Activations are counted by [`~sdllava.train.activations.peak_activations`].

    Args:
        model: The model, with the trained parameters marked by `requires_grad`. It may be on the meta device.
        batch_size: Sequences in one forward pass, each with one image.
        length: Tokens of a sequence, including image tokens.
        checkpointing: Whether activations are recomputed in the backward pass.
        zero_stage: DeepSpeed's stage, in 0..3.
        processes: Processes that share the model's states under ZeRO.
    """
    states = state_bytes(model, zero_stage, processes)
    return MemoryEstimate(*states, peak_activations(model, batch_size, length, checkpointing))


def state_bytes(model: PreTrainedModel, zero_stage: int = 0, processes: int = 1) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of one process. See [`estimate_memory`]."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optimizer = 2 * gradients
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if zero_stage:
        optimizer = sum(3 * 4 * p.numel() if p.element_size() == 2 else 2 * 4 * p.numel() for p in trained)
    elif compute_dtype(model) != torch.float32:
        weights += 2 * sum(p.numel() for p in trained if p.element_size() == 4 and p.ndim > 1)  # autocast's cache
    shares = [processes if zero_stage >= stage else 1 for stage in (3, 2, 1)]
    return weights // shares[0], gradients // shares[1], optimizer // shares[2]


def print_memory(model: PreTrainedModel, batch_size: int, length: int, checkpointing: bool) -> None:
    """Print the trained and frozen parameters by part and, on an accelerator, the estimate of [`estimate_memory`]."""
    table = Table("part", "trained", "frozen", title="Parameters")
    for column in table.columns[1:]:
        column.justify = "right"
    counts = count_parameters(model)
    for count in counts:
        table.add_row(count.name, f"{count.trained:,}", f"{count.frozen:,}")
    table.add_section()
    table.add_row("all", f"{sum(c.trained for c in counts):,}", f"{sum(c.frozen for c in counts):,}")
    console = Console()
    console.print(table)
    if next(model.parameters()).device.type == "cpu" and not torch.accelerator.is_available():
        return  # counting takes seconds, and the device's memory is not the limit
    if any(hasattr(p, "quant_state") or not p.numel() for p in model.parameters()):
        console.print("Memory is not estimated for 4-bit weights, or for parameters that are divided among processes.")
        return
    memory = estimate_memory(model, batch_size, length, checkpointing)
    pieces = ("weights", "gradients", "optimizer", "activations")
    sizes = ", ".join(f"{piece} {getattr(memory, piece) / BYTES_PER_GIB:.2f}" for piece in pieces)
    console.print(f"Estimated memory per process, unsharded: {memory.total / BYTES_PER_GIB:.2f} GiB ({sizes}).")


def _numel(parameter: nn.Parameter) -> int:
    quantised = getattr(parameter, "quant_state", None)  # bitsandbytes packs two 4-bit weights into one byte
    return quantised.shape.numel() if quantised is not None else parameter.numel()
