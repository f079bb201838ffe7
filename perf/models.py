"""Models of the published sizes, and small ones, with random weights that are fast to create."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from sdllava import SDLlavaConfig, SDLlavaDiffusionConfig, SDLlavaDiffusionModel, SDLlavaForConditionalGeneration
from sdllava.configuration import CLIP_VIT_L_14_336
from sdllava.families import StableDiffusion

CLIP_L_TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "vocab_size": 49408,
}
OPEN_CLIP_BIG_G_TEXT = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    "vocab_size": 49408,
}
SD_1_5 = {
    "unet_config": {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "layers_per_block": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
    "text_encoder_config": CLIP_L_TEXT,
    "null_input_ids": [49406] + [49407] * 76,
}
SDXL = {
    "unet_config": {
        "sample_size": 128,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "layers_per_block": 2,
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "use_linear_projection": True,
    },
    "vae_config": {**StableDiffusion.default_parts["vae_config"], "scaling_factor": 0.13025, "sample_size": 1024},
    "text_encoder_config": CLIP_L_TEXT,
    "text_encoder_2_config": OPEN_CLIP_BIG_G_TEXT,
    "null_input_ids": [49406] + [49407] * 76,
    "null_input_ids_2": [49406, 49407] + [0] * 75,
}
DIFFUSION_MODELS: dict[str, dict[str, Any]] = {"sd15": SD_1_5, "sd21": {}, "sdxl": SDXL}
"""The fields of each published configuration that differ from Stable Diffusion 2.1-base's."""

_SMALL_CHANNELS = {"sd15": [32, 64, 128, 128], "sd21": [32, 64, 128, 128], "sdxl": [32, 64, 128]}
_SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL_VAE = {
    **StableDiffusion.default_parts["vae_config"],
    "block_out_channels": [32, 32, 64, 64],
    "norm_num_groups": 8,
}


def diffusion_config(model: str, size: str, **fields: Any) -> SDLlavaDiffusionConfig:
    """The diffusion tower's configuration, by default at the papers' tap, t = 50 and s = 4.

    Args:
        model (`str`): `"sd15"`, `"sd21"` or `"sdxl"`.
        size (`str`): `"full"` or `"mini"`.
        fields (`Any`): Fields of `SDLlavaDiffusionConfig` to change.

    Raises:
        SystemExit: If there is no such model.
    """
    if model not in DIFFUSION_MODELS:
        raise SystemExit(f"--model {model!r} is not supported. Use {', '.join(DIFFUSION_MODELS)}.")
    parts = {**StableDiffusion.default_parts, **DIFFUSION_MODELS[model]}
    if size == "mini":
        parts = _shrink(model, parts)
        fields = {"image_size": 128, "grid_size": 4, **fields}
    return SDLlavaDiffusionConfig(**parts, **fields)


def _shrink(model: str, parts: dict[str, Any]) -> dict[str, Any]:
    encoders = [name for name in ("text_encoder_config", "text_encoder_2_config") if name in parts]
    text: dict[str, Any] = {name: {**parts[name], **_SMALL_TEXT, "projection_dim": 64} for name in encoders}
    channels = _SMALL_CHANNELS[model]
    unet = {
        **parts["unet_config"],
        "block_out_channels": channels,
        "attention_head_dim": [width // 32 for width in channels],
        "cross_attention_dim": 64 * len(encoders),
        "norm_num_groups": 8,
    }
    if "addition_embed_type" in unet:
        unet |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64 + 6 * 8}
    return {**parts, **text, "unet_config": unet, "vae_config": _SMALL_VAE}


def vision_config(size: str, **fields: Any) -> CLIPVisionConfig:
    """The configuration of CLIP ViT-L/14-336, or of a small CLIP, with other fields."""
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"image_size": 112, "patch_size": 14}
    return CLIPVisionConfig(**{**CLIP_VIT_L_14_336, **(small if size == "mini" else {}), **fields})


def text_config(size: str) -> LlamaConfig:
    """The configuration of Vicuna-7B, or of a small Llama."""
    small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes = {**small, "num_key_value_heads": 4, "vocab_size": 2048} if size == "mini" else {"vocab_size": 32064}
    return LlamaConfig(**sizes, max_position_embeddings=4096)


def model_config(size: str, model: str = "sd21", **fields: Any) -> SDLlavaConfig:
    """The configuration of the papers' model: diffusion tower, CLIP, language model, cross-attention fusion."""
    return SDLlavaConfig(
        **{
            "text_config": text_config(size),
            "vision_config": vision_config(size),
            "diffusion_config": diffusion_config(model, size),
            "image_token_index": text_config(size).vocab_size - 1,
            "fusion_num_attention_heads": 16 if size == "full" else 4,
            **fields,
        }
    )


