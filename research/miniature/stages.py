"""The papers' two stages on the finished parts: scenes written as data, then the package's own cache and training."""

import os
from pathlib import Path

from sdllava.scenes.dataset import scene_dataset

from .scales import SCALES, Scale, StageBudget

RECIPES = Path(__file__).parent / "recipes"
STAGES = {"align": "captions", "finetune": "questions"}
"""Each stage and what its scenes are told: captions, or conversations of questions."""


def write_scenes(file: Path, task: str, budget: StageBudget, seed: int) -> None:
    """A stage's scenes as training data, unless they are there."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset = scene_dataset("train", budget.scenes, seed, task, budget.turns, budget.patterns)
    aside = file.with_suffix(f".part-{os.getpid()}")
    dataset.to_parquet(aside)
    os.replace(aside, file)


def _arguments(stage: str, scale: Scale, folder: Path, seed: int, device: str) -> list[str]:
    """The train command's arguments. The first stage puts the parts together, the second goes on from it."""
    if stage == "align":
        parts = {"diffusion": "diffusion", "vision": "clip", "language_model": "llm"}
        start = {name: folder / subfolder for name, subfolder in parts.items()}
    else:
        start = {"init_from": folder / "align"}
    budget = scale.stages[stage]
    options = start | {
        "config": RECIPES / f"{stage}.yaml",
        "train_data": folder / "data" / f"{stage}.parquet",
        "output_dir": folder / stage,
        "num_train_epochs": budget.epochs,
        "per_device_train_batch_size": budget.batch_size,
        "fusion_num_attention_heads": scale.fusion_heads,
        "seed": seed,
        "use_cpu": device == "cpu",
        "bf16": device != "cpu",
    }
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train_stage(stage: str, scale: str, folder: str | os.PathLike, seed: int = 0, device: str = "cpu") -> Path:
    """Runs one stage with cached features, and goes on where an earlier run stopped.

    Returns:
        The folder of the trained model and its processor.
    """
    from sdllava.train.run import cache, train

    folder, budget = Path(folder), SCALES[scale].stages[stage]
    if (folder / stage / "config.json").exists():
        return folder / stage
    write_scenes(folder / "data" / f"{stage}.parquet", STAGES[stage], budget, seed)
    arguments = _arguments(stage, SCALES[scale], folder, seed, device)
    features = folder / "cache" / stage
    kind = "static" if stage == "align" else "conditional"
    cache(arguments, str(features), kind=kind, dtype="bfloat16", batch_size=budget.batch_size)
    train([*arguments, "--feature_cache", str(features)])
    return folder / stage
