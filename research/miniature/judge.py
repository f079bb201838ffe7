"""A small classifier of quadrants, which measures whether the UNet's samples follow their prompts."""

import itertools

import torch
from torch import Tensor, nn

from sdllava.scenes.world import CELLS, COLOURS, DIRECTIONS, LETTERS, SHAPES, STATES, Scene, sample_scene

from .images import to_pixels
from .loop import scene_numbers

ATTRIBUTES = {
    "colour": ("", *COLOURS),
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "border": (False, True),
    "state": STATES,
    "letter": ("", *LETTERS),
}
"""The attributes of a quadrant and their values. An empty quadrant has the colour ""."""

_NO_LABEL = -100
_NOISE = 0.15


def quadrants(pixels: Tensor) -> Tensor:
    """Split images `(n, channels, h, w)` into quadrants `(4 n, channels, h / 2, w / 2)`, in the order of `CELLS`."""
    n, channels, height, width = pixels.shape
    cut = pixels.view(n, channels, 2, height // 2, 2, width // 2)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(4 * n, channels, height // 2, width // 2)


def labels(scenes: list[Scene]) -> dict[str, Tensor]:
    """The index of each attribute's value per quadrant `(4 n,)`, -100 where the quadrant does not have it."""
    columns: dict[str, list[int]] = {name: [] for name in ATTRIBUTES}
    for scene in scenes:
        at = {item.cell: item for item in scene.objects}
        for cell in CELLS:
            for name, values in ATTRIBUTES.items():
                value = getattr(at[cell], name) if cell in at else ""
                known = name == "colour" or (cell in at and value in values)
                columns[name].append(values.index(value) if known else _NO_LABEL)
    return {name: torch.tensor(column) for name, column in columns.items()}


class Judge(nn.Module):
    """Three convolutions, and one linear classifier per attribute.

    Args:
        width: Channels of the first convolution, a multiple of 4.
    """

    def __init__(self, width: int):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        layers = [
            layer
            for before, after in itertools.pairwise(widths)
            for layer in (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(4, after), nn.SiLU())
        ]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(64 * width, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """Images `(n, 3, 64, 64)` in [-1, 1] as logits `(4 n, values)` per attribute."""
        hidden = self.body(quadrants(pixels))
        return {name: head(hidden) for name, head in self.heads.items()}


class JudgePart:
    """Trains the judge on rendered quadrants with added noise, because samples are not perfectly clean."""

    name = "judge"

    def __init__(self, width: int, seed: int = 0):
        self.model, self.seed = Judge(width), seed

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def loss(self, step: int, batch_size: int) -> Tensor:
        """Cross-entropy on this step's scenes, summed over the attributes."""
        scenes = [sample_scene("train", number) for number in scene_numbers(self.seed, step, batch_size)]
        pixels = to_pixels(scenes)
        pixels = pixels + _NOISE * torch.rand(batch_size, 1, 1, 1) * torch.randn(pixels.shape)
        read, true = self.model(pixels.to(self.device)), labels(scenes)
        losses = [nn.functional.cross_entropy(read[name], true[name].to(self.device)) for name in ATTRIBUTES]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def agreement(self, pixels: Tensor, scenes: list[Scene]) -> dict[str, float]:
        """The share of quadrants whose attribute agrees with the scene's record, by attribute.

        Args:
            pixels: Images `(n, 3, 64, 64)` in [-1, 1].
            scenes: The scenes that the images should show.

        Returns:
            `dict[str, float]`: Shares in [0, 1]. "object" is the share of objects whose colour and shape appear in
            their quadrant, "anywhere" of those whose colour and shape appear in any quadrant.
        """
        read, true = self.model(pixels.to(self.device)), labels(scenes)
        predicted = {name: scores.argmax(dim=1).cpu() for name, scores in read.items()}
        known = {name: values != _NO_LABEL for name, values in true.items()}
        shares = {name: (predicted[name] == true[name])[known[name]].float().mean().item() for name in ATTRIBUTES}

        def same(name: str) -> Tensor:  # (scene, quadrant of the record, quadrant of the image)
            return true[name].view(-1, 4, 1) == predicted[name].view(-1, 1, 4)

        matching, objects = same("colour") & same("shape"), known["shape"].view(-1, 4)
        found = {"object": matching.diagonal(dim1=1, dim2=2), "anywhere": matching.any(dim=2)}
        return shares | {name: right[objects].float().mean().item() for name, right in found.items()}

    def check(self, count: int) -> dict[str, float]:
        """The agreement with held-out rendered scenes: by attribute, and as "accuracy" the lowest of them."""
        scenes = [sample_scene("validation", number) for number in range(count)]
        shares = self.agreement(to_pixels(scenes), scenes)
        return {"accuracy": min(shares.values())} | shares
