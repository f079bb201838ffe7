"""What fits on GPUs of 24, 48 and 80 GB, for each kind of recipe: prints the page `docs/memory.md`.

The estimate is `sdllava.train.memory.estimate_memory`, which a run on a GPU prints too. The models have the published
sizes and are on the meta device.

    python perf/memory_table.py > docs/memory.md
    python perf/memory_table.py --recipe clip-sd21-cross-attention
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import families
import models
import torch
import typer
from peft import get_peft_model
from transformers import Dinov2Config, PreTrainedConfig

from sdllava import SDLlavaConfig, SDLlavaDiffusionConfig, SDLlavaForConditionalGeneration
from sdllava.presets import PRESETS
from sdllava.train.activations import peak_activations
from sdllava.train.adapters import inject_unet_lora, language_lora
from sdllava.train.arguments import DIFFUSION_FIELDS, MODEL_FIELDS, AdapterArguments
from sdllava.train.build import hold_trained_in_float32
from sdllava.train.memory import state_bytes
from sdllava.train.recipe_loading import find_recipe, load_recipe
from sdllava.train.recipe_rows import CLIP, SD15
from sdllava.train.recipe_table import RECIPES

ROWS = (
    "clip",
    "dino",
    "sd21-u-l1-r1-b0-cross-q",
    "sdxl-no-caption",
    "sdxl-no-caption-lora",
    "sdxl-llava-c",
    "sdxl-implicit-captioner",
    "clip-sd21-concat",
    "clip-sd21-cross-attention",
    "clip-sd15-cross-attention",
    "guidance-select",
    "guidance-attention",
    "guidance-concat",
    "layer-ensemble",
    "multi-level-fusion",
    "feature-selection",
    "gated-fusion",
    "concat-tokens",
    *(f"clip-{name}-cross-attention" for name in ("pixart-alpha", "pixart-sigma", "sd3-medium", "sd35-medium")),
    *(f"clip-{name}-cross-attention" for name in ("flux-dev", "flux-schnell", "if-m", "cleandift-sd15")),
)
"""One recipe for each kind of model in the table of recipes, by the name of its pair of stages."""

DIFFUSION_PARTS: dict[str, dict[str, Any]] = {
    **{preset.diffusion: families.FAMILIES[name] for name, preset in PRESETS.items() if name in families.FAMILIES},
    SD15["diffusion"]: models.SD_1_5,
    "models/cleandift-sd15": models.SD_1_5,
}
GPUS = (24, 48, 80)
USABLE = 0.9
"""Share of a GPU's memory for the estimate. The rest is CUDA's, and what the allocator cannot use."""
LENGTHS = {"align": 768, "finetune": 2048}
"""Tokens of the longest sequences: an image with its caption, and the recipes' `max_length`."""
LARGEST = 64


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        title: The heading of its column.
        stage: `align` or `finetune`.
        lora: Whether the language model gets LoRA as in `own-data/lora`.
        zero_stage: DeepSpeed's stage, in 0..3.
        processes: GPUs that share the states.
    """

    title: str
    stage: str
    lora: bool = False
    zero_stage: int = 0
    processes: int = 1


WAYS = (
    Way("stage 1, 1 GPU", "align"),
    Way("stage 2, LoRA, 1 GPU", "finetune", lora=True),
    Way("stage 2, ZeRO-2, 4 GPUs", "finetune", zero_stage=2, processes=4),
    Way("stage 2, ZeRO-3, 4 GPUs", "finetune", zero_stage=3, processes=4),
)


def settings(name: str, stage: str) -> dict[str, Any]:
    """The values of a recipe's stage, with those of its first stage. Pairs with several scales are read at s = 4."""
    found = next((known for known in (f"{name}/{stage}", f"{name}-s4/{stage}") if known in RECIPES), None)
    if found is None:  # the first stage is another recipe's
        return settings(RECIPES[f"{name}/finetune"].changes["init_from"].split("/")[1], stage)
    own = load_recipe(RECIPES[found])
    first = own.get("init_from")
    return own if first is None else {**settings(first.split("/")[1], "align"), **own}


def configuration(values: dict[str, Any], text_config: PreTrainedConfig) -> SDLlavaConfig:
    """The model of a recipe's values, with the published configurations of its parts.

    Args:
        values: Of `settings`.
        text_config: The language model's configuration.
    """
    vision, diffusion = None, None
    if "vision" in values:
        is_clip = values["vision"] == CLIP["vision"]
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
        vision = models.vision_config("full") if is_clip else Dinov2Config(**large, image_size=518)
    if "diffusion" in values:
        fields = {name: values[name] for name in DIFFUSION_FIELDS if name in values}
        scales = {"guidance_scales": [float(scale) for scale in values.get("guidance_scales", [4])]}
        diffusion = SDLlavaDiffusionConfig(**{**DIFFUSION_PARTS[values["diffusion"]], **fields, **scales})
    return SDLlavaConfig(
        text_config=text_config,
        vision_config=vision,
        diffusion_config=diffusion,
        image_token_index=text_config.vocab_size - 1,
        **{name: values[name] for name in MODEL_FIELDS if name in values},
    )


