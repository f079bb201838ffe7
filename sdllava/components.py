"""Assembly: published repositories become one model and its processor.

`plan` and `plan_from_llava` read configurations and tokenizers only, and check that the parts fit; weights are read
after that. The diffusion model is loaded by `diffusion_loading`; the language model and the static encoder go through
transformers' own loaders.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipVisionModel,
)

from .chat_templates import chat_template_for
from .checkpoints import describe_source
from .configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from .diffusion_loading import as_dtype, load_diffusion_tokenizers, load_tower, read_diffusion_config
from .fusion import FUSIONS, ImplicitCaptioner, SDLlavaMultiModalProjector
from .modeling_sdllava import SDLlavaForConditionalGeneration
from .processors import SDLlavaProcessor, diffusion_image_processor
from .repositories import missing, split_revision

_VISION_MODELS = {
    "clip_vision_model": CLIPVisionModel,
    "siglip_vision_model": SiglipVisionModel,
    "dinov2": Dinov2Model,
}
_LLAVA_FIELDS = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
)
_PLANNED = {
    "text_config",
    "vision_config",
    "diffusion_config",
    "image_token_index",
    "null_input_ids",
    "null_input_ids_2",
}
_PLANNED |= {f"{part}_config" for part in ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")}
_PLANNED |= {f.name for f in fields(PreTrainedConfig)}
_DIFFUSION_FIELDS = {f.name for f in fields(SDLlavaDiffusionConfig)} - _PLANNED
_MODEL_FIELDS = {f.name for f in fields(SDLlavaConfig)} - _PLANNED
_MODEL_FIELDS -= {"components", "left_out"}


@dataclass
class Plan:
    """What the parts will become: the model's configuration and its processor."""

    config: SDLlavaConfig
    processor: SDLlavaProcessor


def load_vision(vision: str, config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """A static encoder with the published weights."""
    return _VISION_MODELS[config.model_type].from_pretrained(dtype=dtype, **split_revision(vision))


def _components(**sources: str | None) -> dict[str, dict[str, Any]]:
    found = {name: split_revision(source) for name, source in sources.items() if source}
    return {
        name: describe_source(where["pretrained_model_name_or_path"], where.get("revision"))
        for name, where in found.items()
    }


def plan(diffusion: str | None = None, vision: str | None = None, language_model: str | None = None, **config) -> Plan:
    """Read the parts' configurations and tokenizers, check that they fit, and say what they become.

    Args:
        diffusion, vision, language_model (`str`): repository ids, `id@revision`, or local folders. Without
            `diffusion` it is a LLaVA, without `vision` diffusion alone.
        config: fields of [`SDLlavaConfig`] and [`SDLlavaDiffusionConfig`].
    """
    if language_model is None:
        raise ValueError("a language model is needed: give language_model")
    diffusion_fields, model_fields = _split_fields(config, diffusion)
    diffusion_config = read_diffusion_config(diffusion, **diffusion_fields) if diffusion else None
    try:
        text_config = AutoConfig.from_pretrained(**split_revision(language_model)).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(**split_revision(language_model))
    except (OSError, ValueError) as error:
        raise missing(language_model, "language model", error) from error
    vision_config, image_processor = _read_vision(vision, model_fields) if vision else (None, None)

    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    _prepare_tokenizer(tokenizer)
    model_config = SDLlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        diffusion_config=diffusion_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        components=_components(diffusion=diffusion, vision=vision, language_model=language_model),
        **model_fields,
    )
    template = chat_template_for(tokenizer.chat_template, "<image>")
    return Plan(model_config, _processor(model_config, image_processor, tokenizer, diffusion, template))


def _split_fields(config: dict[str, Any], diffusion: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    unknown = sorted(set(config) - _DIFFUSION_FIELDS - _MODEL_FIELDS)
    if diffusion is None and (orphans := sorted(set(config) & _DIFFUSION_FIELDS)):
        raise ValueError(f"{orphans[0]!r} belongs to a diffusion tower: give diffusion, or leave it out")
    if unknown:
        known = ", ".join(sorted(_DIFFUSION_FIELDS | _MODEL_FIELDS))
        raise TypeError(f"{unknown[0]!r} is no field of SDLlavaConfig or SDLlavaDiffusionConfig: {known}")
    return (
        {name: value for name, value in config.items() if name in _DIFFUSION_FIELDS},
        {name: value for name, value in config.items() if name in _MODEL_FIELDS},
    )


def _read_vision(vision: str, model_fields: dict[str, Any]) -> tuple[PreTrainedConfig, Any]:
    try:
        config = AutoConfig.from_pretrained(**split_revision(vision))
        config = getattr(config, "vision_config", config)
        if config.model_type not in _VISION_MODELS:
            kinds = ", ".join(_VISION_MODELS)
            raise TypeError(f"{vision!r} is a {config.model_type!r}: the static encoder can be {kinds}")
        processor = AutoImageProcessor.from_pretrained(**split_revision(vision))
    except (OSError, ValueError) as error:
        raise missing(vision, "static encoder", error) from error
    size = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
    side = model_fields.get("vision_image_size") or size.get("height") or size["shortest_edge"]
    if side != config.image_size:
        model_fields["vision_image_size"] = side
    processor.size = processor.crop_size = {"height": side, "width": side}
    return config, processor


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _processor(config, image_processor, tokenizer, diffusion, chat_template, pad_to_square=True) -> SDLlavaProcessor:
    tower = config.diffusion_config
    parts = [image_processor, tokenizer]
    if tower is not None:
        is_xl = tower.text_encoder_2_config is not None
        parts += [diffusion_image_processor(tower), *load_diffusion_tokenizers(diffusion, is_xl)]
    return SDLlavaProcessor(  # type: ignore[misc]  # the tokenizers may be one or two
        *parts,
        num_image_tokens=config.num_image_tokens,
        pad_to_square=pad_to_square,
        chat_template=chat_template,
    )


def compose(
    diffusion: str | None = None,
    vision: str | None = None,
    language_model: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    **config,
) -> SDLlavaForConditionalGeneration:
    """Put published parts together; fusion and projector are new and need training. See [`plan`] for the arguments.

    Args:
        dtype (`torch.dtype`): of all weights but the VAE's.
    """
    dtype = as_dtype(dtype)
    planned = plan(diffusion, vision, language_model, **config).config
    try:
        causal_lm = AutoModelForCausalLM.from_pretrained(dtype=dtype, **split_revision(language_model))
    except OSError as error:
        raise missing(language_model, "language model's weights", error) from error
    vision_tower = load_vision(vision, planned.vision_config, dtype) if vision else None
    _resize_embeddings(causal_lm, planned.text_config.vocab_size)
    tower_config: Any = planned.diffusion_config
    tower = load_tower(diffusion, tower_config, dtype) if diffusion else None
    model = _assemble(planned, vision_tower, tower, causal_lm.base_model, causal_lm.get_output_embeddings(), dtype)
    _check_language_model(causal_lm, model, language_model)
    model.generation_config = _generation_config(causal_lm)
    return model


def _generation_config(model: Any) -> GenerationConfig:
    config = model.generation_config
    if not config.do_sample:  # Vicuna v1.5 is published with sampling's settings but without sampling
        config.temperature = config.top_p = config.top_k = None
    return config


def _resize_embeddings(causal_lm: Any, size: int) -> None:
    old = causal_lm.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    causal_lm.resize_token_embeddings(size, mean_resizing=False)
    for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
        weight = module.weight.data
        weight[old:] = weight[:old].float().mean(dim=0).to(weight.dtype)


def _assemble(config, vision_tower, tower, language_model, lm_head, dtype) -> SDLlavaForConditionalGeneration:
    with torch.device("meta"):
        model = SDLlavaForConditionalGeneration(config)
    body = model.model
    body.vision_tower, body.diffusion_tower, body.language_model = vision_tower, tower, language_model
    model.lm_head = lm_head
    body.multi_modal_projector = SDLlavaMultiModalProjector(config)
    body.fusion = None if config.fusion == "none" else FUSIONS[config.fusion](config)
    body.implicit_captioner = ImplicitCaptioner(config) if config.implicit_caption_tokens else None
    for module in (body.multi_modal_projector, body.fusion, body.implicit_captioner):
        if module is not None:
            module.apply(model._init_weights).to(dtype)
    config.dtype = dtype
    return model.eval()


@torch.no_grad()
def _check_language_model(causal_lm: Any, model: SDLlavaForConditionalGeneration, name: str) -> None:
    ids = torch.arange(1, 5)[None]
    expected = causal_lm(input_ids=ids).logits
    has_bias = getattr(causal_lm.get_output_embeddings(), "bias", None) is not None
    if has_bias or not torch.equal(model(input_ids=ids).logits, expected):
        raise ValueError(
            f"{name!r} does more to its logits than a linear head without bias (a bias, scaling or soft-capping), "
            "which a LLaVA cannot hold: choose another language model"
        )


def plan_from_llava(llava: str, diffusion: str | None = None, **config) -> Plan:
    """As [`plan`], for a Hugging Face LLaVA-1.5 checkpoint that gets a diffusion tower, or none.

    The checkpoint keeps its own image processor's setting for the static encoder, so that answers stay the same.
    """
    diffusion_fields, model_fields = _split_fields(config, diffusion)
    diffusion_config = read_diffusion_config(diffusion, **diffusion_fields) if diffusion else None
    try:
        source = AutoConfig.from_pretrained(**split_revision(llava))
        if source.model_type != "llava":
            raise ValueError(f"its model type is {source.model_type!r}, not 'llava'")
        processor = LlavaProcessor.from_pretrained(**split_revision(llava))
    except (OSError, ValueError) as error:
        raise missing(llava, "LLaVA checkpoint", error) from error
    kept = {name: getattr(source, name) for name in _LLAVA_FIELDS}
    model_config = SDLlavaConfig(
        text_config=source.text_config,
        vision_config=source.vision_config,
        diffusion_config=diffusion_config,
        components=_components(llava=llava, diffusion=diffusion),
        **{**kept, **model_fields},
    )
    _prepare_tokenizer(processor.tokenizer)
    template = processor.chat_template or chat_template_for(processor.tokenizer.chat_template, processor.image_token)
    parts = (processor.image_processor, processor.tokenizer, diffusion, template)
    return Plan(model_config, _processor(model_config, *parts, pad_to_square=False))


def compose_from_llava(
    llava: str, diffusion: str | None = None, dtype: torch.dtype | str = torch.float32, **config
) -> SDLlavaForConditionalGeneration:
    """Upgrade a LLaVA-1.5 checkpoint. With `cross_attention` or `gated` fusion the result answers exactly as the LLaVA
    until it is trained; with `concat` the projector is wider and starts anew. See [`plan_from_llava`].
    """
    dtype = as_dtype(dtype)
    planned = plan_from_llava(llava, diffusion, **config).config
    try:
        source = LlavaForConditionalGeneration.from_pretrained(dtype=dtype, **split_revision(llava))
    except OSError as error:
        raise missing(llava, "LLaVA checkpoint's weights", error) from error
    tower_config: Any = planned.diffusion_config
    tower = load_tower(diffusion, tower_config, dtype) if diffusion else None
    body = source.model
    model = _assemble(planned, body.vision_tower, tower, body.language_model, source.lm_head, dtype)
    if planned.fused_hidden_size * planned.spatial_merge_size**2 == planned.vision_hidden_size:
        model.model.multi_modal_projector.load_state_dict(body.multi_modal_projector.state_dict())
    model.generation_config = _generation_config(source)
    return model


def compose_processor(**parts) -> SDLlavaProcessor:
    """The processor of published parts, from configurations and tokenizers alone. See [`plan`]."""
    return plan(**parts).processor


def compose_processor_from_llava(llava: str, diffusion: str | None = None, **config) -> SDLlavaProcessor:
    """The processor of an upgraded LLaVA. See [`plan_from_llava`]."""
    return plan_from_llava(llava, diffusion, **config).processor
