"""Training of the parts, one after the other. Each must pass its check before the next one builds on it.

A folder contains `settings.json` (scale and seed), `state/` (checkpoints), `checks.json` (the result of each finished
part's check), `samples.png` (samples of the UNet) and the finished parts: `diffusion/` in diffusers' published layout,
`clip/` and `llm/` in transformers', `prompts/` (the UNet's text encoder) and `denoiser/` (the UNet's initial weights).
"""

import json
import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from sdllava.atomic_files import atomic_path, write_json
from sdllava.commands.options import check_device
from sdllava.run_records import begin_run
from sdllava.scenes.language import caption
from sdllava.scenes.world import sample_scene

from .clip import ClipPart
from .images import contact_sheet
from .judge import JudgePart
from .llm import LlamaPart, llama_config
from .loop import Run
from .mmdit import MmditPart, StoredLatents, build_transformer, transformer_config
from .prompts import PromptPart
from .scales import OPTIONAL_PARTS, PARTS, SCALES, Scale
from .unet import DenoiserPart, UnetPart, unet_config
from .vae import VaePart

AnyPart = JudgePart | VaePart | ClipPart | LlamaPart | PromptPart | DenoiserPart | MmditPart


class CheckFailedError(RuntimeError):
    """A part is below the check that the next part needs."""


def build(name: str, scale: Scale, folder: Path, seed: int) -> AnyPart:
    """Build an untrained part.

    Args:
        name: One of [`~research.miniature.scales.PARTS`].
        scale: Sizes and budgets.
        folder: The folder of the finished parts on which this one builds.
        seed: Selects the initial weights and the data.
    """
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
    if name == "mmdit":
        return _build_mmdit(scale, folder, seed)
    return _build_unet(name, scale, folder, seed)


def _build_mmdit(scale: Scale, folder: Path, seed: int) -> MmditPart:
    """The diffusion transformer, with random weights, and the latents on which it is trained."""
    vae = AutoencoderKL.from_pretrained(folder / "diffusion" / "vae")
    text_encoder = CLIPTextModel.from_pretrained(folder / "prompts")
    transformer = build_transformer(transformer_config(*scale.mmdit, text_encoder.config.hidden_size))
    latents = StoredLatents(vae, scale.latent_scenes, folder / "state" / "latents.safetensors")
    return MmditPart(vae, text_encoder, transformer, scale.budgets["mmdit"].steps, latents, seed=seed)


def _build_unet(name: str, scale: Scale, folder: Path, seed: int) -> DenoiserPart:
    """The denoiser, with a random UNet, or the UNet, with the denoiser's weights."""
    vae, steps = AutoencoderKL.from_pretrained(folder / "diffusion" / "vae"), scale.budgets[name].steps
    text_encoder = CLIPTextModel.from_pretrained(folder / "prompts")
    if name == "denoiser":
        unet = UNet2DConditionModel(**unet_config(scale.unet_channels, text_encoder.config.hidden_size))
        return DenoiserPart(vae, text_encoder, unet, steps, seed)
    unet = UNet2DConditionModel.from_pretrained(folder / "denoiser" / "unet")
    return UnetPart(vae, text_encoder, unet, steps, seed)


def _check(part: AnyPart, scale: Scale, folder: Path, seed: int) -> dict[str, float]:
    """A part's metrics on held-out scenes. The UNet's samples are judged, and saved as `samples.png`."""
    count = scale.check_scenes[part.name]
    if not isinstance(part, UnetPart | MmditPart):
        return part.check(count)
    judge = JudgePart(scale.judge_width, seed)
    Run(judge, scale.budgets["judge"], folder / "state", seed).finish()
    scenes = [sample_scene("validation", number) for number in range(count)]
    samples = part.sample([caption(scene) for scene in scenes], scale.sample_steps)
    name = "samples.png" if part.name == "unet" else f"{part.name}-samples.png"
    with atomic_path(folder / name) as written:
        contact_sheet(samples).save(written)
    return part.check(count) | judge.agreement(samples, scenes)