def build(name: str, way: Way, text_config: PreTrainedConfig) -> Any:
    """The model of a recipe on the meta device, in the dtypes of training."""
    values = settings(name, way.stage)
    with torch.device("meta"):
        model: Any = SDLlavaForConditionalGeneration(configuration(values, text_config)).to(torch.bfloat16)
        tower = model.model.diffusion_tower
        if tower is not None and hasattr(tower.backbone, "vae"):
            tower.backbone.vae.float()
        model.set_stage(way.stage)
        if way.lora:
            rank = load_recipe(find_recipe("own-data/lora"))["lora_r"]
            unet = {key: values[key] for key in ("unet_lora_r", "unet_lora_alpha") if key in values}
            adapter = language_lora(model, AdapterArguments(lora_r=rank, **unet))
            assert adapter is not None  # the rank is not 0
            model = get_peft_model(model, adapter)
        elif "unet_lora_r" in values:
            inject_unet_lora(model, values["unet_lora_r"], values["unet_lora_alpha"])
    if not way.zero_stage:
        hold_trained_in_float32(model)
    return model


def cells(name: str, text_config: PreTrainedConfig) -> Iterator[str]:
    """The cell of each way to train a recipe. Ways with the same model have the same activations."""
    activations: dict[Any, list[int]] = {}
    for way in WAYS:
        model, kind = build(name, way, text_config), (way.stage, way.lora)
        if kind not in activations:
            activations[kind] = [peak_activations(model, n, LENGTHS[way.stage], checkpointing=True) for n in (1, 2)]
        one, two = activations[kind]
        yield cell(sum(state_bytes(model, way.zero_stage, way.processes)) + one, two - one)


def cell(one: float, each: float) -> str:
    """GiB with one sample, and the largest batch of 2**n samples on each GPU. Further samples need `each` bytes."""
    fits, powers = [], range(LARGEST.bit_length())
    for gpu in GPUS:
        room = USABLE * gpu * 2**30
        sizes = [2**power for power in powers if one + (2**power - 1) * each <= room]
        fits.append(str(sizes[-1]) if sizes else "–")
    return f"{one / 2**30:.1f}: {' / '.join(fits)}"


INTRODUCTION = f"""\
# Memory

This page is generated: `python perf/memory_table.py > docs/memory.md`, without weights in memory and without a GPU.
**Estimated, not measured on a GPU.**

The estimate is the one that a run prints on an accelerator (`sdllava.train.memory.estimate_memory`): weights,
gradients, AdamW's states, and the peak of activations, which is counted by running a step on the meta device: the
VAE, the UNet, the vision encoder, the language model, and the logits in float32. On the miniature it is within 15% of
the measured peak (`pytest -m slow tests/test_train_memory.py`). ZeRO divides the optimizer states, and from stage 2
the gradients, in stage 3 the weights. DeepSpeed's communication buffers (`reduce_bucket_size`,
`allgather_bucket_size`) are not counted.

The language model is Vicuna-7B in bfloat16 with `gradient_checkpointing: true`. Sequences have {LENGTHS["align"]:,}
tokens in stage 1 and {LENGTHS["finetune"]:,} in stage 2, one image each. Single GPUs hold the trained parameters in
float32, as `sdllava train` does without DeepSpeed. LoRA is that of `own-data/lora`.

A cell is the GiB of one process with one sample per batch, then the largest power of two as
`per_device_train_batch_size` (at most {LARGEST}) on {GPUS[0]} / {GPUS[1]} / {GPUS[2]} GB, with {USABLE:.0%} of the
memory used. "–" does not fit. A smaller batch trains the same model, because `global_batch_size` accumulates
gradients.
"""


def main(
    recipe: Annotated[list[str] | None, typer.Option(help="Only these pairs of stages. Repeatable.")] = None,
    size: Annotated[str, typer.Option(help="Size of the language model: full or mini.")] = "full",
) -> None:
    """Print the page."""
    print(INTRODUCTION)
    print("| recipe | " + " | ".join(way.title for way in WAYS) + " |")
    print("|---" * (len(WAYS) + 1) + "|")
    for name in recipe or ROWS:
        print(f"| `{name}` | " + " | ".join(cells(name, models.text_config(size))) + " |", flush=True)


if __name__ == "__main__":
    typer.run(main)
