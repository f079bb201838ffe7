"""LoRA on the language model and on the UNet's cross-attention, and merging adapters into the weights.

With LoRA on the language model, a run trains and saves an adapter, which also holds the projector, the fusion and the
implicit captioner. With LoRA only on the UNet, the language model trains in full, so the run saves a whole model.
"""

import json
import re
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from ..atomic_files import atomic_path, write_json
from ..configuration import SDLlavaConfig
from ..modeling_sdllava import SDLlavaForConditionalGeneration
from ..processors import SDLlavaProcessor
from ..registration import register
from ..repositories import check_adapter
from .arguments import AdapterArguments

LANGUAGE_TARGETS = r".*\blanguage_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
UNET_TARGETS = r".*\battn2\.(to_q|to_k|to_v|to_out\.0)"
UNET_ADAPTER_FILE = "unet_adapter.json"
SAVED_MODULES = ("multi_modal_projector", "fusion", "implicit_captioner")


def language_lora(model: SDLlavaForConditionalGeneration, arguments: AdapterArguments) -> LoraConfig | None:
    """The adapter configuration of a run with LoRA on the language model, for SFTTrainer.

    Args:
        model: The model of the run.
        arguments: Ranks and scales.

    Returns:
        `LoraConfig | None`: None without LoRA on the language model.
    """
    if not arguments.lora_r:
        return None
    targets = _linear_layers(model, LANGUAGE_TARGETS)
    ranks, scales = {}, {}
    if arguments.unet_lora_r:
        targets += _linear_layers(model, UNET_TARGETS)
        ranks, scales = {UNET_TARGETS: arguments.unet_lora_r}, {UNET_TARGETS: arguments.unet_lora_alpha}
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=scales,
        modules_to_save=[
            name for name in SAVED_MODULES if arguments.train_projector and getattr(model.model, name) is not None
        ],
        task_type="CAUSAL_LM",
    )


def inject_unet_lora(model: SDLlavaForConditionalGeneration, rank: int, alpha: int, dropout: float = 0.0) -> None:
    """Add trainable LoRA to the UNet's cross-attention, in place (S4, 6.1).

    Args:
        model: A model with a diffusion tower.
        rank: Rank of the adapter.
        alpha: Scale of the adapter; divided by the rank.
        dropout: Dropout probability of the adapter's input, in [0, 1].

    Raises:
        ValueError: The model has no diffusion tower.
    """
    tower: Any = model.model.diffusion_tower
    if tower is None:
        raise ValueError(f"unet_lora_r={rank} needs a diffusion tower, which the model does not have. Set it to 0.")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=_linear_layers(tower.unet, UNET_TARGETS)
    )
    inject_adapter_in_model(config, tower.unet)
    tower.unet.peft_config = {"default": config}


def _linear_layers(module: nn.Module, pattern: str) -> list[str]:
    """The names of the linear layers that match; modules after the last tap are cut away and not among them."""
    linear = (name for name, layer in module.named_modules() if isinstance(layer, nn.Linear))
    return [name for name in linear if re.fullmatch(pattern, name)]


def unet_adapter(model: nn.Module) -> dict[str, float] | None:
    """Rank, scale and dropout of the LoRA injected into the model's UNet, or None without it."""
    tower = getattr(getattr(model, "model", None), "diffusion_tower", None)
    config = None if tower is None else getattr(tower.unet, "peft_config", {}).get("default")
    return None if config is None else {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}


def merge_unet_lora(model: SDLlavaForConditionalGeneration) -> None:
    """Add the UNet's injected LoRA to its weights and remove the adapter's modules, in place."""
    tower: Any = model.model.diffusion_tower
    unet = tower.unet
    layers = [(name, module) for name, module in unet.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, layer in layers:
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(unet.get_submodule(parent), leaf, layer.get_base_layer())
    del unet.peft_config
    unet.requires_grad_(False)


def is_adapter(folder: str) -> bool:
    """Whether a folder holds an adapter of the language model, or a checkpoint with one in the UNet."""
    return any((Path(folder) / name).is_file() for name in ("adapter_config.json", UNET_ADAPTER_FILE))


def load_merged(folder: str) -> SDLlavaForConditionalGeneration:
    """Load a model with its adapter merged into the weights.

    Args:
        folder: An adapter that a LoRA run saved, or a checkpoint of a run with LoRA only on the UNet.

    Raises:
        ValueError: The adapter does not name its base, or the checkpoint does not fit its configuration.
    """
    if (Path(folder) / UNET_ADAPTER_FILE).is_file():
        return _load_unet_checkpoint(folder)
    check_adapter(folder)
    base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if not base:
        raise ValueError(
            f"Adapter {folder!r} does not name its base model. Set base_model_name_or_path in its adapter_config.json."
        )
    model = SDLlavaForConditionalGeneration.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
    if merged.config.is_trained is False:  # of the base
        merged.config.is_trained = True
    return merged


def merge(source: str, target: str) -> None:
    """Write the merged model of an adapter, with its processor, to a new folder.

    Args:
        source: A folder that a LoRA run saved.
        target: The folder to write.

    Raises:
        ValueError: `source` holds no adapter.
        FileExistsError: `target` exists.
    """
    register()
    if not is_adapter(source):
        raise ValueError(f"{source!r} holds no adapter. Give a folder that a LoRA run saved.")
    if Path(target).exists():
        raise FileExistsError(f"{target!r} exists. Give a new folder.")
    with atomic_path(target) as written:
        load_merged(source).save_pretrained(written)
        SDLlavaProcessor.from_pretrained(source).save_pretrained(written)


def write_unet_adapter(model: nn.Module, folder: str) -> None:
    """Record the UNet's LoRA in the folder of a checkpoint, so that `merge` can read the checkpoint."""
    write_json(Path(folder) / UNET_ADAPTER_FILE, unet_adapter(model))


def _load_unet_checkpoint(folder: str) -> SDLlavaForConditionalGeneration:
    """Build the model of a checkpoint, add its adapter, load the weights, and merge."""
    model: Any = SDLlavaForConditionalGeneration(SDLlavaConfig.from_pretrained(folder))
    inject_unet_lora(model, **json.loads((Path(folder) / UNET_ADAPTER_FILE).read_text(encoding="utf-8")))
    weights = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        weights.update(load_file(path))
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    if unexpected or set(missing) - set(model.all_tied_weights_keys):
        raise ValueError(
            f"Checkpoint {folder!r} does not fit its configuration: {(missing + unexpected)[:3]}. Use another "
            "checkpoint of the run."
        )
    merge_unet_lora(model)
    return model
