"""The peak of a training step's activations, counted by running the step on the meta device, without computing."""

import copy
import weakref
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..processors import INPUT_IDS


class LiveResults(TorchDispatchMode):
    """Counts the bytes of live results of operations, and their peak.

    Args:
        module: A module whose parameters and buffers are not counted.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.alive = {t.untyped_storage()._cdata for t in [*module.parameters(), *module.buffers()]}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return args[0].dtype == torch.bool or 1  # the value is unknown: masks count as full
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.bytes -= size


class FusedAttention(TorchFunctionMode):
    """Attention that allocates what fused kernels allocate, without probabilities. It computes nothing."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        return _FusedAttention.apply(named["query"], named["key"], named["value"])


class _FusedAttention(torch.autograd.Function):
    """Keeps the inputs, the output and the logarithm of each row's sum for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the model's matrix products: its half precision if a part of it has one, as under autocast."""
    found = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in found), torch.float32)


def peak_activations(model: PreTrainedModel, batch_size: int, length: int, checkpointing: bool) -> int:
    """Peak bytes of intermediate results in a forward and backward pass, without gradients of parameters.

    Attention counts as fused, where it goes through `scaled_dot_product_attention`.

    Args:
        model: The model, on any device. It is not changed.
        batch_size: Sequences, each with one image.
        length: Tokens of a sequence, including image tokens.
        checkpointing: Whether the language model's layers are recomputed in the backward pass.
    """
    twin = _on_meta(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if checkpointing:
        twin.model.language_model.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": lambda: (nullcontext(), FusedAttention())}
        )
    twin.train()
    trained = sum(p.numel() * p.element_size() for p in twin.parameters() if p.requires_grad)
    with FusedAttention(), LiveResults(twin) as live:
        loss = _loss(twin, batch_size, max(length, twin.config.num_image_tokens + 1))
        forward = live.peak
        if loss.requires_grad:
            loss.backward()
    # gradients are allocated while activations are freed
    return max(forward, live.peak - trained)


def _on_meta(model: PreTrainedModel) -> Any:
    """A copy of the model on the meta device, in the dtype of its matrix products, with the VAE as it is."""
    dtype, memo = compute_dtype(model), {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        keep = not tensor.is_floating_point() or ".vae." in name
        meta = torch.empty(tensor.shape, dtype=tensor.dtype if keep else dtype, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)


def _loss(model: Any, batch_size: int, length: int) -> torch.Tensor:
    """The loss of a batch without padding. `forward` itself counts placeholders, which needs values."""
    config, device = model.config, torch.device("meta")
    ids = torch.zeros(batch_size, length, dtype=torch.long, device=device)
    images: dict[str, torch.Tensor] = {}
    if config.vision_config is not None:
        side = config.vision_image_size or config.vision_config.image_size
        images["pixel_values"] = torch.zeros(batch_size, 3, side, side, device=device)
    if config.diffusion_config is not None:
        side = config.diffusion_config.image_size
        images["diffusion_pixel_values"] = torch.zeros(batch_size, 3, side, side, device=device)
        for name, row in zip(INPUT_IDS, config.diffusion_config.null_prompt_ids, strict=False):
            images[name] = torch.zeros(batch_size, len(row), dtype=torch.long, device=device)
    features = torch.stack(list(model.model.get_image_features(**images).pooler_output))
    embeddings = model.get_input_embeddings()(ids)
    embeddings = torch.cat([features.to(embeddings.dtype), embeddings[:, features.shape[1] :]], dim=1)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).expand(batch_size, -1, -1, -1)
    hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)[0]
    logits = model.lm_head(hidden)
    return model.loss_function(logits=logits, labels=ids, vocab_size=logits.shape[-1])
