"""The command `doctor`: what is installed, which devices there are, and what fits in their memory."""

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

import typer

from ..version import installed_versions

if TYPE_CHECKING:
    from ..configuration import SDLlavaConfig

GIB = 2**30
TOKENS = 1024
"""Tokens per sequence in the memory estimates: 576 of an image, and text."""


def doctor() -> None:
    """Report versions, extras, devices, the Hub's cache, and what fits in memory."""
    typer.secho("Versions", bold=True)
    typer.echo("  " + ", ".join(f"{name} {number}" for name, number in installed_versions().items()))
    typer.echo(f"  {platform.platform()}")
    typer.secho("Extras", bold=True)
    for extra, missing in missing_packages().items():
        fix = f'lacks {", ".join(missing)}: pip install "sdllava[{extra}]"' if missing else "installed"
        typer.echo(f"  {extra}: {fix}")
    typer.secho("Cache of the Hub", bold=True)
    typer.echo(f"  {cache_report()}")
    try:
        memory = device_memory()
    except ImportError as error:
        typer.secho(f"torch cannot be imported ({error}). Run: pip install sdllava", fg="red")
        raise typer.Exit(1) from error
    typer.secho("Devices", bold=True)
    for device, size in memory.items():
        typer.echo(f"  {device}: {size / GIB:.1f} GiB")
    typer.secho("Memory that a model needs", bold=True, nl=False)
    typer.echo(f" (batch of one, {TOKENS} tokens)")
    for name, needs in memory_needs().items():
        typer.echo(f"  {name}")
        for task, size in needs.items():
            fits = [device for device, available in memory.items() if size <= available]
            typer.echo(f"    {task}: {size / GIB:.2f} GiB, fits on {', '.join(fits) or 'none of these devices'}")


def missing_packages() -> dict[str, list[str]]:
    """What each extra of this package lacks: packages that are not installed, or not in an allowed version."""
    from packaging.requirements import Requirement

    found: dict[str, list[str]] = {}
    for text in requires("sdllava") or []:
        requirement = Requirement(text)
        extra = str(requirement.marker).partition("extra == ")[2].strip("\"'") if requirement.marker else ""
        if not extra or extra == "dev":
            continue
        lacking = found.setdefault(extra, [])
        try:
            if not requirement.specifier.contains(version(requirement.name), prereleases=True):
                lacking.append(f"{requirement.name}{requirement.specifier}")
        except PackageNotFoundError:
            lacking.append(requirement.name)
    return found


def cache_report() -> str:
    """The folder of the Hub's cache, its size, and the free disk space."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.constants import HF_HUB_CACHE, is_offline_mode

    if os.path.isdir(HF_HUB_CACHE):
        info = scan_cache_dir(HF_HUB_CACHE)
        content = f"{len(info.repos)} repositories, {info.size_on_disk / GIB:.1f} GiB"
        free = f", {shutil.disk_usage(HF_HUB_CACHE).free / GIB:.1f} GiB free"
    else:
        content, free = "does not exist yet", ""
    return f"{HF_HUB_CACHE}: {content}{free}{', offline mode' if is_offline_mode() else ''}"


def device_memory() -> dict[str, int]:
    """The memory of the CPU and of each accelerator, in bytes.

    Raises:
        ImportError: torch is not installed, or cannot be loaded.
    """
    import psutil
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {f"cpu ({cores} cores)": psutil.virtual_memory().available}
    for i in range(torch.cuda.device_count()):
        found[f"cuda:{i} ({torch.cuda.get_device_name(i)})"] = torch.cuda.get_device_properties(i).total_memory
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.recommended_max_memory()
    return found


def memory_needs() -> dict[str, dict[str, int]]:
    """Bytes that answering and training need, for the miniature and for the papers' model, by task."""
    from ..configuration import SDLlavaConfig
    from ..miniature import mini_path

    configs = {"miniature": SDLlavaConfig.from_pretrained(mini_path()), "SD 2.1, CLIP and Vicuna-7B": SDLlavaConfig()}
    return {name: _needs(config) for name, config in configs.items()}


def _needs(config: "SDLlavaConfig") -> dict[str, int]:
    import torch

    from ..modeling_sdllava import SDLlavaForConditionalGeneration
    from ..train.memory import estimate_memory

    with torch.device("meta"):
        model = SDLlavaForConditionalGeneration(config).to(torch.bfloat16)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    text = sum(p.numel() * p.element_size() for p in model.model.language_model.parameters())
    model.set_stage("finetune")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = estimate_memory(model, 1, TOKENS, True)
    frozen = weights + trained.activations
    return {
        "answers in bfloat16": weights,
        "LoRA, without the adapter": frozen,
        "QLoRA, without the adapter": frozen - text * 3 // 4,
        "whole language model trained": trained.total,
    }
