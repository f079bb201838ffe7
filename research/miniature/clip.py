"""The small CLIP, trained on scenes and their captions: patches of 8 pixels, an 8x8 grid."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from sdllava.scenes.language import caption
from sdllava.scenes.render import SIZE
from sdllava.scenes.world import sample_scene

from .images import to_pixels
from .loop import mixed_precision, scene_numbers
from .text import clip_tokenizer, write_clip_tokenizer

PATCH = 8


def clip_config(width: int, layers: int, text_width: int, text_layers: int, tokenizer: CLIPTokenizer) -> CLIPConfig:
    """The configuration of a CLIP for scenes.

    Args:
        width: Channels of the vision encoder, a multiple of 32.
        layers: Layers of the vision encoder.
        text_width: Channels of the text encoder and of the shared space, a multiple of 32.
        text_layers: Layers of the text encoder.
        tokenizer: The text encoder's tokenizer.
    """
    vision = {
        "image_size": SIZE,
        "patch_size": PATCH,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 32,
        "projection_dim": text_width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": text_width,
        "intermediate_size": 3 * text_width,
        "num_hidden_layers": text_layers,
        "num_attention_heads": text_width // 32,
        "max_position_embeddings": tokenizer.model_max_length,
        "projection_dim": text_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=text_width)


class ClipPart:
    """Trains CLIP to match the scenes of a batch with their captions."""

    name = "clip"

    def __init__(self, width: int, layers: int, text_width: int, text_layers: int, seed: int = 0):
        self.seed = seed
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer = clip_tokenizer(folder)
        self.model = CLIPModel(clip_config(width, layers, text_width, text_layers, self.tokenizer))
        self.model.set_attn_implementation("eager")  # on a CPU twice as fast in training as the fused kernel

    def _batch(self, split: str, numbers: range) -> dict[str, Tensor]:
        scenes = [sample_scene(split, number) for number in numbers]
        text = self.tokenizer([caption(scene) for scene in scenes], padding=True, return_tensors="pt")
        return {"pixel_values": to_pixels(scenes).to(self.model.device), **text.to(self.model.device)}

    def loss(self, step: int, batch_size: int) -> Tensor:
        """CLIP's contrastive loss on this step's scenes."""
        batch = self._batch("train", scene_numbers(self.seed, step, batch_size))
        with mixed_precision(self.model.device):
            return self.model(**batch, return_loss=True).loss

    @torch.no_grad()
    def check(self, count: int) -> dict[str, float]:
        """The share of held-out scenes whose own caption is the nearest of `count`."""
        logits = self.model(**self._batch("validation", range(count))).logits_per_image
        return {"retrieval": (logits.argmax(dim=1) == torch.arange(count, device=logits.device)).float().mean().item()}

    def write(self, folder: str | Path) -> None:
        """Write `clip/`: model, image processor and tokenizer, in transformers' layout."""
        folder = Path(folder) / "clip"
        self.model.save_pretrained(folder)
        image_processor().save_pretrained(folder)
        write_clip_tokenizer(folder, self.tokenizer.pad_token)


def image_processor() -> CLIPImageProcessor:
    """The image processor, which scales pixels to [-1, 1]."""
    half = [0.5, 0.5, 0.5]
    size = {"height": SIZE, "width": SIZE}
    return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size, image_mean=half, image_std=half)
