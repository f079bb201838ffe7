"""The UNet's text encoder, trained to encode which attribute of a caption belongs to which quadrant.

It starts from CLIP's text encoder, which does not need this to distinguish two scenes. From the UNet's error only, it
is learnt too slowly.
"""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel

from sdllava.scenes.language import caption
from sdllava.scenes.world import CELLS, sample_scene

from .judge import ATTRIBUTES, labels
from .loop import scene_numbers
from .text import clip_tokenizer

_HEADS = 4


class QuadrantReader(nn.Module):
    """Reads the attributes of each quadrant from a prompt's tokens, with one learnt query per quadrant.

    Args:
        width: Channels of the tokens, a multiple of 4.
    """

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(CELLS), width) * 0.1)
        self.attention = nn.MultiheadAttention(width, _HEADS, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """Tokens `(n, length, width)` as logits `(4 n, values)` per attribute."""
        queries = self.queries.expand(len(tokens), -1, -1)
        read = self.norm(self.attention(queries, tokens, tokens, need_weights=False)[0]).flatten(0, 1)
        return {name: head(read) for name, head in self.heads.items()}


class PromptPart:
    """Trains the text encoder so that each quadrant's object can be read from a caption's tokens.

    Args:
        text_encoder: CLIP's text encoder, which is trained.
        seed: Selects the scenes.
    """

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
        """Cross-entropy on the captions of this step's scenes, summed over the attributes."""
        scenes = [sample_scene("train", number) for number in scene_numbers(self.seed, step, batch_size)]
        read = self._read([caption(scene) for scene in scenes])
        known = {name: label.to(self.text_encoder.device) for name, label in labels(scenes).items()}
        return torch.stack([nn.functional.cross_entropy(read[name], known[name]) for name in known]).sum()

    @torch.no_grad()
    def check(self, count: int) -> dict[str, float]:
        """The accuracy on held-out captions: by attribute, and as "least" the lowest of them."""
        scenes = [sample_scene("validation", number) for number in range(count)]
        read, known = self._read([caption(scene) for scene in scenes]), labels(scenes)
        correct = {
            name: (read[name].argmax(dim=1).cpu() == label)[label >= 0].float().mean().item()
            for name, label in known.items()
            if (label >= 0).any()
        }
        return {"least": min(correct.values()), **correct}

    def write(self, folder: str | Path) -> None:
        """Write `prompts/`: the text encoder in transformers' layout."""
        self.text_encoder.save_pretrained(Path(folder) / "prompts")
