"""The model and the processor of a run: assembled from published parts, or loaded from a checkpoint."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils import logging

from ..chat_templates import training_template
from ..configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from ..modeling_sdllava import SDLlavaForConditionalGeneration
from ..parts import Parts, diffusion_image_processor, read_llava_parts, read_parts
from ..processors import SDLlavaProcessor
from ..repositories import split_revision
from .adapters import inject_unet_lora, is_adapter, load_merged
from .arguments import AdapterArguments, ModelArguments

logger = logging.get_logger(__name__)

NEW_PARTS = ("model.fusion.", "model.implicit_captioner.", "model.diffusion_tower.ensemble.")
"""Parts that a checkpoint may lack when the run adds them."""


@dataclass(frozen=True)
class ModelSource:
    """Where the model of a run comes from, read and checked once, before any weights.

    Attributes:
        kind: "parts", "llava", "sdllava" (a checkpoint) or "adapter".
        arguments: The arguments of the run's model.
        adapters: Ranks and scales of LoRA.
        parts: What a model of kind "parts" or "llava" is assembled from.
        config: The checkpoint's configuration as the run sets it; None for the other kinds.
    """

    kind: str
    arguments: ModelArguments
    adapters: AdapterArguments
    parts: Parts | None = None
    config: SDLlavaConfig | None = None


def read_source(arguments: ModelArguments, adapters: AdapterArguments | None = None) -> ModelSource:
    """Read configurations and tokenizers of a run's model, but no weights.

    Args:
        arguments: Where the model comes from, what the run changes, and the stage.
        adapters: Ranks and scales. Default: no LoRA.

    Raises:
        ValueError: The arguments name no model, or one of another architecture, what the run changes does not fit,
            LoRA or 4 bits need another kind of checkpoint, or the run sets 4 bits without LoRA.
        FileNotFoundError: The checkpoint does not exist.
    """
    adapters = adapters or AdapterArguments()
    kind, config = _kind_and_config(arguments)
    _check_adapters(arguments, adapters, kind)
    parts = None
    if kind == "parts":
        names = ("diffusion", "vision", "language_model")
        parts = read_parts(**{name: getattr(arguments, name) for name in names}, **arguments.overrides())
    elif kind == "llava":
        parts = read_llava_parts(str(arguments.init_from), arguments.diffusion, **arguments.overrides())
    return ModelSource(kind, arguments, adapters, parts, None if config is None else apply_overrides(config, arguments))


def _kind_and_config(arguments: ModelArguments) -> tuple[str, SDLlavaConfig | None]:
    """The kind of a run's model, and the configuration of a checkpoint of this package."""
    if arguments.init_from is None:
        if arguments.language_model is None:
            raise ValueError("No model to train. Give init_from, or language_model with diffusion or vision.")
        return "parts", None
    if is_adapter(arguments.init_from):
        return "adapter", None
    try:
        config = AutoConfig.from_pretrained(**split_revision(arguments.init_from), trust_remote_code=False)
    except OSError as error:
        raise FileNotFoundError(
            f"Checkpoint {arguments.init_from!r} (init_from) does not exist. Train its stage first, or give a folder, "
            "a repository or repository@revision."
        ) from error
    if config.model_type not in ("sdllava", "llava"):
        raise ValueError(
            f"init_from={arguments.init_from!r} is a {config.model_type!r} model. Use an SDLlava or a LLaVA checkpoint."
        )
    return config.model_type, config if isinstance(config, SDLlavaConfig) else None


def build_processor(source: ModelSource) -> SDLlavaProcessor:
    """The processor of a run, for a LLaVA with a chat template that marks the ends of answers."""
    config = source.config if source.parts is None else source.parts.config
    if source.parts is not None:
        processor = SDLlavaProcessor.from_parts(source.parts)
    else:
        processor = SDLlavaProcessor.from_pretrained(**split_revision(str(source.arguments.init_from)))
    if config is not None and "llava" in (config.components or {}):
        tokens: Any = processor.tokenizer.special_tokens_map
        processor.chat_template = training_template(processor.chat_template, processor.image_token, tokens)
    if source.config is not None:
        processor.num_image_tokens = source.config.num_image_tokens
        if isinstance(source.config.diffusion_config, SDLlavaDiffusionConfig):
            processor.diffusion_image_processor = diffusion_image_processor(source.config.diffusion_config)
    return processor


def build_model(source: ModelSource) -> SDLlavaForConditionalGeneration:
    """The model of a run, with its stage set, and with LoRA in the UNet where only the UNet has LoRA.

    SFTTrainer adds LoRA on the language model; see [`~sdllava.train.adapters.language_lora`].

    Raises:
        ValueError: A checkpoint lacks weights that the run needs.
        ImportError: 4 bits need an extra.
    """
    arguments, adapters = source.arguments, source.adapters
    model = _load_in_4bit(source) if adapters.load_in_4bit else _load(source)
    if arguments.attn_implementation:
        model.model.language_model.set_attn_implementation(arguments.attn_implementation)
    if not adapters.load_in_4bit:
        model.set_stage(arguments.stage)
    if adapters.unet_lora_r and not adapters.lora_r:
        inject_unet_lora(model, adapters.unet_lora_r, adapters.unet_lora_alpha, adapters.lora_dropout)
    return model


