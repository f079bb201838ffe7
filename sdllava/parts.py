"""Reads and checks the configurations and tokenizers of published parts, before any weights; returns plain data."""

from dataclasses import dataclass, fields
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from .backbone import PublishedDiffusion
from .backbones import read_published
from .chat_templates import chat_template_for
from .checkpoint_files import FIELD_ERRORS, part_reported, unexpected_reported
from .configuration import SDLlavaConfig
from .diffusion_configuration import PART_FIELDS, SDLlavaDiffusionConfig
from .repositories import describe_source, missing, split_revision
from .vision import read_vision

_LLAVA_FIELDS = (
    "image_token_index",
    "projector_hidden_act",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "multimodal_projector_bias",
)
_READ_FROM_PARTS = {
    "text_config",
    "vision_config",
    "diffusion_config",
    "image_token_index",
    "null_input_ids",
    "null_input_ids_2",
    "null_input_ids_3",
    "components",
    "is_trained",
    "left_out",
    *PART_FIELDS,
    *(f.name for f in fields(PreTrainedConfig)),
}
DIFFUSION_FIELDS = {f.name for f in fields(SDLlavaDiffusionConfig)} - _READ_FROM_PARTS
"""Fields of the diffusion tower that whoever assembles a model may set."""
MODEL_FIELDS = {f.name for f in fields(SDLlavaConfig)} - _READ_FROM_PARTS
"""Fields of the model that whoever assembles it may set."""


@dataclass(frozen=True)
class Parts:
    """What a model is assembled from: its configuration, where the weights are, and what its processor needs."""

    config: SDLlavaConfig
    sources: dict[str, str]
    """`diffusion`, `vision` and `language_model`, or `diffusion` and `llava`: repository ids or folders."""
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    diffusion_tokenizers: list[PreTrainedTokenizerBase]
    chat_template: str
    pad_to_square: bool


def read_parts(
    diffusion: str | None = None, vision: str | None = None, language_model: str | None = None, **config: Any
) -> Parts:
    """Read the parts' configurations and tokenizers and check that they fit.

    Args:
        diffusion, vision, language_model (`str`): Repository ids, `id@revision`, or local folders. Without
            `diffusion` the model is a LLaVA, without `vision` it has only the diffusion tower.
        config: Fields of [`SDLlavaConfig`] and [`SDLlavaDiffusionConfig`].

    Raises:
        OSError: A part cannot be read.
        TypeError: A field of `config` does not exist.
        ValueError: There is no language model, or the parts or fields do not fit together.
    """
    if language_model is None:
        raise ValueError("language_model=None leaves the model without a language model. Give language_model.")
    published, model_fields = _read_diffusion(diffusion, config)
    with part_reported(language_model, "the language model"):
        try:
            where = {**split_revision(language_model), "trust_remote_code": False}
            text_config = AutoConfig.from_pretrained(**where).get_text_config()
            tokenizer = AutoTokenizer.from_pretrained(**where)
        except (OSError, ValueError) as error:
            raise missing(language_model, "language model", error) from error
    vision_config = image_processor = None
    if vision is not None:
        given_size = model_fields.pop("vision_image_size", None)
        vision_config, image_processor, size = read_vision(vision, given_size)
        model_fields["vision_image_size"] = size

    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text_config.vocab_size = max(text_config.vocab_size, len(tokenizer))
    sources = {"diffusion": diffusion, "vision": vision, "language_model": language_model}
    given = {name: source for name, source in sources.items() if source is not None}
    model_config = _model_config(
        given,
        text_config=text_config,
        vision_config=vision_config,
        diffusion_config=published and published.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        components=_describe(given),
        is_trained=False,
        **model_fields,
    )
    template = chat_template_for(tokenizer.chat_template, "<image>", tokenizer.special_tokens_map, language_model)
    return Parts(
        config=model_config,
        sources=given,
        tokenizer=_with_pad_token(tokenizer),
        image_processor=image_processor,
        diffusion_tokenizers=[] if published is None else published.tokenizers,
        chat_template=template,
        pad_to_square=True,
    )


