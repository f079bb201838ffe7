"""Loads the weights of published parts into a model that was built on the meta device from their configurations."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlavaForConditionalGeneration, PreTrainedModel

from .checkpoint_files import part_reported
from .parts import Parts
from .repositories import missing, require_safetensors, split_revision
from .vision import load_vision


def load_weights(model: PreTrainedModel, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """Give a model the encoders and the language model of its parts; fusion and projector stay as they are.

    With a LLaVA among the parts and `cross_attention` or `gated` fusion, the projector is the LLaVA's and the result
    answers exactly as the LLaVA until it is trained. With `concat` the projector is wider and initialised from scratch.

    Args:
        model: Built from `parts.config` on the meta device.
        parts: From `read_parts` or `read_llava_parts`.
        dtype: Of all weights except the VAE's, which stay in float32 where the configuration says so.

    Returns:
        `dict[str, torch.Tensor]`, *optional*: The LLaVA's projector, where the model's has its shape.

    Raises:
        OSError: A part cannot be read.
        ValueError: The weights are pickles, or the language model has more than a linear head.
    """
    body: Any = model.model
    projector = None
    if "llava" in parts.sources:
        source = _load_llava(parts.sources["llava"], dtype)
        vision_tower, language_model, lm_head = source.model.vision_tower, source.model.language_model, source.lm_head
        generation_config = source.generation_config
        if parts.config.fused_hidden_size * parts.config.spatial_merge_size**2 == parts.config.vision_hidden_size:
            projector = source.model.multi_modal_projector.state_dict()
    else:
        causal_lm = _load_language_model(parts.sources["language_model"], parts.config.text_config.vocab_size, dtype)
        _check_head(causal_lm, parts.sources["language_model"])
        vision = parts.sources.get("vision")
        vision_tower = load_vision(vision, parts.config.vision_config, dtype) if vision else None
        language_model, lm_head = causal_lm.base_model, causal_lm.get_output_embeddings()
        generation_config = causal_lm.generation_config
    if body.diffusion_tower is not None:
        diffusion = parts.sources["diffusion"]
        with part_reported(diffusion, "the diffusion model's weights"):
            body.diffusion_tower.load_published(diffusion, dtype)
    body.vision_tower, body.language_model, model.lm_head = vision_tower, language_model, lm_head
    model.generation_config = _without_unused_sampling(generation_config)
    model.config.dtype = dtype
    return projector


def _load_llava(llava: str, dtype: torch.dtype) -> Any:
    require_safetensors(llava)
    with part_reported(llava, "the LLaVA checkpoint's weights"):
        try:
            return LlavaForConditionalGeneration.from_pretrained(
                dtype=dtype, use_safetensors=True, **split_revision(llava)
            )
        except OSError as error:
            raise missing(llava, "LLaVA checkpoint's weights", error) from error


def _load_language_model(language_model: str, vocab_size: int, dtype: torch.dtype) -> Any:
    """A causal language model with at least `vocab_size` embeddings; new ones are the mean of the others."""
    require_safetensors(language_model)
    where = {**split_revision(language_model), "trust_remote_code": False}
    with part_reported(language_model, "the language model's weights"):
        try:
            causal_lm = AutoModelForCausalLM.from_pretrained(dtype=dtype, use_safetensors=True, **where)
        except OSError as error:
            raise missing(language_model, "language model's weights", error) from error
    old = causal_lm.get_input_embeddings().weight.shape[0]
    if vocab_size > old:
        causal_lm.resize_token_embeddings(vocab_size, mean_resizing=False)
        for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
            weight = module.weight.data
            weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)
    return causal_lm


@torch.no_grad()
def _check_head(causal_lm: Any, name: str) -> None:
    """Compare logits with those of a linear head on the last hidden states, which a LLaVA has."""
    ids = torch.arange(1, 5)[None]
    head = causal_lm.get_output_embeddings()
    linear = head(causal_lm.base_model(input_ids=ids).last_hidden_state)
    if getattr(head, "bias", None) is not None or not torch.equal(linear, causal_lm(input_ids=ids).logits):
        raise ValueError(
            f"{str(name)!r} does more to its logits than a linear head without bias (a bias, scaling or soft-capping), "
            "which a LLaVA cannot hold. Choose another language model."
        )


def _without_unused_sampling(config: GenerationConfig) -> GenerationConfig:
    if not config.do_sample:  # Vicuna v1.5 is published with settings of sampling but without sampling
        config.temperature = config.top_p = config.top_k = None
    return config
