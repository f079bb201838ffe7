"""The fingerprints of the miniature's parts, by which the study recognises them."""

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import AutoModel, CLIPTextModel, CLIPTextModelWithProjection, LlamaForCausalLM

from sdllava.fingerprints import weights_hash

CLASSES: dict[str, Any] = {
    "diffusion/vae": AutoencoderKL,
    "diffusion/unet": UNet2DConditionModel,
    "diffusion/text_encoder": CLIPTextModel,
    "mmdit/vae": AutoencoderKL,
    "mmdit/transformer": SD3Transformer2DModel,
    "mmdit/text_encoder": CLIPTextModelWithProjection,
    "clip": AutoModel,
    "llm": LlamaForCausalLM,
}


def part_hash(folder: Path, name: str) -> str:
    """The fingerprint of a trained part.

    Args:
        folder: The folder of the miniature's parts.
        name: One of [`CLASSES`].

    Raises:
        FileNotFoundError: The folder does not contain the part.
    """
    if not (folder / name / "config.json").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} does not contain the trained part {name!r}. Run `python -m research.miniature train` "
            "first."
        )
    return weights_hash(CLASSES[name].from_pretrained(folder / name))
