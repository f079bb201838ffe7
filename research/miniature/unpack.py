"""The parts of the released checkpoint as a folder, on which other parts can be trained without these."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from sdllava import SDLlavaForConditionalGeneration, mini_path
from sdllava.atomic_files import atomic_path
from sdllava.run_records import begin_run

from .clip import image_processor
from .scales import SCALES
from .text import llm_tokenizer
from .unet import UnetPart


def unpack(folder: str | os.PathLike) -> Path:
    """Write `diffusion/`, `prompts/`, `clip/` and `llm/` from the checkpoint of the package.

    They differ from those of a finished training in three points: they were stored in half precision, `llm/` is the
    Llama after both stages, and `clip/` only has the vision encoder. The judge is not in the checkpoint.

    Args:
        folder: The folder. Parts that are there are left as they are.

    Returns:
        `Path`: The folder.
    """
    folder = Path(folder)
    begin_run(folder / "settings.json", {"scale": "mini", "seed": 0})
    model = SDLlavaForConditionalGeneration.from_pretrained(mini_path(), dtype=torch.float32)
    body: Any = model.model
    tower = body.diffusion_tower.backbone
    if not (folder / "diffusion").exists():
        UnetPart(tower.vae, tower.text_encoder, tower.unet, SCALES["mini"].budgets["unet"].steps).write(folder)
    parts = {"prompts": [tower.text_encoder], "clip": [body.vision_tower, image_processor()]}
    llama = LlamaForCausalLM(model.config.text_config)
    llama.model.load_state_dict(body.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    for name, written in (parts | {"llm": [llama, llm_tokenizer()]}).items():
        if not (folder / name).exists():
            with atomic_path(folder / name) as target:
                for part in written:
                    part.save_pretrained(target)
    return folder