def fill_randomly(module: nn.Module, device: torch.device, dtype: torch.dtype, std: float = 0.02) -> nn.Module:
    """Allocates a module's meta parameters in place and fills them.

    Vectors become ones, biases zeros, and other weights normal numbers. One block of normal numbers is drawn and
    repeated, because drawing billions of numbers takes minutes.

    Args:
        module (`nn.Module`): A module on the meta device.
        device (`torch.device`): Device of the new parameters.
        dtype (`torch.dtype`): Dtype of the new parameters.
        std (`float`): Standard deviation of the normal numbers.

    Returns:
        `nn.Module`: The same module.
    """
    drawn = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).mul_(std)
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            tensor = torch.empty(parameter.shape, device=device, dtype=dtype)
            if name == "bias":
                tensor.zero_()
            elif parameter.ndim == 1:
                tensor.fill_(1.0)
            else:
                block = drawn.to(device, dtype)
                for piece in tensor.view(-1).split(len(block)):
                    piece.copy_(block[: len(piece)])
            setattr(child, name, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    return module


def build(make: Callable[[Any], nn.Module], config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Builds a model with random weights and computed buffers, in evaluation mode.

    Args:
        make (`Callable`): A model class.
        config (`PreTrainedConfig`): Its configuration.
        device (`torch.device`): Device of the weights.
        dtype (`torch.dtype`): Dtype of the weights.
    """
    with torch.device("meta"):
        model = make(config)
    fill_randomly(model, device, dtype)
    for child in model.modules():
        for name, buffer in list(child.named_buffers(recurse=False)):
            if buffer.device.type == "meta":
                setattr(child, name, _buffer(child, name, buffer, device))
    return model.eval()


def _buffer(module: nn.Module, name: str, buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    if name == "position_ids":
        return torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
    rotary_embedding: Any = type(module)
    return getattr(rotary_embedding(module.config), name).to(device)  # its frequencies


def build_tower(
    model: str, size: str, device: torch.device, dtype: torch.dtype, **fields: Any
) -> SDLlavaDiffusionModel:
    """Builds a diffusion tower with random weights. The VAE has the same dtype. See `diffusion_config` for `fields`."""
    return build(SDLlavaDiffusionModel, diffusion_config(model, size, **fields), device, dtype)


def build_vision(size: str, device: torch.device, dtype: torch.dtype) -> CLIPVisionModel:
    """Builds a CLIP vision encoder with random weights."""
    return build(CLIPVisionModel, vision_config(size), device, dtype)


def build_tiny_vae(size: str, device: torch.device, dtype: torch.dtype) -> AutoencoderTiny:
    """Builds a tiny autoencoder with random weights, of TAESD's size (diffusers' default) or smaller."""
    small = {"encoder_block_out_channels": (16,) * 4, "decoder_block_out_channels": (16,) * 4}
    with torch.device("meta"):
        vae = AutoencoderTiny(**(small if size == "mini" else {}))
    return fill_randomly(vae, device, dtype).eval()


def build_llava(
    size: str, device: torch.device, dtype: torch.dtype, tie_layers: bool = False
) -> LlavaForConditionalGeneration:
    """Builds transformers' LLaVA-1.5 with random weights.

    Args:
        size (`str`): `"full"` or `"mini"`.
        device (`torch.device`): Device of the weights.
        dtype (`torch.dtype`): Dtype of the weights.
        tie_layers (`bool`): Whether all layers of the language model use the weights of the first. The number of
            operations stays the same, and the bytes read per token too if a layer is larger than the CPU's caches.
    """
    text, vision = text_config(size), vision_config(size)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=text.vocab_size - 1)
    if not tie_layers:
        return build(LlavaForConditionalGeneration, config, device, dtype)
    count, config.text_config.num_hidden_layers = config.text_config.num_hidden_layers, 1
    llava = build(LlavaForConditionalGeneration, config, device, dtype)
    config.text_config.num_hidden_layers = count
    layers = llava.model.language_model.layers
    for index in range(1, count):
        layer = copy.deepcopy(layers[0], memo={id(p): p for p in layers[0].parameters()})
        layer.self_attn.layer_idx = index
        layers.append(layer)
    return llava


def build_ours(llava: LlavaForConditionalGeneration, size: str, diffusion: bool = True) -> Any:
    """Builds our model around the parts of a LLaVA. The weights are shared.

    Args:
        llava (`LlavaForConditionalGeneration`): The LLaVA.
        size (`str`): Its size.
        diffusion (`bool`): Whether the model has a diffusion tower; otherwise it has CLIP only.
    """
    weight = llava.lm_head.weight
    config = model_config(size) if diffusion else model_config(size, diffusion_config=None)
    with torch.device("meta"):
        model = SDLlavaForConditionalGeneration(config)
    for name in ("vision_tower", "language_model", "multi_modal_projector"):
        setattr(model.model, name, getattr(llava.model, name))
    model.lm_head = llava.lm_head
    if diffusion:
        model.model.diffusion_tower = build_tower("sd21", size, weight.device, weight.dtype)
        fill_randomly(model.model.fusion, weight.device, weight.dtype)
    return model.eval()
