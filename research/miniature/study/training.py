"""Trains the study's variants with the package's own cache and train command; what is finished is left as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scales import TOWER, StageBudget
from ..stages import RECIPES

SEED = 0


@dataclass(frozen=True)
class Variant:
    """Which encoders a model has, how they are fused, and how strongly the diffusion model is guided."""

    name: str
    encoders: tuple[str, ...]
    fusion: str = "none"
    guidance: float = 0.0

    @property
    def diffuses(self) -> bool:
        return "diffusion" in self.encoders


@dataclass(frozen=True)
class Stage:
    """One stage of one variant: where it starts, what it reads, where it is written, and where features are kept.

    Features are always computed by the assembled parts, so that variants of other trained weights share them.
    """

    variant: Variant
    parts: dict[str, Path]
    name: str
    data: Path
    output: Path
    budget: StageBudget
    heads: int
    features: Path | None = None
    kind: str = "static"
    init_from: Path | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self, **changes: Any) -> list[str]:
        """The train command's arguments, from the parts on unless `init_from` is among the changes."""
        import torch

        values: dict[str, Any] = {
            "config": RECIPES / f"study-{self.name}.yaml",
            "train_data": self.data,
            "output_dir": self.output,
            "num_train_epochs": self.budget.epochs,
            "per_device_train_batch_size": self.budget.batch_size,
            "seed": SEED,
            "bf16": torch.accelerator.is_available(),
            "fusion": self.variant.fusion,
        }
        if self.variant.diffuses:
            values |= TOWER | {"guidance_scales": self.variant.guidance}
        if self.variant.fusion == "cross_attention":
            values["fusion_num_attention_heads"] = self.heads
        values |= dict(self.options) | changes
        values |= {} if "init_from" in changes else self.parts
        return [word for key, value in values.items() for word in (f"--{key}", *_words(value))]

    def train(self, **cached_as: Any) -> Path:
        """Caches the features that are not kept yet, and trains.

        Args:
            cached_as: arguments under which the features are cached where they differ from the run's own, so that
                variants of one family share them: asked at s = 4, though this variant runs at s = 0.
        """
        from sdllava.train.run import cache, train

        if (self.output / "config.json").exists():
            return self.output
        arguments = self.arguments(**({"init_from": self.init_from} if self.init_from else {}))
        if self.features is not None:
            cache(self.arguments(**cached_as), str(self.features), self.kind, "bfloat16", self.budget.batch_size)
            arguments += ["--feature_cache", str(self.features)]
        train(arguments)
        return self.output


def part_folders(parts: Path, variant: Variant) -> dict[str, Path]:
    """Where the train command finds the variant's parts."""
    known = {"diffusion": "diffusion", "vision": "clip", "language_model": "llm"}
    return {name: parts / known[name] for name in (*variant.encoders, "language_model")}


def _words(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else [str(value)]
