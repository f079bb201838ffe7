"""The model and the processor of a run: assembled from published parts, or loaded from a checkpoint."""

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils import logging

from ..chat_templates import VICUNA_V1_5
from ..configuration import SDLlavaConfig, SDLlavaDiffusionConfig
from ..modeling_sdllava import SDLlavaForConditionalGeneration
from ..parts import diffusion_image_processor, read_llava_parts, read_parts
from ..processors import SDLlavaProcessor
from ..repositories import split_revision
from .adapters import inject_unet_lora, is_adapter, load_merged
from .arguments import AdapterArguments, ModelArguments

logger = logging.get_logger(__name__)

NEW_PARTS = ("model.fusion.", "model.implicit_captioner.", "model.diffusion_tower.ensemble.")
"""Parts that a checkpoint may lack when the run adds them."""


def build_processor(arguments: ModelArguments) -> SDLlavaProcessor:
    """The processor of a run. Reads configurations and tokenizers, but no weights.

    Raises:
        ValueError: The arguments name no model, or one of another architecture.
        FileNotFoundError: The checkpoint does not exist.
    """
    kind = _source_kind(arguments)
    if kind == "parts":
        return SDLlavaProcessor.from_parts(read_parts(**_parts(arguments), **arguments.overrides()))
    source = str(arguments.init_from)
    if kind == "llava":
        processor = SDLlavaProcessor.from_parts(read_llava_parts(source, arguments.diffusion, **arguments.overrides()))
        processor.chat_template = VICUNA_V1_5.replace(
            "<image>", processor.image_token
        )  # LLaVA's own marks no end token
        return processor
    processor = SDLlavaProcessor.from_pretrained(**split_revision(source))
    if kind == "adapter":
        return processor
    config = apply_overrides(SDLlavaConfig.from_pretrained(**split_revision(source)), arguments)
    processor.num_image_tokens = config.num_image_tokens
    if isinstance(config.diffusion_config, SDLlavaDiffusionConfig):
        processor.diffusion_image_processor = diffusion_image_processor(config.diffusion_config)
    return processor


def build_model(arguments: ModelArguments, adapters: AdapterArguments) -> SDLlavaForConditionalGeneration:
    """The model of a run, with its stage set, and with LoRA in the UNet where only the UNet has LoRA.

    Args:
        arguments: Where the model comes from, what the run changes, and the stage.
        adapters: Ranks and scales. SFTTrainer adds LoRA on the language model; see
            [`~sdllava.train.adapters.language_lora`].

    Raises:
        ValueError: A checkpoint does not fit what the run changes, LoRA or 4 bits need another kind of checkpoint, or
            the run sets 4 bits without LoRA.
        FileNotFoundError: The checkpoint does not exist.
    """
    kind = _source_kind(arguments)
    _check_adapters(arguments, adapters, kind)
    model = _load_in_4bit(arguments) if adapters.load_in_4bit else _load(arguments, kind)
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


def _source_kind(arguments: ModelArguments) -> str:
    """Where the model comes from: "parts", "adapter", "sdllava" or "llava"."""
    if arguments.init_from is None:
        if arguments.language_model is None:
            raise ValueError("No model to train. Give init_from, or language_model with diffusion or vision.")
        return "parts"
    if is_adapter(arguments.init_from):
        return "adapter"
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
    return config.model_type


def _parts(arguments: ModelArguments) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("diffusion", "vision", "language_model")}


def _load(arguments: ModelArguments, kind: str) -> SDLlavaForConditionalGeneration:
    dtype = getattr(torch, arguments.dtype)
    if kind == "parts":
        return SDLlavaForConditionalGeneration.from_component_pretrained(
            **_parts(arguments), dtype=dtype, **arguments.overrides()
        )
    source = str(arguments.init_from)
    if kind == "llava":
        return SDLlavaForConditionalGeneration.from_llava_pretrained(
            source, arguments.diffusion, dtype=dtype, **arguments.overrides()
        )
    if kind == "adapter":
        return load_merged(source).to(dtype)
    return _load_checkpoint(arguments, dtype=dtype)


def apply_overrides(config: SDLlavaConfig, arguments: ModelArguments) -> SDLlavaConfig:
    """Change a checkpoint's configuration as the run sets it, in place.

    Args:
        config: The checkpoint's configuration.
        arguments: The arguments of the run.

    Raises:
        ValueError: The checkpoint has no diffusion tower for the fields, or its projector would not fit.
    """
    before = config.fused_hidden_size
    changes = arguments.diffusion_overrides()
    if changes and config.diffusion_config is None:
        raise ValueError(
            f"init_from={arguments.init_from!r} has no diffusion tower, but the run sets {sorted(changes)}. Leave them "
            "out, or use another checkpoint."
        )
    for name, value in changes.items():
        setattr(config.diffusion_config, name, [float(s) for s in value] if name == "guidance_scales" else value)
    for name, value in arguments.model_overrides().items():
        setattr(config, name, value)
    if config.fused_hidden_size != before:
        raise ValueError(
            f"init_from={arguments.init_from!r} has a projector for {before} channels, but the run's settings give "
            f"{config.fused_hidden_size}. Train the align stage with these settings first."
        )
    return config


def _load_checkpoint(arguments: ModelArguments, **options: Any) -> SDLlavaForConditionalGeneration:
    where = split_revision(str(arguments.init_from))
    config = apply_overrides(SDLlavaConfig.from_pretrained(**where), arguments)
    model, info = SDLlavaForConditionalGeneration.from_pretrained(
        config=config, output_loading_info=True, **where, **options
    )
    missing = sorted(info["missing_keys"])
    lost = [name for name in missing if not name.startswith(NEW_PARTS)]
    if lost:
        raise ValueError(
            f"init_from={arguments.init_from!r} lacks weights that the run needs ({lost[0]} and {len(lost) - 1} more). "
            "A checkpoint holds the diffusion model only up to its last tap: assemble the model from its parts again."
        )
    if missing:
        logger.warning(f"New in this run and not trained yet: {', '.join(missing)}")
    return model


def _load_in_4bit(arguments: ModelArguments) -> SDLlavaForConditionalGeneration:
    if find_spec("bitsandbytes") is None:
        raise ImportError('load_in_4bit needs bitsandbytes. Install it with: pip install "sdllava[quantize]"')
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", r"model\.(?!language_model\.)[^.]+"],  # all but the language model
    )
    return _load_checkpoint(arguments, quantization_config=quantization, dtype=torch.bfloat16)
