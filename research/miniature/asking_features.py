"""Scenes with a question each and all features that the variants of the study of questions read, computed once."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.atomic_files import atomic_path
from sdllava.parts import read_parts
from sdllava.scenes.language import caption, sample_question
from sdllava.scenes.render import render

from .crowded import crowded_example
from .rewriting import rewrite
from .scales import TOWER

PARTS = {"diffusion": "diffusion", "vision": "clip", "language_model": "llm"}
WORLDS: dict[str, dict[str, Any]] = {
    "scenes": TOWER,
    "crowded": TOWER | {"image_size": 96, "grid_size": 12, "vision_image_size": 96},
}
"""The kinds of images, and the fields of the model that reads them."""
PROMPTS = ("question", "caption")
"""What the diffusion model is conditioned on: the question, or the question rewritten as a caption."""
_BATCH = 50


@dataclass(frozen=True)
class Examples:
    """Images with a caption, a question and an answer each, and their features.

    Attributes:
        captions, questions, answers: Texts by image.
        features: `vision`, `unconditional`, and the conditional features of each of `PROMPTS`, each
            `(images, tokens, channels)`, and `latents`.
    """

    captions: list[str]
    questions: list[str]
    answers: list[str]
    features: dict[str, Tensor]


def compose(parts: Path, world: str, **fields: Any) -> tuple[SDLlavaForConditionalGeneration, SDLlavaProcessor]:
    """A model of the miniature's parts with new fusion and projector, in float32, and its processor.

    Args:
        parts: The folder of the parts.
        world: A key of `WORLDS`.
        fields: Further fields of the model.
    """
    sources = {name: os.fspath(parts / place) for name, place in PARTS.items()}
    if fields.get("fusion") == "none":
        del sources["vision"]
    config = {name: value for name, value in WORLDS[world].items() if "vision" in sources or "vision" not in name}
    read = read_parts(**sources, **config, **fields)
    return SDLlavaForConditionalGeneration.from_parts(read, "float32"), SDLlavaProcessor.from_parts(read)


def draw(world: str, split: str, seed: int) -> tuple[Image.Image, str, str, str]:
    """Image, caption, question and answer number `seed` of a split, "train" or "test"."""
    if world == "crowded":
        return crowded_example(split, seed)
    scene, question = sample_question(split, seed)
    return render(scene), caption(scene), question.text, question.answer


def examples(out: Path, world: str, split: str, count: int) -> Examples:
    """The examples of a split. Their features are read from `out`, or computed and written there.

    Args:
        out: The folder with `parts/`.
        world: A key of `WORLDS`.
        split: "train" or "test".
        count: The number of images.
    """
    drawn = [draw(world, split, seed) for seed in range(count)]
    images, captions, questions, answers = (list(column) for column in zip(*drawn, strict=True))
    file = out / f"{world}-{split}-{count}.safetensors"
    if not file.exists():
        features = _compute(out / "parts", world, images, questions)
        with atomic_path(file) as written:
            save_file(features, written)
    return Examples(captions, questions, answers, load_file(file))


@torch.no_grad()
def _compute(parts: Path, world: str, images: list[Image.Image], questions: list[str]) -> dict[str, Tensor]:
    model, processor = compose(parts, world, fusion="concat", guidance_scales=[0.0, 1.0])
    body: Any = model.model
    found: dict[str, list[Tensor]] = {}
    for start in tqdm(range(0, len(images), _BATCH), desc=f"{world}: features", mininterval=10):
        rows = slice(start, start + _BATCH)
        pixels = processor(images=images[rows], return_tensors="pt")
        encoded = model.encode_images(pixels["pixel_values"], pixels["diffusion_pixel_values"])
        tensors = {
            "vision": encoded.vision_features,
            "unconditional": encoded.unconditional_features,
            "latents": encoded.latents,
        }
        for prompt in PROMPTS:
            texts = [rewrite(text) if prompt == "caption" else text for text in questions[rows]]
            tensors[prompt] = body.diffusion_tower(
                latents=encoded.latents,
                unconditional_features=encoded.unconditional_features,
                input_ids=processor.tokenize_questions(texts, return_tensors="pt")["diffusion_input_ids"],
            ).conditional_features
        for name, tensor in tensors.items():
            found.setdefault(name, []).append(tensor.half().contiguous())
    return {name: torch.cat(tensors) for name, tensors in found.items()}
