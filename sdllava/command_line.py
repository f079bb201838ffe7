"""What several commands share. Nothing heavy is imported before a command runs."""

from enum import StrEnum


class DType(StrEnum):
    """Types of weights and features."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def model_path(model: str) -> str:
    """The folder or repository that `--model` names."""
    if model != "mini":
        return model
    from .miniature.checkpoint import mini_path

    return str(mini_path())


def default_device() -> str:
    """CUDA, else MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
