"""Settings of a recipe that depend on the machine and on the size of the model. Recipes name those of a GPU machine."""

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FREE_CORES = 2
"""Cores per process that data loader workers leave to the training itself."""

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Both names of the setting. TRL reads the first one, and recent versions of the Trainer only the second one."""

LARGE = 1_000_000_000
"""Parameters of a language model from which recomputing activations is worth its time."""


def fit_to_machine(values: Mapping[str, Any], chosen: Collection[str]) -> dict[str, Any]:
    """A recipe's values for this machine: fewer data loader workers than cores, and float32 weights on a CPU.

    A CPU computes in bfloat16 where it has units for it, which halves the time of a step. Others are several times
    slower in bfloat16 than in float32.

    Args:
        values: The recipe with its bases. Empty without a recipe.
        chosen: Arguments that the user sets, which stay as they are.
    """
    import torch

    fitted = dict(values)
    if "dataloader_num_workers" in values:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = max(available_cores() // processes - FREE_CORES, 0)
        fitted["dataloader_num_workers"] = min(values["dataloader_num_workers"], free)
    if not torch.accelerator.is_available():
        fitted |= {"dtype": "float32"} if values.get("dtype") else {}
        if values.get("bf16", not (values.get("fp16") or "fp16" in chosen)):  # as SFTConfig's default
            fitted["bf16"] = computes_in_bfloat16("cpu")
    kept = {name: values[name] for name in chosen if name in values}
    return {name: value for name, value in fitted.items() if name not in chosen} | kept


def computes_in_bfloat16(device: str | None = None) -> bool:
    """Whether a device has units for bfloat16.

    Args:
        device: Its type. Default: the accelerator, else the CPU.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator()
    device = device or (accelerator.type if accelerator else "cpu")
    return device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False)


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def recomputes_activations(model: "PreTrainedModel") -> bool:
    """Whether gradient checkpointing suits the size of a model: its language model has at least 10^9 parameters."""
    language_model: Any = model.model.language_model
    return sum(parameter.numel() for parameter in language_model.parameters()) >= LARGE
