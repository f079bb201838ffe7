"""Attention kernels of the UNet's pass: which one torch chooses, and the time of the pass with each that it has.

python perf/attention_kernels.py --batch 1 --batch 8
"""

from contextlib import nullcontext
from typing import Annotated, Any

import models
import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Call, Device, DType, Output, Repeats, Size, batches
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

BACKENDS: dict[str, list[SDPBackend]] = {
    "torch's choice": [],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "memory-efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cuDNN": [SDPBackend.CUDNN_ATTENTION],
    "plain": [SDPBackend.MATH],
}
ATTENTION_NAMES = ("flash", "fmha", "attention", "sdpa")


def pass_with(tower: Any, latents: torch.Tensor, prompts: dict[str, torch.Tensor], name: str) -> Call:
    """The UNet's pass up to the tap, restricted to a kind of attention kernel."""

    def call() -> torch.Tensor:
        with sdpa_kernel(BACKENDS[name]) if BACKENDS[name] else nullcontext():
            return tower.extract(latents, prompts)

    return call


def attention_kernels(call: Call, device: torch.device) -> list[str]:
    """The names of the attention kernels, on a CPU the operators, that a call runs."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        call()
    names = {event.key for event in profiler.key_averages()}
    return sorted(name for name in names if any(part in name.lower() for part in ATTENTION_NAMES))


def main(
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images per batch; on a GPU 1 to 8.")] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 5,
    output: Output = None,
) -> None:
    """Measures both halves of the guidance with each kind of attention kernel."""
    bench = Bench(f"attention kernels, {size}", size, device, dtype, repeats, output)
    tower = models.build_tower("sd21", size, bench.device, bench.dtype)
    config = tower.config
    with torch.inference_mode():
        for n in batches(batch, 8 if bench.device.type == "cuda" else 1):
            latents = torch.randn(n, 4, config.latent_size, config.latent_size, device=bench.device)
            ids = torch.randint(1000, 40000, (2 * n, 77), device=bench.device)
            prompts, calls = tower.encode_prompts(ids, None), {}
            for name in BACKENDS:
                call = pass_with(tower, latents, prompts, name)
                try:
                    call()
                except RuntimeError as error:  # this device, dtype or head size has no such kernel
                    bench.remark(f"{name}, batch {n}: not available ({str(error).splitlines()[0]})")
                else:
                    calls[f"{name}, batch {n}"] = call
            first = next(iter(calls.values()))
            bench.remark(f"Kernels of torch's choice, batch {n}: {'; '.join(attention_kernels(first, bench.device))}")
            bench.time(calls, per_call=n)
    bench.report()


if __name__ == "__main__":
    typer.run(main)
