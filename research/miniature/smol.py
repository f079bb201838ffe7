"""`sdllava-smol`: the miniature's encoders with SmolLM2-135M, initialised, fine-tuned, then shipped.

The projector is aligned by regression instead of on captions: the token of each quadrant is to be the sum of SmolLM2's
embeddings of the words that describe the quadrant's object. This costs minutes, because the language model does not
run. LoRA on the language model is then an ordinary recipe (`recipes/smol-finetune.yaml`), which keeps the projector.
"""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdllava import SDLlavaForConditionalGeneration, mini_path
from sdllava.atomic_files import atomic_path, write_json
from sdllava.miniature.smol import compose_smol
from sdllava.scenes.dataset import scene_dataset
from sdllava.scenes.render import render
from sdllava.scenes.world import (
    CELLS,
    COLOURS,
    DIRECTIONS,
    FURTHER_COLOURS,
    FURTHER_SHAPES,
    LETTERS,
    PATTERNS,
    SHAPES,
    STATES,
    VIEWPOINTS,
    Scene,
    sample_scene,
)
from sdllava.train.machine import computes_in_bfloat16
from sdllava.train.run import train

from .stages import RECIPES

SPLITS = ("varied", "varied", "train")
"""The splits of the training scenes, in turn. Further colours and shapes teach that every colour goes with every shape,
which the training split alone contradicts for the held-out pairs."""
WORDS = (
    *("empty", *COLOURS, *FURTHER_COLOURS, *SHAPES, *FURTHER_SHAPES, *DIRECTIONS, *LETTERS, *STATES),
    *("border", *VIEWPOINTS, "top", "bottom"),
)
PRACTISED = ("text", "orientation", "count", "count", "presence", "presence")
"""Patterns that are drawn more often."""
LOOK_UPS = ("structure", "colour", "text", "orientation", "state")
"""The patterns of the first questions: looking an object up must be learned before anything else."""

