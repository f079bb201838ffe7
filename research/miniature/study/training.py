"""Training of the study's variants, with the package's own feature cache and train command."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdllava.train.machine import computes_in_bfloat16
from sdllava.train.run import cache, train

from ..scales import TOWERS, StageBudget
from ..stages import RECIPES

SEED = 0


@dataclass(frozen=True)
class Variant:
    """A model of the study.

    Args:
        name: The name on the page.
        encoders: "vision", "diffusion" or both.
        fusion: The fusion of both encoders. "none" with one.
        guidance: The guidance scale of the diffusion model.
        denoiser: The folder of the diffusion model.
    """

    name: str
    encoders: tuple[str, ...]
    fusion: str = "none"
    guidance: float = 0.0
    denoiser: str = "diffusion"

    @property
    def diffuses(self) -> bool:
        """Whether the model has a diffusion tower."""
        return "diffusion" in self.encoders


@dataclass(frozen=True)
class Stage:
    """One stage of one variant.

    Features are always computed with the untrained parts, so that variants with different trained weights share them.

    Args:
        variant: The model.
        parts: The folders of its parts, as options of the train command.
        name: "align" or "finetune".
        data: The training data.
        output: The folder of the trained model.
        budget: The number of epochs and the batch size.
        heads: Heads of the cross-attention fusion.
        features: The folder of cached features. None trains without a cache.
        kind: The kind of the cache, see [`~sdllava.train.cache.KINDS`].
        init_from: The folder of a trained model to start from. None assembles the parts.
        options: Further options of the train command.
    """

    variant: Variant
    parts: dict[str, Path]
    name: str
    data: Path
    output: Path
    budget: StageBudget
    heads: int
    features: Path | None = None
    kind: str = "vision"
    init_from: Path | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def arguments(self, **changes: Any) -> list[str]:
        """The train command's arguments.

        Args:
            changes: Options in place of the stage's own. With `init_from` the parts are left out.
        """
        values: dict[str, Any] = {
            "config": RECIPES / f"study-{self.name}.yaml",
            "train_data": self.data,
            "output_dir": self.output,
            "num_train_epochs": self.budget.epochs,
            "per_device_train_batch_size": self.budget.batch_size,
            "seed": SEED,
            "bf16": computes_in_bfloat16(),
            "fusion": self.variant.fusion,
        }
        if self.variant.diffuses:
            values |= TOWERS[self.variant.denoiser] | {"guidance_scales": self.variant.guidance}
        if self.variant.fusion == "cross_attention":
            values["fusion_num_attention_heads"] = self.heads
        values |= dict(self.options) | changes
        values |= {} if "init_from" in changes else self.parts
        return [word for key, value in values.items() for word in (f"--{key}", *_words(value))]

    def train(self, **cached_as: Any) -> Path:
        """Cache the missing features and train, unless the stage is finished.

        Args:
            cached_as: Options with which features are cached, in place of the stage's own, so that variants share
                them. For example, features are cached for s = 4 although a variant is trained at s = 0.

        Returns:
            `Path`: The folder of the trained model.
        """
        if (self.output / "config.json").exists():
            return self.output
        arguments = self.arguments(**({"init_from": self.init_from} if self.init_from else {}))
        if self.features is not None:
            cache(self.arguments(**cached_as), str(self.features), self.kind, "bfloat16", self.budget.batch_size)
            arguments += ["--feature_cache", str(self.features)]
        train(arguments)
        return self.output


def part_folders(parts: Path, variant: Variant) -> dict[str, Path]:
    """The folders of a variant's parts, as options of the train command."""
    known = {"diffusion": variant.denoiser, "vision": "clip", "language_model": "llm"}
    return {name: parts / known[name] for name in (*variant.encoders, "language_model")}


def _words(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else [str(value)]
