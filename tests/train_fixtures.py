"""Published parts in miniature, as folders, and data to train them on."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import tiny
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "what",
    "is",
    "the",
    "left",
    "right",
    "colour",
    "of",
    "thing",
    "?",
    "red",
    "green",
    "blue",
    "yellow",
    "black",
    "white",
    "grey",
    "pink",
    "brown",
    "orange",
]
COLOURS = dict(
    zip(
        ["red", "green", "blue", "yellow", "black", "white", "grey", "pink", "brown", "orange"],
        [
            (220, 20, 20), (20, 200, 20), (20, 20, 220), (230, 230, 20), (5, 5, 5),
            (250, 250, 250), (128, 128, 128), (255, 150, 190), (110, 60, 20), (255, 140, 0),
        ],
    )
)  # fmt: skip


def write_parts(root: Path) -> dict[str, str]:
    """Folders in the published layouts: `sd2`, `sdxl` (deep enough for its papers' tap), `clip`, `dinov2` and `lm`."""
    torch.manual_seed(0)
    for kind in ("sd2", "sdxl"):
        tiny.save_diffusion(root / kind, kind)
    deep = {**tiny.UNET_SDXL, "transformer_layers_per_block": [1, 2, 8]}
    UNet2DConditionModel.from_config(deep).save_pretrained(root / "sdxl" / "unet")
    for kind in ("clip", "dinov2"):
        tiny.save_vision(root / kind, kind)
    write_language_model(root / "lm")
    return {name: str(root / name) for name in ("sd2", "sdxl", "clip", "dinov2", "lm")}


def write_language_model(folder: Path) -> None:
    words = [*WORDS, "USER:", "ASSISTANT:", "A", "chat", "\n", "answer"]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    splits = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    LlamaForCausalLM(tiny.text_config(vocab_size=64, bos_token_id=1, eos_token_id=2)).save_pretrained(folder)


def write_colours(folder: Path, n: int = 10, n_images: int = 1) -> Path:
    """A LLaVA data file of n samples that ask for the colour of plain images."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    samples = []
    for i, (name, colour) in enumerate(list(COLOURS.items())[:n]):
        noise = np.random.default_rng(i).integers(-5, 5, (40, 30, 3))
        PIL.Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(
            folder / "images" / f"{i}.png"
        )
        turns = [
            {"from": "human", "value": "<image>\nwhat is the colour of the thing ?"},
            {"from": "gpt", "value": name},
        ]
        samples.append({"id": i, "image": f"images/{i}.png", "conversations": turns})
    path = folder / "colours.json"
    path.write_text(json.dumps(samples))
    return path


def command(work: Path, output: str, **flags) -> list[str]:
    """A short float32 run on the tiny parts and colours in `work`; flags win, and None leaves one out."""
    defaults = {
        "diffusion": work / "sd2",
        "vision": work / "clip",
        "language_model": work / "lm",
        "image_size": 64,
        "grid_size": 4,
        "fusion_num_attention_heads": 4,
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
    if "init_from" in flags:
        for name in ("diffusion", "vision", "language_model", "image_size", "grid_size", "fusion_num_attention_heads"):
            del defaults[name]
    settings = {**defaults, **flags, "output_dir": work / output}
    return [str(x) for name, value in settings.items() if value is not None for x in (f"--{name}", value)]


def losses(folder: Path, step: int = 4) -> list[float]:
    """The logged losses of a run, one a step."""
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def weights(folder: Path, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """The final weights of a run."""
    return load_file(folder / name)
