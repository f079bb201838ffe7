"""`sdllava-smol`: the miniature's encoders with SmolLM2-135M, initialised, fine-tuned, then shipped.

The projector is aligned by regression instead of on captions: the token of each quadrant is to be the sum of SmolLM2's
embeddings of the words that describe the quadrant's object. This costs minutes, because the language model does not
run. LoRA on the language model is then an ordinary recipe (`recipes/smol-finetune.yaml`), which keeps the projector.
"""

import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import trange
from transformers import LlamaForCausalLM

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor, mini_path
from sdllava.atomic_files import atomic_path, write_json
from sdllava.miniature.smol import COMPOSITION, compose_smol, smol_path, write_parts
from sdllava.parts import read_parts
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
        model: From [`~sdllava.miniature.smol.compose_smol`] or [`compose_only_clip`].
        processor: Its processor.
        scenes: The number of training scenes whose features are computed.
        steps: Optimizer steps.
        batch_size: Scenes per step.
    """
    body: Any = model.model
    groups = [{"params": body.multi_modal_projector.parameters(), "lr": 1.5e-3}]
    if body.fusion is not None:
        prefix = "model.fusion."
        saved = load_file(mini_path() / "model.safetensors")
        fusion = {name.removeprefix(prefix): value.float() for name, value in saved.items() if name.startswith(prefix)}
        body.fusion.load_state_dict(fusion)
        groups.append({"params": body.fusion.parameters(), "lr": 5e-4})
    with torch.no_grad():
        body.multi_modal_projector.linear_2.weight.mul_(0.1)
        body.multi_modal_projector.linear_2.bias.zero_()
    words = torch.stack([_embedding(model, processor, word) for word in WORDS])
    to_weights = torch.linalg.pinv(words)
    per_value = words.norm(dim=1).mean() / words.shape[1] ** 0.5
    drawn = [sample_scene(SPLITS[number % len(SPLITS)], 700_000_000 + number) for number in range(scenes)]
    vision, diffusion = _features(model, processor, drawn)
    weights = torch.stack([quadrant_words(scene) for scene in drawn])
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.97 * step / steps)
    )
    for _ in trange(steps, desc="projector", mininterval=10):
        rows = torch.randint(scenes, (batch_size,))
        features = vision[rows].float()
        if diffusion is not None:
            features = body.fusion(features, diffusion[rows].float())
        tokens = body.multi_modal_projector(features)
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
def _features(
    model: Any, processor: Any, scenes: list[Scene], batch_size: int = 32
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The vision encoder's and the unconditional features of scenes, in half precision."""
    vision, diffusion = [], []
    for start in trange(0, len(scenes), batch_size, desc="features", mininterval=10):
        images = [render(scene) for scene in scenes[start : start + batch_size]]
        found = model.encode_images(**processor(images=images, return_tensors="pt"))
        vision.append(found.vision_features.half())
        if found.unconditional_features is not None:
            diffusion.append(found.unconditional_features.half())
    return torch.cat(vision), torch.cat(diffusion) if diffusion else None


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


def compose_only_clip() -> tuple[SDLlavaForConditionalGeneration, SDLlavaProcessor]:
    """sdllava-smol without its diffusion model, with a new projector: the baseline.

    The language model keeps the LoRA that was trained with the diffusion model's features.
    """
    smol = SDLlavaForConditionalGeneration.from_pretrained(smol_path(), dtype=torch.float32)
    llama = LlamaForCausalLM(smol.config.text_config)
    llama.model.load_state_dict(smol.model.language_model.state_dict())
    llama.tie_weights()
    with tempfile.TemporaryDirectory() as folder:
        write_parts(folder)
        for part in (llama, SDLlavaProcessor.from_pretrained(smol_path()).tokenizer):
            part.save_pretrained(Path(folder) / "llm")
        sources = {"vision": f"{folder}/clip", "language_model": f"{folder}/llm"}
        parts = read_parts(**sources, fusion="none", spatial_merge_size=COMPOSITION["spatial_merge_size"])
        return SDLlavaForConditionalGeneration.from_parts(parts, "float32"), SDLlavaProcessor.from_parts(parts)


def write_only_clip(folder: str | os.PathLike, scenes: int = 24_000, steps: int = 7000) -> Path:
    """Train the projector of the baseline as smol's, and write the checkpoint.

    Args:
        folder: The folder of the checkpoint. A finished one is kept.
        scenes, steps: As of [`train_smol`].

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    if not folder.exists():
        torch.manual_seed(0)
        model, processor = compose_only_clip()
        initialise_projector(model, processor, scenes, steps)
        model.config.is_trained = True
        with atomic_path(folder) as written:
            model.save_pretrained(written)
            processor.save_pretrained(written)
    return folder


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
