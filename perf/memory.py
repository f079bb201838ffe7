"""Memory of the papers' model during an answer: weights by part, key-value cache, intermediate results.

Counted on the meta device, without weights in memory. On a GPU, `--measure` also builds the model, generates an answer
and reports the peak.

    python perf/memory.py
    python perf/memory.py --device cuda --measure
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import answering
import models
import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Device, DType, Size, describe_machine
from rich.console import Console
from rich.table import Table
from torch import nn

from sdllava import SDLlavaConfig, SDLlavaDiffusionModel, SDLlavaForConditionalGeneration
from sdllava.atomic_files import write_json
from sdllava.train.activations import LiveResults

CONTEXT = 1024
"""Tokens of the counted conversation: 576 image tokens, the others text."""
BITS_PER_QUANTIZED_WEIGHT = 4.5
"""NF4 in blocks of 64 weights with one float32 scale per block, bitsandbytes' default."""


def part_bytes(config: SDLlavaConfig, dtype: torch.dtype, four_bit: bool = False) -> dict[str, float]:
    """Bytes of each part's weights, and of the key-value cache of `CONTEXT` tokens.

    Args:
        config (`SDLlavaConfig`): The model's configuration.
        dtype (`torch.dtype`): Dtype of the weights. The VAE is float32.
        four_bit (`bool`): Whether the language model's linear layers are NF4. Embeddings, norms and `lm_head` keep
            `dtype`.
    """
    with torch.device("meta"):
        model = SDLlavaForConditionalGeneration(config)
    parts = {name: module for name, module in model.model.named_children() if name != "diffusion_tower"}
    parts |= dict(model.model.diffusion_tower.backbone.named_children())
    parts["lm_head"] = model.lm_head
    held = {name: _bytes(module, torch.float32 if name == "vae" else dtype) for name, module in parts.items()}
    if four_bit:
        linear = [m for m in model.model.language_model.modules() if isinstance(m, nn.Linear)]
        saved = dtype.itemsize - BITS_PER_QUANTIZED_WEIGHT / 8
        held["language_model"] -= saved * sum(m.weight.numel() for m in linear)
    text = config.text_config
    keys = text.num_hidden_layers * text.num_key_value_heads * text.head_dim * CONTEXT
    held[f"cache of {CONTEXT} tokens"] = 2 * keys * dtype.itemsize
    return held


def _bytes(module: nn.Module, dtype: torch.dtype) -> float:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize


def peak_results(config: SDLlavaConfig, dtype: torch.dtype) -> float:
    """Peak bytes of intermediate results in the VAE's encoder and in the UNet on both halves.

    The prefill of the language model needs less. The figure is an upper bound: attention on the meta device stores its
    whole probability matrix, fused attention does not.
    """
    tower_config = config.diffusion_config
    side, latent_side = tower_config.image_size, tower_config.latent_size
    with torch.device("meta"):
        tower = SDLlavaDiffusionModel(tower_config).to(dtype)
        tower.backbone.vae.float()
        pixels, latents = torch.empty(1, 3, side, side), torch.empty(1, 4, latent_side, latent_side)
        prompts = {"encoder_hidden_states": torch.empty(2, 77, tower_config.unet_config["cross_attention_dim"])}
    peaks = []
    for read in (lambda: tower.backbone.vae.encode(pixels), lambda: tower.extract(latents, prompts)):
        with torch.no_grad(), LiveResults(tower) as live:
            read()
        peaks.append(live.peak)
    return max(peaks)


def quantize(language_model: nn.Module, dtype: torch.dtype) -> None:
    """Converts a language model's linear layers to NF4 in place, as `BitsAndBytesConfig(load_in_4bit=True)` does."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # an optional extra

    for parent in list(language_model.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is nn.Linear:
                how: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
                small = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, **how)
                small.weight = Params4bit(linear.weight.data, requires_grad=False, **how)
                setattr(parent, name, small.to(linear.weight.device))


def measured(size: str, device: str, dtype: str, four_bit: bool = False) -> float:
    """Peak GiB of a GPU's memory while the model answers a first question."""
    bench = Bench("memory", size, device, dtype, 1, None)
    subjects = answering.Subjects(size, bench.device, bench.dtype)
    subjects.ours.model.diffusion_tower.backbone.vae.float()
    if four_bit:
        quantize(subjects.ours.model.language_model, bench.dtype)
    with torch.inference_mode():
        model, inputs = subjects.ways(1)["ours, first question"]
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        answering.generation(model, inputs, 32)()
    return torch.cuda.max_memory_allocated(bench.device) / 2**30


def main(
    measure: Annotated[
        bool, typer.Option(help="Also build both models and measure. Needs a GPU, in 4 bits bitsandbytes.")
    ] = False,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    output: Path = Path(__file__).parent / "results" / "memory.json",
) -> None:
    """Prints a table of GiB by part, with and without 4-bit weights in the language model."""
    if measure and not device.startswith("cuda"):
        raise SystemExit(f"--measure needs a GPU, not --device {device!r}. Use --device cuda, or omit --measure.")
    config = models.model_config(size)
    half = torch.bfloat16
    columns = {"bfloat16": part_bytes(config, half), "4-bit language model": part_bytes(config, half, four_bit=True)}
    for column in columns.values():
        column["intermediate results (upper bound)"] = peak_results(config, half)
        column["total"] = sum(column.values())
    table = Table("GiB", *columns, title=f"memory, {size}", box=None)
    for name in columns["bfloat16"]:
        table.add_row(name, *(f"{column[name] / 2**30:.2f}" for column in columns.values()))
    console = Console()
    console.print(table)
    found: dict[str, Any] = {
        "gib": {name: {k: v / 2**30 for k, v in column.items()} for name, column in columns.items()}
    }
    if measure:
        found["measured_gib"] = {}
        for name in columns:
            four_bit = name.startswith("4-bit")
            if four_bit and find_spec("bitsandbytes") is None:
                console.print(f"not measured, {name}: bitsandbytes is not installed")
                continue
            gib = measured(size, device, dtype, four_bit)
            found["measured_gib"][name] = gib
            console.print(f"measured, {name}: {gib:.2f} GiB on {describe_machine(torch.device(device))}")
    else:
        console.print("Computed on the meta device. To measure on a GPU, add --device cuda --measure.")
    write_json(output, found)


if __name__ == "__main__":
    typer.run(main)
