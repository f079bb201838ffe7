"""The sizes of the miniature's parts, their budgets, and the checks that they must pass.

Budgets are in steps, so that the result does not depend on the speed of the machine.
"""

from dataclasses import dataclass, replace
from typing import Any

from sdllava.scenes.world import PATTERNS

from .loop import Budget

TOWER = {"taps": ["U-L1-R1-B0-Cross-Q", "U-L2-R2-Res-Out"], "image_size": 64, "grid_size": 8}
"""Taps and sizes of the miniature's diffusion tower."""
MMDIT_TOWER: dict[str, Any] = TOWER | {"taps": ["T-B3-Norm", "T-B5-Norm"], "timesteps": [180], "use_t5": False}
"""The same for the diffusion transformer. Its timestep 180 has the noise of the UNet's timestep 50."""
TOWERS: dict[str, dict[str, Any]] = {"diffusion": TOWER, "mmdit": MMDIT_TOWER}
"""The tower of each diffusion model, by its folder."""

PARTS = ("judge", "vae", "clip", "llm", "prompts", "denoiser", "unet")
OPTIONAL_PARTS = ("mmdit",)
"""Parts that are only trained where they are named."""
LETTERS_OFTEN = (*PATTERNS, *["text"] * 3)
"""The patterns of stage 2. Letters are four times as frequent, because they need the most examples."""


@dataclass(frozen=True)
class Gate:
    """The check that a part must pass before the next one builds on it: `metric` is at least `least` (in `unit`)."""

    metric: str
    least: float
    unit: str = ""


@dataclass(frozen=True)
class StageBudget:
    """The data of a stage.

    Args:
        scenes: The number of scenes.
        epochs: Passes over them.
        batch_size: Scenes per step.
        turns: The largest number of questions about a scene.
        patterns: The patterns of the questions. A pattern that is named twice is twice as frequent.
    """

    scenes: int
    epochs: int
    batch_size: int
    turns: int = 1
    patterns: tuple[str, ...] = PATTERNS


@dataclass(frozen=True)
class Scale:
    """Sizes and budgets of a miniature.

    Args:
        judge_width: See [`~research.miniature.judge.Judge`].
        vae_channels: See [`~research.miniature.vae.VaePart`].
        clip: Width and layers of CLIP's vision encoder, width and layers of its text encoder.
        llm: Width, layers and heads of the Llama.
        unet_channels: Channels of the UNet's levels.
        mmdit: Width, joint blocks and heads of the diffusion transformer.
        budgets: The budget of each part.
        gates: The check of each part that has one.
        check_scenes: The number of held-out scenes in each part's check.
        fusion_heads: Heads of the cross-attention fusion.
        stages: The budgets of both stages.
        sample_steps: Denoising steps of the samples in the checks of the UNet and the transformer.
        latent_scenes: The number of scenes on whose stored latents the transformer is trained.
        validate_every: Steps between two checks of the transformer while it is trained.
    """

    judge_width: int
    vae_channels: tuple[int, ...]
    clip: tuple[int, int, int, int]
    llm: tuple[int, int, int]
    unet_channels: tuple[int, int, int, int]
    mmdit: tuple[int, int, int]
    budgets: dict[str, Budget]
    gates: dict[str, Gate]
    check_scenes: dict[str, int]
    fusion_heads: int
    stages: dict[str, StageBudget]
    sample_steps: int = 25
    latent_scenes: int = 8192
    validate_every: int = 250


_MINI = Scale(
    judge_width=16,
    vae_channels=(16, 32),
    clip=(192, 4, 128, 3),
    llm=(160, 4, 4),
    unet_channels=(16, 48, 96, 128),
    mmdit=(128, 6, 4),
    budgets={
        "judge": Budget(800, 64, 2e-3, warmup=50),
        "vae": Budget(1600, 32, 1.5e-3, ema=0.99),
        "clip": Budget(850, 128, 1e-3, ema=0.99, warmup=100),
        "llm": Budget(16000, 12, 1.5e-3),
        "prompts": Budget(1000, 64, 1.5e-3, warmup=50),
        "denoiser": Budget(2400, 32, 1e-3, ema=0.997, warmup=200, save_every=100),
        "unet": Budget(4800, 16, 1e-3, ema=0.995, save_every=100),
        "mmdit": Budget(4400, 32, 1.5e-3, ema=0.997, warmup=200, save_every=50),
    },
    gates={
        "judge": Gate("accuracy", 0.97),
        "vae": Gate("psnr", 32.0, " dB"),
        "clip": Gate("retrieval", 0.85),
        "llm": Gate("accuracy", 0.95),
        "prompts": Gate("least", 0.9),
        "unet": Gate("object", 0.5),
        "mmdit": Gate("object", 0.5),
    },
    check_scenes={
        "judge": 512,
        "vae": 256,
        "clip": 512,
        "llm": 900,
        "prompts": 512,
        "denoiser": 64,
        "unet": 64,
        "mmdit": 64,
    },
    fusion_heads=6,
    stages={
        "align": StageBudget(scenes=8_000, epochs=4, batch_size=32),
        "finetune": StageBudget(scenes=24_000, epochs=6, batch_size=32, turns=5, patterns=LETTERS_OFTEN),
    },
)

SCALES = {
    "smoke": Scale(
        judge_width=4,
        vae_channels=(8, 8),
        clip=(32, 1, 32, 1),
        llm=(32, 1, 2),
        unet_channels=(8, 8, 16, 16),
        mmdit=(32, 2, 2),
        budgets={
            name: Budget(4, 2, 1e-3, ema=0.9 if name in ("judge", "unet", "mmdit") else 0.0, save_every=2)
            for name in (*PARTS, *OPTIONAL_PARTS)
        },
        gates={},
        check_scenes=dict.fromkeys((*PARTS, *OPTIONAL_PARTS), 2),
        fusion_heads=2,
        stages={
            "align": StageBudget(scenes=8, epochs=1, batch_size=4),
            "finetune": StageBudget(scenes=8, epochs=1, batch_size=4, turns=2),
        },
        sample_steps=2,
        latent_scenes=4,
        validate_every=2,
    ),
    "mini": _MINI,
    "gpu": replace(
        _MINI,
        budgets=_MINI.budgets
        | {
            "clip": Budget(4000, 256, 1e-3, ema=0.99, warmup=200),
            "denoiser": Budget(4000, 128, 1e-3, ema=0.999, warmup=500),
            "unet": Budget(20000, 128, 1e-3, ema=0.9995, warmup=500),
        },
        gates=_MINI.gates | {"unet": Gate("object", 0.8)},
    ),
}
