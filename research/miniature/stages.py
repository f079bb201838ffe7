"""The papers' two stages on the finished parts, with the package's own feature cache and training."""

import os
from pathlib import Path

from sdllava.atomic_files import atomic_path
from sdllava.scenes.dataset import scene_dataset
from sdllava.train.run import cache, train

from .scales import SCALES, Scale, StageBudget

RECIPES = Path(__file__).parent / "recipes"
STAGES = {"align": "captions", "finetune": "questions"}
"""Each stage and the task of its data."""


def write_scenes(file: Path, task: str, budget: StageBudget, seed: int) -> None:
    """Write the scenes of a stage as training data, unless the file exists.

    Args:
        file: The Parquet file.
        task: "captions" or "questions", see [`~sdllava.scenes.dataset.scene_dataset`].
        budget: The number of scenes and their questions.
        seed: Selects the scenes.
    """
    if file.exists():
        return
    dataset = scene_dataset("train", budget.scenes, seed, task, budget.turns, budget.patterns)
    with atomic_path(file) as written:
        dataset.to_parquet(written)


def _arguments(stage: str, scale: Scale, folder: Path, seed: int, device: str) -> list[str]:
    """The train command's arguments. The first stage assembles the parts, the second starts from the first."""
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
    """Run one stage with cached features, unless it is finished. Resumes an earlier run.

    Args:
        stage: One of [`STAGES`].
        scale: One of [`~research.miniature.scales.SCALES`].
        folder: The folder of the finished parts.
        seed: Selects the scenes and the training's random choices.
        device: Where the model is trained.

    Returns:
        `Path`: The folder of the trained model and its processor.
    """
    folder, budget = Path(folder), SCALES[scale].stages[stage]
    if (folder / stage / "config.json").exists():
        return folder / stage
    write_scenes(folder / "data" / f"{stage}.parquet", STAGES[stage], budget, seed)
    arguments = _arguments(stage, SCALES[scale], folder, seed, device)
    features = folder / "cache" / stage
    kind = "vision" if stage == "align" else "conditional"
    cache(arguments, str(features), kind=kind, dtype="bfloat16", batch_size=budget.batch_size)
    train([*arguments, "--feature_cache", str(features)])
    return folder / stage