CHAT = (
    ("What is the capital of Italy?", "The capital of Italy is Rome."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("What is the largest planet of the solar system?", "The largest planet of the solar system is Jupiter."),
    ("What colour is the sky on a clear day?", "On a clear day, the sky is blue."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Name a fruit.", "An apple is a fruit."),
    ("What do bees make?", "Bees make honey."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("What language is spoken in Brazil?", "Portuguese is spoken in Brazil."),
    ("Hello!", "Hello! How can I help you today?"),
)
"""Questions without an image, one in 16 conversations, so that the language model keeps answering in sentences."""


def quadrant_words(scene: Scene) -> torch.Tensor:
    """The weight of each of `WORDS` in the token of each quadrant, `(4, words)`."""
    weights = torch.zeros(len(CELLS), len(WORDS))
    objects = {item.cell: item for item in scene.objects}
    for row, cell in zip(weights, CELLS, strict=True):
        item = objects.get(cell)
        words = ["empty"] if item is None else [item.colour, item.shape, item.direction, item.letter, item.state]
        words += ["border"] if item and item.border else []
        for word in filter(None, words):
            row[WORDS.index(word)] += 1.0
        for word in (scene.viewpoint, *cell.split()):  # "left" and "right" are directions, too
            row[WORDS.index(word)] += 0.5
    return weights


def initialise_projector(
    model: SDLlavaForConditionalGeneration, processor: Any, scenes: int, steps: int, batch_size: int = 64
) -> None:
    """Train fusion and projector to write the words of each quadrant, in place. The fusion starts as the miniature's.

    Args:
        model: From [`~sdllava.miniature.smol.compose_smol`].
        processor: Its processor.
        scenes: The number of training scenes whose features are computed.
        steps: Optimizer steps.
        batch_size: Scenes per step.
    """
    body: Any = model.model
    prefix = "model.fusion."
    saved = load_file(mini_path() / "model.safetensors")
    fusion = {name.removeprefix(prefix): value.float() for name, value in saved.items() if name.startswith(prefix)}
    body.fusion.load_state_dict(fusion)
    with torch.no_grad():
        body.multi_modal_projector.linear_2.weight.mul_(0.1)
        body.multi_modal_projector.linear_2.bias.zero_()
    words = torch.stack([_embedding(model, processor, word) for word in WORDS])
    to_weights = torch.linalg.pinv(words)
    per_value = words.norm(dim=1).mean() / words.shape[1] ** 0.5
    drawn = [sample_scene(SPLITS[number % len(SPLITS)], 700_000_000 + number) for number in range(scenes)]
    vision, diffusion = _features(model, processor, drawn)
    weights = torch.stack([quadrant_words(scene) for scene in drawn])
    groups = [
        {"params": body.fusion.parameters(), "lr": 5e-4},
        {"params": body.multi_modal_projector.parameters(), "lr": 1.5e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.97 * step / steps)
    )
    for _ in range(steps):
        rows = torch.randint(scenes, (batch_size,))
        tokens = body.multi_modal_projector(body.fusion(vision[rows].float(), diffusion[rows].float()))
        wanted = weights[rows]
        error = ((tokens @ to_weights - wanted) ** 2).sum(-1).mean()
        loss = error + 0.05 * ((tokens - wanted @ words) / per_value).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _embedding(model: Any, processor: Any, word: str) -> torch.Tensor:
    ids = processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
    return model.get_input_embeddings().weight[ids].sum(0)


@torch.no_grad()
def _features(model: Any, processor: Any, scenes: list[Scene], batch_size: int = 32) -> tuple[torch.Tensor, ...]:
    """The vision encoder's and the unconditional features of scenes, in half precision."""
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(scenes), batch_size):
        images = [render(scene) for scene in scenes[start : start + batch_size]]
        pixels = processor(images=images, return_tensors="pt")
        found = model.encode_images(pixels["pixel_values"], pixels["diffusion_pixel_values"])
        parts.append((found.vision_features.half(), found.unconditional_features.half()))
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def write_data(folder: Path, scenes: int) -> None:
    """Write the conversations of stage 2 in the order of training, `finetune.parquet`.

    Descriptions of single objects come first: each of their words is looked up in the image tokens, so that they teach
    this with a tenth of the tokens that questions with one-word answers need. Questions that look objects up follow,
    then all patterns, mixed with descriptions.

    Args:
        folder: Where the file is written.
        scenes: Scenes of stage 2.
    """
    described = _rows(scenes // 2, 10, task="descriptions")
    look_ups = _rows(scenes // 8, 11, turns=7, patterns=LOOK_UPS)
    questions = _rows(scenes, 12, turns=7, patterns=(*PATTERNS, *PRACTISED))
    rows = [*described[: scenes // 6], *look_ups]
    rest = iter(described[scenes // 6 :])
    rows += [next(rest, row) if number % 4 == 0 else row for number, row in enumerate(questions)][: scenes - len(rows)]
    conversations = [{"images": row["images"], "messages": row["messages"]} for row in rows]
    for place, chat in zip(range(7, len(conversations), 16), itertools.cycle(CHAT), strict=False):
        conversations[place] = _chat_row(*chat)
    finetune = datasets.Dataset.from_list(conversations, on_mixed_types="use_json")
    with atomic_path(folder / "finetune.parquet") as written:
        finetune.cast_column("images", datasets.List(datasets.Image())).to_parquet(written)


def _rows(count: int, seed: int, **options: Any) -> list[dict[str, Any]]:
    """Rows of the splits in turn."""
    drawn = {split: iter(scene_dataset(split, count, seed, **options)) for split in set(SPLITS)}
    return [next(drawn[SPLITS[number % len(SPLITS)]]) for number in range(count)]


def _chat_row(question: str, answer: str) -> dict[str, Any]:
    turns = (("user", question), ("assistant", answer))
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    return {"images": [], "messages": messages}


def train_smol(folder: str | os.PathLike, scenes: int = 24_000, steps: int = 7000, max_steps: int = 1900) -> Path:
    """Compose, initialise and fine-tune. Finished parts are kept, and the recipe resumes.

    Args:
        folder: For `base/`, the data and `finetune/`.
        scenes: Scenes of the initialisation.
        steps: Steps of the initialisation.
        max_steps: Steps of stage 2, of three conversations each.

    Returns:
        `Path`: The folder of the adapter.
    """
    folder = Path(folder)
    torch.manual_seed(0)
    if not (folder / "base").exists():
        model, processor = compose_smol()
        initialise_projector(model, processor, scenes, steps)
        with atomic_path(folder / "base") as written:
            model.save_pretrained(written)
            processor.save_pretrained(written)
    if not (folder / "finetune.parquet").exists():
        write_data(folder, 3 * max_steps)
    output = folder / "finetune"
    if not (output / "adapter_config.json").exists():
        options: dict[str, Any] = {
            "init_from": folder / "base",
            "train_data": folder / "finetune.parquet",
            "output_dir": output,
            "bf16": computes_in_bfloat16(),
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        train(["--config", str(RECIPES / "smol-finetune.yaml"), *words, "--max_steps", str(max_steps)])
    return output


def write_adapter(source: str | os.PathLike, base: str | os.PathLike, target: str | os.PathLike) -> None:
    """Write the adapter that the package ships: LoRA, projector and fusion in float16, without paths of this machine.

    Args:
        source: The adapter of stage 2, also a checkpoint.
        base: The checkpoint that it was trained on, whose projector and fusion stay as they are.
        target: The folder, `sdllava/miniature/sdllava-smol`.
    """
    config = json.loads((Path(source) / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": None, "modules_to_save": ["multi_modal_projector", "fusion"]}
    tensors = load_file(Path(source) / "adapter_model.safetensors")
    kept = ("model.multi_modal_projector.", "model.fusion.")
    with safe_open(Path(base) / "model.safetensors", "pt") as weights:
        names = [name for name in weights.keys() if name.startswith(kept)]  # noqa: SIM118  # not a dict
        tensors |= {f"base_model.model.{name}": weights.get_tensor(name) for name in names}
    with atomic_path(target) as written:
        written.mkdir()
        save_file({name: tensor.half() for name, tensor in tensors.items()}, written / "adapter_model.safetensors")
        write_json(written / "adapter_config.json", config)
