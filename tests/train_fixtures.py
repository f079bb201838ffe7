"""Tiny published parts, data, and a trained checkpoint for the tests of training, built once per session."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

COLOURS = {
    "red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (230, 230, 20),
    "black": (5, 5, 5), "white": (250, 250, 250), "grey": (128, 128, 128), "pink": (255, 150, 190),
    "brown": (110, 60, 20), "orange": (255, 140, 0),
}  # fmt: skip
WORDS = ["what", "is", "the", "left", "right", "colour", "of", "thing", "?", *COLOURS]
WORDS += ["USER:", "ASSISTANT:", "A", "chat", "\n", "answer"]

SMALL_UNET = {
    **tiny.UNET_SD2,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
"""The smallest UNet that has the papers' tap, U-L1-R1-B0-Cross-Q."""

PART_SIZES = {"image_size": 64, "grid_size": 4, "fusion_num_attention_heads": 4}
"""The fields of a configuration that fit the parts."""

FINAL_FILES = ("model.safetensors", "adapter_model.safetensors")


def write_parts(root: Path) -> dict[str, str]:
    """Folders in the published layouts: `sd2`, `clip` and `lm`."""
    torch.manual_seed(0)
    tiny.save_diffusion(root / "sd2", "sd2")
    UNet2DConditionModel.from_config(SMALL_UNET).save_pretrained(root / "sd2" / "unet")
    tiny.save_vision(root / "clip", "clip")
    write_language_model(root / "lm")
    return {name: str(root / name) for name in ("sd2", "clip", "lm")}


def write_language_model(folder: Path) -> None:
    """A Llama with a tokenizer of whole words."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    splits = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    LlamaForCausalLM(tiny.text_config(vocab_size=64, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)


def write_colours(folder: Path, n: int = 10) -> Path:
    """A LLaVA data file of n samples with a question about the colour of plain images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for i, (name, colour) in enumerate(list(COLOURS.items())[:n]):
        noise = np.random.default_rng(i).integers(-5, 5, (40, 30, 3))
        image = PIL.Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))
        image.save(folder / "images" / f"{i}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat is the colour of the thing ?"},
            {"from": "gpt", "value": name},
        ]
        samples.append({"id": i, "image": f"images/{i}.png", "conversations": turns})
    path = folder / "colours.json"
    path.write_text(json.dumps(samples))
    return path


def command(work: Path, output: str, **flags) -> list[str]:
    """A short float32 run on the parts and colours in `work`; flags win, and None leaves one out."""
    parts = {"diffusion": work / "sd2", "vision": work / "clip", "language_model": work / "lm", **PART_SIZES}
    defaults = {
        "train_data": work / "data" / "colours.json",
        "learning_rate": 5e-3,
        "max_steps": 4,
        "save_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "bf16": "false",
        "use_cpu": "true",
        "gradient_checkpointing": "false",
        "disable_tqdm": "true",
    }
    settings = {**({} if "init_from" in flags else parts), **defaults, **flags, "output_dir": work / output}
    return [str(x) for name, value in settings.items() if value is not None for x in (f"--{name}", value)]


def model_arguments(work: Path, **fields):
    """The `ModelArguments` of `command`, for the functions that build the model."""
    from sdllava.train.arguments import ModelArguments

    parts = {"diffusion": str(work / "sd2"), "vision": str(work / "clip"), "language_model": str(work / "lm")}
    return ModelArguments(**{**parts, **PART_SIZES, **fields})


def losses(folder: Path, step: int = 4) -> list[float]:
    """The logged losses of a run, one per step."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return load_file(folder / name)


@pytest.fixture(scope="session")
def training_parts(build_once: Callable[..., Path]) -> Path:
    """The parts, the data in `data`, and in `trained` a checkpoint of two steps. Tests only read it."""

    def fill(folder: Path) -> None:
        from sdllava.train.run import train

        write_parts(folder)
        write_colours(folder / "data")
        train(command(folder, "trained", max_steps=2, save_strategy="no", learning_rate=1e-2))

    return build_once("training-parts", fill)


@pytest.fixture(scope="module")
def work(training_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for runs, with links to the parts and the trained checkpoint, and a copy of the data."""
    root = tmp_path_factory.mktemp("work")
    for name in ("sd2", "clip", "lm", "trained"):
        (root / name).symlink_to(training_parts / name)
    shutil.copytree(training_parts / "data", root / "data")
    return root
