"""What several commands share. Nothing heavy is imported before a command runs."""

import os
import re
from enum import StrEnum

REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@.+)?")
"""A name on the Hub, with a revision or without."""


class DType(StrEnum):
    """Types of weights and features."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def model_path(model: str) -> str:
    """The folder or repository that `--model` names.

    Raises:
        ValueError: it names neither.
    """
    if model == "mini":
        from ..miniature import mini_path

        return str(mini_path())
    if os.path.isfile(model) or not (os.path.isdir(model) or REPOSITORY.fullmatch(model)):
        raise ValueError(f"{model!r} is no folder and no repository's name: give either, or mini")
    return model


def default_device() -> str:
    """CUDA, else MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device: str) -> str:
    """The device that `--device` names.

    Raises:
        ValueError: torch knows no such device, or there is no CUDA.
    """
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"--device {device!r} is no device: give cpu, cuda, cuda:1 or mps, for example") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device} is not there: use cpu, or a torch with CUDA")
    return device