def hold_trained_in_float32(model: torch.nn.Module) -> None:
    """Convert trained half-precision parameters to float32 for autocast, so that small updates are not rounded away."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def hold_vae_in_float32(model: SDLlavaForConditionalGeneration) -> None:
    """Convert the VAE's parameters to buffers, in place, if the configuration keeps it in float32.

    DeepSpeed casts every parameter to its half precision, but no buffers of modules that a model keeps in float32.
    """
    tower: Any = model.model.diffusion_tower
    vae = None if tower is None else getattr(tower.backbone, "vae", None)
    if vae is None or not tower.config.vae_in_fp32:
        return
    for module in vae.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.data)


def _check_adapters(arguments: ModelArguments, adapters: AdapterArguments, kind: str) -> None:
    if adapters.lora_r and kind == "llava":
        raise ValueError(
            f"lora_r={adapters.lora_r} saves an adapter, which needs an SDLlava checkpoint as its base. Convert "
            f"{arguments.init_from!r} with sdllava compose and give the result in init_from."
        )
    if adapters.lora_r and arguments.stage != "finetune":
        raise ValueError(
            f"lora_r={adapters.lora_r} adapts the language model, which stage {arguments.stage!r} keeps frozen. Use "
            "stage: finetune, or lora_r: 0."
        )
    if adapters.lora_r and (kind != "sdllava" or arguments.overrides()):
        raise ValueError(
            f"lora_r={adapters.lora_r} saves an adapter, which needs an unchanged SDLlava checkpoint as its base. "
            f"Give one in init_from (not {arguments.init_from!r}), and set no field of its configuration "
            f"({sorted(arguments.overrides())})."
        )
    if adapters.load_in_4bit and not adapters.lora_r:
        raise ValueError("load_in_4bit holds the language model in 4 bits, which cannot be trained. Set lora_r.")
    if adapters.load_in_4bit and kind != "sdllava":
        raise ValueError(
            f"load_in_4bit needs an SDLlava checkpoint in init_from, not {arguments.init_from!r}. Write one with "
            "sdllava compose or sdllava merge."
        )
    if kind == "adapter" and arguments.overrides():
        raise ValueError(
            f"init_from={arguments.init_from!r} is an adapter, but the run sets {sorted(arguments.overrides())}. Merge "
            "it with sdllava merge first."
        )


def _load(source: ModelSource) -> SDLlavaForConditionalGeneration:
    dtype = getattr(torch, source.arguments.dtype)
    if source.parts is not None:
        return SDLlavaForConditionalGeneration.from_parts(source.parts, dtype)
    if source.kind == "adapter":
        return load_merged(str(source.arguments.init_from)).to(dtype)
    return _load_checkpoint(source, dtype=dtype)


def apply_overrides(config: SDLlavaConfig, arguments: ModelArguments) -> SDLlavaConfig:
    """A checkpoint's configuration as the run sets it, checked like a new one.

    Args:
        config: The checkpoint's configuration.
        arguments: The arguments of the run.

    Raises:
        ValueError: The checkpoint has no diffusion tower for the fields, a field does not fit, or the checkpoint's
            projector would not fit.
    """
    if not arguments.overrides():
        return config
    before = config.fused_hidden_size * config.spatial_merge_size**2
    changes = arguments.diffusion_overrides()
    if changes and config.diffusion_config is None:
        raise ValueError(
            f"init_from={arguments.init_from!r} has no diffusion tower, but the run sets {sorted(changes)}. Leave them "
            "out, or use another checkpoint."
        )
    fields = config.to_dict() | arguments.model_overrides()
    if changes:
        fields["diffusion_config"] |= changes
    config = SDLlavaConfig.from_dict(fields)
    after = config.fused_hidden_size * config.spatial_merge_size**2
    if after != before:
        raise ValueError(
            f"init_from={arguments.init_from!r} has a projector for {before} channels, but the run's settings give "
            f"{after}. Train the align stage with these settings first."
        )
    return config


def _load_checkpoint(source: ModelSource, **options: Any) -> SDLlavaForConditionalGeneration:
    init_from = str(source.arguments.init_from)
    model, info = SDLlavaForConditionalGeneration.from_pretrained(
        config=source.config, output_loading_info=True, **split_revision(init_from), **options
    )
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if not name.startswith(NEW_PARTS)]
    if lost:
        raise ValueError(
            f"init_from={init_from!r} lacks weights that the run needs ({lost[0]} and {len(lost) - 1} more). "
            "A checkpoint holds the diffusion model only up to its last tap: assemble the model from its parts again."
        )
    if missing:
        logger.warning(f"New in this run and not trained yet: {', '.join(missing)}")
    return model


def _load_in_4bit(source: ModelSource) -> SDLlavaForConditionalGeneration:
    if find_spec("bitsandbytes") is None:
        raise ImportError('load_in_4bit needs bitsandbytes. Install it with: pip install "sdllava[quantize]"')
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", r"model\.(?!language_model\.)[^.]+"],  # all but the language model
    )
    return _load_checkpoint(source, quantization_config=quantization, dtype=torch.bfloat16)
