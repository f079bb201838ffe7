"""Trains the parts one after the other, each checked before the next builds on it.

A folder holds `settings.json` (scale and seed), `state/` (checkpoints to go on from), `checks.json` (what each finished
part reached), `samples.png` (of the UNet) and the finished parts: `diffusion/` in diffusers' published layout, `clip/`
and `llm/` in transformers'; in `prompts/` is the UNet's text encoder, and in `denoiser/` what the UNet started from.
"""

import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from sdllava.commands.options import check_device
from sdllava.evaluation.results import write_json
from sdllava.scenes.dataset import caption, sample_scene

from .clip import ClipPart
from .images import contact_sheet
from .judge import JudgePart
from .llm import LlamaPart, llama_config
from .loop import Run
from .prompts import PromptPart
from .scales import PARTS, SCALES, Scale
from .unet import DenoiserPart, UnetPart, unet_config
from .vae import VaePart

AnyPart = JudgePart | VaePart | ClipPart | LlamaPart | PromptPart | DenoiserPart


class CheckFailedError(RuntimeError):
    """A part did not learn what the next one needs."""


def build(name: str, scale: Scale, folder: Path, seed: int) -> AnyPart:
    """An untrained part; its first weights depend on the seed alone."""
    torch.manual_seed(seed)
    if name == "judge":
        return JudgePart(scale.judge_width, seed)
    if name == "vae":
        return VaePart(scale.vae_channels, seed)
    if name == "clip":
        return ClipPart(*scale.clip, seed)
    if name == "llm":
        return LlamaPart(llama_config(*scale.llm), scale.budgets["llm"].steps, seed)
    if name == "prompts":
        return PromptPart(CLIPTextModel.from_pretrained(folder / "clip"), seed)
    return _build_unet(name, scale, folder, seed)


def _build_unet(name: str, scale: Scale, folder: Path, seed: int) -> DenoiserPart:
    """The denoiser starts with a random UNet, what follows with what the denoiser learnt."""
    vae, steps = AutoencoderKL.from_pretrained(folder / "diffusion" / "vae"), scale.budgets[name].steps
    text_encoder = CLIPTextModel.from_pretrained(folder / "prompts")
    if name == "denoiser":
        unet = UNet2DConditionModel(**unet_config(scale.unet_channels, text_encoder.config.hidden_size))
        return DenoiserPart(vae, text_encoder, unet, steps, seed)
    unet = UNet2DConditionModel.from_pretrained(folder / "denoiser" / "unet")
    return UnetPart(vae, text_encoder, unet, steps, seed)


def _check(part: AnyPart, scale: Scale, folder: Path, seed: int) -> dict[str, float]:
    """A part's metrics on held-out scenes; the judge reads the UNet's samples, which are also left to be looked at."""
    count = scale.check_scenes[part.name]
    if not isinstance(part, UnetPart):
        return part.check(count)
    judge = JudgePart(scale.judge_width, seed)
    Run(judge, scale.budgets["judge"], folder / "state", seed).finish()
    scenes = [sample_scene("validation", number) for number in range(count)]
    samples = part.sample([caption(scene) for scene in scenes])
    contact_sheet(samples).save(folder / "samples.png")
    return part.check(count) | judge.agreement(samples, scenes)


def _read_checks(folder: Path) -> dict[str, dict[str, float]]:
    file = folder / "checks.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _settle(folder: Path, settings: dict[str, str | int]) -> None:
    """Notes what the folder is made with; what was made with something else is not gone on with."""
    file = folder / "settings.json"
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else settings
    if known != settings:
        raise ValueError(
            f"{folder} was begun with --scale {known['scale']} --seed {known['seed']}, not --scale {settings['scale']} "
            f"--seed {settings['seed']}: give another folder."
        )
    if not file.exists():
        write_json(file, settings)


def train_part(name: str, scale: Scale, folder: str | os.PathLike, seed: int = 0, device: str = "cpu") -> dict:
    """Trains one part to the end of its budget, checks it, and writes it; goes on where an earlier run stopped.

    Returns:
        The metrics of its check.

    Raises:
        CheckFailedError: the part is under its gate; its state is kept, so that more steps can follow.
    """
    folder = Path(folder)
    part = build(name, scale, folder, seed)
    run = Run(part, scale.budgets[name], folder / "state", seed, device)
    run.train()
    run.finish()
    metrics = _check(part, scale, folder, seed)
    gate = scale.gates.get(name)
    if gate and metrics[gate.metric] < gate.least:
        raise CheckFailedError(
            f"After {run.step} steps the part {name!r} reached a {gate.metric} of {metrics[gate.metric]:.3g}{gate.unit}"
            f" on held-out scenes, under the {gate.least:g}{gate.unit} that what follows needs; give it more steps."
        )
    if not isinstance(part, JudgePart):
        part.write(folder)
    write_json(folder / "checks.json", _read_checks(folder) | {name: metrics})
    return metrics


def pretrain(scale: str, folder: str | os.PathLike, parts: tuple[str, ...] = PARTS, seed: int = 0, device: str = "cpu"):
    """Trains the parts that the folder does not hold yet, and returns every part's metrics.

    Raises:
        ValueError: an unknown scale, part or device, or the folder was begun at another scale or with another seed.
        CheckFailedError: as `train_part`.
    """
    if scale not in SCALES:
        raise ValueError(f"{scale!r} is no scale of the miniature; the scales are {', '.join(SCALES)}.")
    if unknown := [name for name in parts if name not in PARTS]:
        raise ValueError(f"{unknown[0]!r} is no part of the miniature; the parts are {', '.join(PARTS)}.")
    check_device(device)
    folder = Path(folder)
    _settle(folder, {"scale": scale, "seed": seed})
    for name in parts:
        if name not in _read_checks(folder):
            train_part(name, SCALES[scale], folder, seed, device)
    return _read_checks(folder)
