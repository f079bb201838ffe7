"""The fingerprint of weights: the one by which checkpoints, caches, sweeps and evaluations recognise a model."""

import hashlib

import torch
from torch import nn


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over a module's tensors by name, in float32, so that every dtype that holds the same values agrees.

    Every value counts. Hashing takes about a second per GiB of float32.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
