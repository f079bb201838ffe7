"""The model in vLLM: this package's image model, and vLLM's own language model."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors
from vllm.utils.torch_utils import set_default_torch_dtype

from ..checkpoints import fetch_frozen
from ..configuration import SDLlavaConfig
from ..image_model import SDLlavaImageModel
from ..outputs import SDLlavaImageEncodings
from ..pipeline import CachedEncodings
from .processing import (
    DIFFUSION,
    NO_KEY,
    VISION,
    SDLlavaDummyInputs,
    SDLlavaMultiModalProcessor,
    SDLlavaProcessingInfo,
)

NUM_KEPT_IMAGES = 64
"""Images whose encodings are cached; 2 MB each at the papers' size in bfloat16."""


@MULTIMODAL_REGISTRY.register_processor(
    SDLlavaMultiModalProcessor, info=SDLlavaProcessingInfo, dummy_inputs=SDLlavaDummyInputs
)
class SDLlavaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP):
    """Vision encoder, diffusion tower, fusion and projector in the checkpoint's dtype; the language model in vLLM's."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
            "model.": "image_model.",
        }
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """The image token, for chat templates that do not write it."""
        return "<image>"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: SDLlavaConfig = vllm_config.model_config.hf_config
        text_config = config.text_config
        self.config = config
        self.dtype = vllm_config.model_config.dtype
        this: Any = self  # vLLM's mixins have no types
        this.configure_mm_token_handling(text_config.vocab_size, [config.image_token_id])
        with (
            this._mark_tower_model(vllm_config, "image"),
            set_default_torch_dtype(_checkpoint_dtype(config)),
        ):
            self.image_model = SDLlavaImageModel(config).eval().requires_grad_(False)
            tower = self.image_model.diffusion_tower
            vae = getattr(tower.backbone, "vae", None) if tower is not None and tower.config.vae_in_fp32 else None
            if vae is not None:
                vae.float()
        text_config.tie_word_embeddings = config.tie_word_embeddings
        text_config.architectures = text_config.architectures or [
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text_config.model_type]
        ]
        with this._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self._kept = CachedEncodings(self.image_model, NUM_KEPT_IMAGES)

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Image features as the language model reads them.

        Args:
            kwargs: What `SDLlavaMultiModalProcessor` makes, one row per item.

        Returns:
            One tensor of shape `(tokens, hidden_size)` per item.
        """
        keys, parts = kwargs.pop("image_key", None), kwargs.pop("part", None)
        if keys is None:
            return []
        encodings = self._encode([bytes(key.tolist()) for key in keys], kwargs)
        questions = {name: x for name, x in kwargs.items() if name.startswith("diffusion_input_ids")}
        features: list[torch.Tensor] = [torch.empty(0)] * len(keys)
        for part in parts.unique().tolist():
            rows = (parts == part).nonzero().flatten().tolist()
            some = SDLlavaImageEncodings(**{name: x[rows] for name, x in encodings.items()})
            found = self._part(part, some, {name: x[rows] for name, x in questions.items()})
            for row, tokens in zip(rows, found, strict=True):
                features[row] = tokens.to(self.dtype)
        return features

    def _encode(self, keys: list[bytes], inputs: dict[str, Any]) -> SDLlavaImageEncodings:
        """What does not depend on the question, in the order of the rows; `inputs` loses its pixels."""
        if NO_KEY in keys:
            pixels = {name: inputs.pop(name) for name in ("pixel_values", "diffusion_pixel_values") if name in inputs}
            return self.image_model.encode_images(**pixels)
        self._kept.replace([key.hex() for key in keys], inputs)
        return inputs.pop("image_encodings")

    def _part(self, part: int, encodings: SDLlavaImageEncodings, questions: dict[str, torch.Tensor]) -> Iterable:
        if part == VISION:
            return self.image_model.get_vision_tokens(encodings)
        if part == DIFFUSION:
            return self.image_model.get_diffusion_tokens(encodings, **questions)
        return self.image_model.get_image_features(image_encodings=encodings, **questions).pooler_output

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        """The language model's hidden states."""
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The language model's logits, minus infinity for the image token, which `generate` never writes either."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[:, self.config.image_token_id] = float("-inf")
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's weights; frozen parts that it leaves out come from their own repositories."""
        loader = AutoWeightsLoader(self)
        loaded = loader.load_weights(pad_heads(weights, self.config.text_config), mapper=self.hf_to_vllm_mapper)
        if self.config.left_out:
            fetch_frozen(self.image_model)
            loaded |= {f"image_model.{name}" for name, _ in self.image_model.named_parameters()}
        return loaded


def _checkpoint_dtype(config: SDLlavaConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def pad_heads(weights: Iterable[tuple[str, torch.Tensor]], text_config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, with zeros in the channels that `widen_heads` added to the attention's heads.

    Queries are scaled, because attention divides by the root of the head's size.

    Args:
        weights: Names and tensors, as in the checkpoint.
        text_config: Of the language model.
    """
    size = getattr(text_config, "unpadded_head_dim", None)
    for name, tensor in weights:
        projection = name.rsplit(".", 2)[-2] if ".self_attn." in name and ".language_model." in name else ""
        if size is not None and projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            wide = text_config.head_dim
            axis = 1 if projection == "o_proj" else 0
            heads = tensor.unflatten(axis, (-1, size))
            scale = math.sqrt(wide / size) if projection == "q_proj" else 1.0
            added = list(heads.shape)
            added[axis + 1] = wide - size
            tensor = torch.cat([heads * scale, heads.new_zeros(added)], dim=axis + 1).flatten(axis, axis + 1)
        yield name, tensor
