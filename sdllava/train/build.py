"""The model and the processor of a run: assembled, or continued from a checkpoint."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig
from transformers.utils import logging

from ..chat_templates import chat_template_for
from ..components import compose, compose_from_llava, plan, plan_from_llava
from ..configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from ..modeling_sdllava import SDLlavaForConditionalGeneration
from ..processors import SDLlavaProcessor, diffusion_image_processor
from ..repositories import split_revision
from .adapters import inject_unet_lora, is_adapter, load_merged
from .arguments import DIFFUSION_FIELDS, MODEL_FIELDS, AdapterArguments, ModelArguments

logger = logging.get_logger(__name__)

NEW_PARTS = ("model.fusion.", "model.implicit_captioner.", "model.diffusion_tower.ensemble.")
"""Parts that a checkpoint may lack when the run adds them."""


@dataclass(frozen=True)
class Built:
    """A model in training form, and its processor."""

    model: SDLlavaForConditionalGeneration
    processor: SDLlavaProcessor


def build_processor(arguments: ModelArguments) -> SDLlavaProcessor:
    """The processor of a run, without reading weights."""
    kind = _source_kind(arguments)
    if kind == "parts":
        return plan(**_parts(arguments), **arguments.overrides()).processor
    if kind == "llava":
        processor = plan_from_llava(arguments.init_from, arguments.diffusion, **arguments.overrides()).processor
        processor.chat_template = chat_template_for(None, processor.image_token)  # theirs marks no end token
        return processor
    processor = SDLlavaProcessor.from_pretrained(**split_revision(arguments.init_from))
    if kind == "adapter":
        return processor
    config = _with_overrides(SDLlavaConfig.from_pretrained(**split_revision(arguments.init_from)), arguments)
    processor.num_image_tokens = config.num_image_tokens
    if isinstance(config.diffusion_config, SDLlavaDiffusionConfig):
        processor.diffusion_image_processor = diffusion_image_processor(config.diffusion_config)
    return processor


def build_model(arguments: ModelArguments, adapters: AdapterArguments) -> SDLlavaForConditionalGeneration:
    """The model of a run, its stage set, with LoRA in the UNet where that alone is asked for.

    Raises:
        ValueError: a checkpoint does not fit what the run changes, LoRA or 4 bits are asked of something else than a
            checkpoint of ours, or 4 bits without LoRA.
    """
    dtype = getattr(torch, arguments.dtype)
    kind = _source_kind(arguments)
    if adapters.lora_r and kind == "llava":
        raise ValueError(
            f"lora_r={adapters.lora_r} saves an adapter, which belongs to a checkpoint of ours: make one of "
            f"{arguments.init_from} first (sdllava compose) and give it in init_from"
        )
    if adapters.load_in_4bit and not adapters.lora_r:
        raise ValueError("load_in_4bit holds the language model in 4 bits, which cannot train themselves: set lora_r")
    if adapters.load_in_4bit:
        model = _load_in_4bit(arguments, kind)
    elif kind == "parts":
        model = compose(**_parts(arguments), dtype=dtype, **arguments.overrides())
    elif kind == "llava":
        model = compose_from_llava(arguments.init_from, arguments.diffusion, dtype=dtype, **arguments.overrides())
    elif kind == "adapter":
        if arguments.overrides():
            raise ValueError(
                f"init_from={arguments.init_from} is an adapter, and the run sets {sorted(arguments.overrides())}: "
                "merge it first (sdllava merge)"
            )
        model = load_merged(arguments.init_from).to(dtype)
    else:
        model = _load_checkpoint(arguments, dtype=dtype)
    if arguments.attn_implementation:
        model.model.language_model.set_attn_implementation(arguments.attn_implementation)
    if not adapters.load_in_4bit:
        model.set_stage(arguments.stage)
    if adapters.unet_lora_r and not adapters.lora_r:
        inject_unet_lora(model, adapters.unet_lora_r, adapters.unet_lora_alpha, adapters.lora_dropout)
    return model


def hold_trained_in_float32(model: torch.nn.Module) -> None:
    """Trained parameters in float32 under autocast, so that small updates are not lost to rounding."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _source_kind(arguments: ModelArguments) -> str:
    if arguments.init_from is None:
        if arguments.language_model is None:
            raise ValueError("there is no model to train: give init_from, or language_model with diffusion or vision")
        return "parts"
    if is_adapter(arguments.init_from):
        return "adapter"
    try:
        config = AutoConfig.from_pretrained(**split_revision(arguments.init_from))
    except OSError as error:
        raise FileNotFoundError(
            f"there is no checkpoint {arguments.init_from} to continue from (init_from): train its stage first, or "
            "give a folder, a repository or repository@revision"
        ) from error
    kinds = {"sdllava": "sdllava", "llava": "llava"}
    if config.model_type not in kinds:
        raise ValueError(f"init_from={arguments.init_from} is a {config.model_type!r}; it should be ours or a LLaVA")
    return kinds[config.model_type]


def _parts(arguments: ModelArguments) -> dict[str, str | None]:
    return {name: getattr(arguments, name) for name in ("diffusion", "vision", "language_model")}


def _with_overrides(config: SDLlavaConfig, arguments: ModelArguments) -> SDLlavaConfig:
    """Change a checkpoint's configuration as the run asks, in place; its trained parts must still fit."""
    before = config.fused_hidden_size
    changes = arguments.overrides(DIFFUSION_FIELDS)
    if changes and config.diffusion_config is None:
        raise ValueError(f"init_from={arguments.init_from} has no diffusion tower, but the run sets {sorted(changes)}")
    for name, value in changes.items():
        setattr(config.diffusion_config, name, [float(s) for s in value] if name == "guidance_scales" else value)
    for name, value in arguments.overrides(MODEL_FIELDS).items():
        setattr(config, name, value)
    if config.fused_hidden_size != before:
        raise ValueError(
            f"init_from={arguments.init_from} has a projector for {before} channels, but what the run sets gives "
            f"{config.fused_hidden_size}: train the align stage with these settings first"
        )
    return config


def _load_checkpoint(arguments: ModelArguments, **options: Any) -> SDLlavaForConditionalGeneration:
    where = split_revision(arguments.init_from)
    config = _with_overrides(SDLlavaConfig.from_pretrained(**where), arguments)
    model, info = SDLlavaForConditionalGeneration.from_pretrained(
        config=config, output_loading_info=True, **where, **options
    )
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if not name.startswith(NEW_PARTS)]
    if lost:
        raise ValueError(
            f"init_from={arguments.init_from} lacks weights that the run needs ({lost[0]} and {len(lost) - 1} more): a "
            "checkpoint holds the diffusion model up to its deepest tap only"
        )
    if missing:
        logger.warning(f"new in this run, and untrained: {', '.join(missing)}")
    return model


def _load_in_4bit(arguments: ModelArguments, kind: str) -> SDLlavaForConditionalGeneration:
    from transformers import BitsAndBytesConfig

    if kind != "sdllava":
        raise ValueError("load_in_4bit needs a checkpoint of ours in init_from: compose or merge one first")
    if find_spec("bitsandbytes") is None:
        raise ImportError("load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", r"model\.(?!language_model\.)[^.]+"],  # all but the language model
    )
    return _load_checkpoint(arguments, quantization_config=quantization, dtype=torch.bfloat16)