def read_llava_parts(llava: str, diffusion: str | None = None, **config: Any) -> Parts:
    """As [`read_parts`], for a Hugging Face LLaVA-1.5 checkpoint that gets a diffusion tower, or none.

    The checkpoint keeps its own image processor's setting for the vision encoder, so that answers stay the same.

    Raises:
        OSError: The checkpoint is not a LLaVA, or cannot be read.
        TypeError: A field of `config` does not exist.
        ValueError: The parts or fields do not fit together.
    """
    published, model_fields = _read_diffusion(diffusion, config)
    with part_reported(llava, "the LLaVA checkpoint"):
        try:
            where = {**split_revision(llava), "trust_remote_code": False}
            source = AutoConfig.from_pretrained(**where)
            if source.model_type != "llava":
                raise ValueError(f"its model type is {source.model_type!r}, not 'llava'")
            processor = LlavaProcessor.from_pretrained(**where)
        except (OSError, ValueError) as error:
            raise missing(llava, "LLaVA checkpoint", error) from error
    sources = {"llava": llava, "diffusion": diffusion}
    given = {name: source for name, source in sources.items() if source is not None}
    kept = {name: getattr(source, name) for name in _LLAVA_FIELDS}
    model_config = _model_config(
        given,
        text_config=source.text_config,
        vision_config=source.vision_config,
        diffusion_config=published and published.config,
        components=_describe(given),
        **{**kept, **model_fields},
    )
    if model_config.fused_hidden_size * model_config.spatial_merge_size**2 != model_config.vision_hidden_size:
        model_config.is_trained = False  # the LLaVA's projector does not fit, so it is new
    tokenizer = processor.tokenizer
    template = processor.chat_template or chat_template_for(
        tokenizer.chat_template, processor.image_token, tokenizer.special_tokens_map, llava
    )
    return Parts(
        config=model_config,
        sources=given,
        tokenizer=_with_pad_token(tokenizer),
        image_processor=processor.image_processor,
        diffusion_tokenizers=[] if published is None else published.tokenizers,
        chat_template=template,
        pad_to_square=False,
    )


def diffusion_image_processor(config: SDLlavaDiffusionConfig) -> CLIPImageProcessorPil:
    """The image processor of a diffusion tower: a square image at the VAE's size, bicubic, in [-1, 1]."""
    size = {"height": config.image_size, "width": config.image_size}
    return CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def _read_diffusion(diffusion: str | None, config: dict[str, Any]) -> tuple[PublishedDiffusion | None, dict[str, Any]]:
    """The diffusion model as published, and the fields of the whole model."""
    unknown = sorted(set(config) - DIFFUSION_FIELDS - MODEL_FIELDS)
    orphans = sorted(set(config) & DIFFUSION_FIELDS) if diffusion is None else []
    if orphans:
        raise ValueError(f"{orphans[0]!r} is a field of a diffusion tower. Give diffusion, or leave the field out.")
    if unknown:
        known = ", ".join(sorted(DIFFUSION_FIELDS | MODEL_FIELDS))
        raise TypeError(
            f"{unknown[0]!r} is not a field of SDLlavaConfig or SDLlavaDiffusionConfig. Use one of {known}."
        )
    model_fields = {name: value for name, value in config.items() if name in MODEL_FIELDS}
    if diffusion is None:
        return None, model_fields
    tower_fields = {name: value for name, value in config.items() if name in DIFFUSION_FIELDS}
    return read_published(diffusion, **tower_fields), model_fields


def _model_config(sources: dict[str, str], **fields: Any) -> SDLlavaConfig:
    with unexpected_reported(", ".join(map(str, sources.values())), "the configuration", FIELD_ERRORS):
        return SDLlavaConfig(**fields)


def _describe(sources: dict[str, str]) -> dict[str, dict[str, Any]]:
    where = {name: split_revision(source) for name, source in sources.items()}
    return {
        name: describe_source(part["pretrained_model_name_or_path"], part.get("revision"))
        for name, part in where.items()
    }


def _with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer
