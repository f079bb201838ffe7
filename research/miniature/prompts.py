"""The UNet's text encoder, which first learns to say what a caption puts where.

Like Stable Diffusion 2's, it is another one than the vision encoder's: CLIP's, which it starts from, need not know what
belongs together to tell two scenes apart, and from the UNet's error alone that is learnt far too slowly.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdllava.scenes.dataset import caption, sample_scene
from sdllava.scenes.world import CELLS

from .judge import ATTRIBUTES, labels
from .loop import scene_numbers
from .text import clip_tokenizer

_HEADS = 4


class QuadrantReader(nn.Module):
    """One learnt query per quadrant attends to the prompt's tokens, and says what the quadrant shows."""

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(CELLS), width) * 0.1)
        self.attention = nn.MultiheadAttention(width, _HEADS, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens (n, length, width) as logits (4 n, values) per attribute."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read = self.norm(self.attention(queries, tokens, tokens, need_weights=False)[0]).flatten(0, 1)
        return {name: head(read) for name, head in self.heads.items()}


class PromptPart:
    """Learns to encode captions so that each quadrant's object can be read off their tokens."""

    name = "prompts"

    def __init__(self, text_encoder: CLIPTextModel, seed: int = 0):
        self.seed, self.text_encoder = seed, text_encoder
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = clip_tokenizer(folder, pad_token="!")
        self.reader = QuadrantReader(text_encoder.config.hidden_size)
        self.model = nn.ModuleDict({"text_encoder": text_encoder, "reader": self.reader})

    def _read(self, captions: list[str]) -> dict[str, Tensor]:
        ids = self.tokenizer(captions, padding=True, return_tensors="pt").input_ids
        return self.reader(self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state)

    def loss(self, step: int, batch_size: int) -> Tensor:
        """Cross-entropy of every attribute of every quadrant, summed over the attributes."""
        scenes = [sample_scene("train", number) for number in scene_numbers(self.seed, step, batch_size)]
        read = self._read([caption(scene) for scene in scenes])
        known = {name: label.to(self.text_encoder.device) for name, label in labels(scenes).items()}
        return torch.stack([nn.functional.cross_entropy(read[name], known[name]) for name in known]).sum()

    @torch.no_grad()
    def check(self, count: int) -> dict[str, float]:
        """Share rightly read of each attribute of held-out scenes, and the least of them."""
        scenes = [sample_scene("validation", number) for number in range(count)]
        read, known = self._read([caption(scene) for scene in scenes]), labels(scenes)
        right = {
            name: (read[name].argmax(dim=1).cpu() == label)[label >= 0].float().mean().item()
            for name, label in known.items()
            if (label >= 0).any()
        }
        return {"least": min(right.values()), **right}

    def write(self, folder: str | Path) -> None:
        """Writes `prompts/`: the text encoder in transformers' layout."""
        self.text_encoder.save_pretrained(Path(folder) / "prompts")