def _train(run: Run, scale: Scale, folder: Path, seed: int, until: int) -> None:
    """Train to a step. The transformer is checked on the way, in `state/mmdit-checks.jsonl`."""
    if not isinstance(run.part, MmditPart):
        run.train(until)
        return
    while run.step < until:
        run.train(min(until, (run.step // scale.validate_every + 1) * scale.validate_every))
        with run.averaged():
            metrics = _check(run.part, scale, folder, seed)
        with (folder / "state" / "mmdit-checks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": run.step, **metrics}) + "\n")


def _read_checks(folder: Path) -> dict[str, dict[str, float]]:
    file = folder / "checks.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def train_part(
    name: str, scale: Scale, folder: str | os.PathLike, seed: int = 0, device: str = "cpu", until: int | None = None
) -> dict[str, float]:
    """Train one part to the end of its budget, check it, and write it. Resumes an earlier run.

    Args:
        name: One of [`~research.miniature.scales.PARTS`].
        scale: Sizes and budgets.
        folder: The folder of checkpoints and finished parts.
        seed: Selects the initial weights and the data.
        device: Where the part is trained.
        until: The step at which it is written as it is, without its gate. Default: the end of the budget.

    Returns:
        `dict[str, float]`: The metrics of its check.

    Raises:
        CheckFailedError: The part is below its gate. Its checkpoint is kept, so that it can be trained further.
        ValueError: The checkpoint was trained with another seed or batch size.
    """
    folder = Path(folder)
    part = build(name, scale, folder, seed)
    run = Run(part, scale.budgets[name], folder / "state", seed, device)
    _train(run, scale, folder, seed, min(until or run.budget.steps, run.budget.steps))
    run.finish()
    metrics = _check(part, scale, folder, seed)
    if run.step < run.budget.steps:
        if not isinstance(part, JudgePart):
            part.write(folder)
        return metrics
    gate = scale.gates.get(name)
    if gate and metrics[gate.metric] < gate.least:
        raise CheckFailedError(
            f"After {run.step} steps the part {name!r} has a {gate.metric} of {metrics[gate.metric]:.3g}{gate.unit} on "
            f"held-out scenes, below the {gate.least:g}{gate.unit} that the next part needs. Give it more steps."
        )
    if not isinstance(part, JudgePart):
        part.write(folder)
    write_json(folder / "checks.json", _read_checks(folder) | {name: metrics})
    return metrics


def pretrain(
    scale: str,
    folder: str | os.PathLike,
    parts: tuple[str, ...] = PARTS,
    seed: int = 0,
    device: str = "cpu",
    until: int | None = None,
) -> dict[str, dict[str, float]]:
    """Train the parts that are not finished in the folder.

    Args:
        scale: One of [`~research.miniature.scales.SCALES`].
        folder: The folder of checkpoints and finished parts.
        parts: The parts to train, in this order.
        seed: Selects the initial weights and the data.
        device: Where the parts are trained.
        until: See [`train_part`].

    Returns:
        `dict[str, dict[str, float]]`: The metrics of every finished part, and of those that stopped at `until`.

    Raises:
        ValueError: The scale, a part or the device is unknown, or the folder has another scale or seed.
        CheckFailedError: As [`train_part`].
    """
    if scale not in SCALES:
        raise ValueError(f"Scale {scale!r} of the miniature is unknown. Use one of {', '.join(SCALES)}.")
    known = (*PARTS, *OPTIONAL_PARTS)
    if unknown := [name for name in parts if name not in known]:
        raise ValueError(f"Part {unknown[0]!r} of the miniature is unknown. Use one of {', '.join(known)}.")
    check_device(device)
    folder = Path(folder)
    begin_run(folder / "settings.json", {"scale": scale, "seed": seed})
    metrics = {}
    for name in parts:
        if name not in _read_checks(folder):
            metrics[name] = train_part(name, SCALES[scale], folder, seed, device, until)
    return _read_checks(folder) | metrics
