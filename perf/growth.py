"""How cost and memory grow.

Over questions per image, images per batch, taps, timesteps and guidance scales for the diffusion tower, and over images
per conversation for the whole model up to the first token.

    python perf/growth.py --size mini
"""

from enum import StrEnum
from typing import Annotated, Any

import models
import torch
import typer
from answering import generation, text_inputs
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Call, Device, DType, Output, Repeats, Size

from sdllava import SDLlavaDiffusionModel

TAPS = ["U-L1-R1-B0-Cross-Q", "U-L1-R0-B0-Cross-Q", "D-L2-R1-B0-Cross-Q", "M-L0-R0-B0-Cross-Q"]
TAPS_SDXL = ["U-L0-R0-B7-Out", "U-L0-R0-B4-Out", "U-L0-R0-B2-Out", "M-L0-R0-B7-Out"]
TIMESTEPS = [50, 100, 250, 500]
SCALES = [0.0, 1.0, 2.0, 4.0]
COUNTS = (1, 2, 4)


class Part(StrEnum):
    """What to measure: the diffusion tower, or the whole model."""

    tower = "tower"
    conversation = "conversation"


def encode_questions(tower: SDLlavaDiffusionModel, images: int = 1, questions: int = 1) -> Call:
    """Features of `questions` per image: one first question, then follow-up questions with cached features."""
    config, weight = tower.config, tower.backbone.unet.conv_in.weight
    pixels = torch.rand(images, 3, config.image_size, config.image_size).mul(2).sub(1).to(weight)
    ids = torch.randint(1000, 40000, (images, 77), device=weight.device)
    prompt = {"input_ids": ids, "input_ids_2": ids if config.text_encoder_2_config else None}

    def call() -> None:
        latents = tower.encode_latents(pixels)
        cached = tower(latents=latents, **prompt).unconditional_features
        for _ in range(questions - 1):
            tower(latents=latents, unconditional_features=cached, **prompt)

    return call


def encode_questions_at_once(tower: SDLlavaDiffusionModel, questions: int) -> Call:
    """Features of several questions per image in one pass, which computes the layers before the first prompt once."""
    config, weight = tower.config, tower.backbone.unet.conv_in.weight
    latents = torch.randn(1, 4, config.latent_size, config.latent_size, device=weight.device)
    ids = torch.randint(1000, 40000, (questions, 77), device=weight.device)
    ids_2 = ids if config.text_encoder_2_config else None
    return lambda: tower.extract(latents, tower.encode_prompts(ids, ids_2))


def first_token_of_conversation(model: Any, images: int) -> Call:
    """The first token of a conversation about several images, with the same question for each image."""
    config, weight = model.config, model.lm_head.weight
    side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
    inputs = {
        **text_inputs(config, images * config.num_image_tokens, 1, weight.device),
        "pixel_values": torch.randn(images, 3, clip_side, clip_side).to(weight),
        "diffusion_pixel_values": torch.rand(images, 3, side, side).mul(2).sub(1).to(weight),
        "diffusion_input_ids": torch.randint(1000, 40000, (1, 77), device=weight.device).expand(images, -1),
    }
    return generation(model, inputs, 1)


def measure_tower(bench: Bench, model: str, size: str) -> None:
    """Adds the diffusion tower's rows. Memory holds one tower at a time."""
    taps = TAPS_SDXL if model == "sdxl" else TAPS

    def build(**fields: Any) -> SDLlavaDiffusionModel:
        return models.build_tower(model, size, bench.device, bench.dtype, **fields)

    tower = build()
    for n in COUNTS:
        bench.time({f"{n} question(s) per image, one by one": encode_questions(tower, questions=n)}, per_call=n)
    for n in COUNTS:
        bench.time({f"{n} question(s) on cached latents, in one pass": encode_questions_at_once(tower, n)}, per_call=n)
    for n in COUNTS:
        bench.time({f"{n} image(s) per batch": encode_questions(tower, images=n)}, per_call=n)
    for name, values, field in (
        ("tap", taps, "taps"),
        ("timestep", TIMESTEPS, "timesteps"),
        ("scale", SCALES, "guidance_scales"),
    ):
        for n in COUNTS:
            del tower
            tower = build(**{field: values[-n:] if name == "scale" else values[:n]})
            bench.time({f"{n} {name}(s)": encode_questions(tower)}, per_call=n)


def measure_conversation(bench: Bench, size: str) -> None:
    """Adds the whole model's rows. The language model's layers share their weights."""
    llava = models.build_llava(size, bench.device, bench.dtype, tie_layers=True)
    model = models.build_ours(llava, size)
    for n in COUNTS:
        call = first_token_of_conversation(model, n)
        bench.time({f"{n} image(s) per conversation, to the first token": call}, per_call=n)


def main(
    model: Annotated[str, typer.Option(help="sd15, sd21 or sdxl. Conversations always use sd21.")] = "sd21",
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; default both.")] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 3,
    output: Output = None,
) -> None:
    """Measures one, two and four questions, images, taps, timesteps and scales."""
    bench = Bench(f"growth, {model}, {size}", size, device, dtype, repeats, output, model=model)
    parts = part or list(Part)
    with torch.inference_mode():
        if Part.tower in parts:
            measure_tower(bench, model, size)
        if Part.conversation in parts:
            measure_conversation(bench, size)
    relate_to_first(bench)
    bench.report()


def relate_to_first(bench: Bench) -> None:
    """Sets the first row of each group as the group's reference."""
    for start in range(0, len(bench.rows), len(COUNTS)):
        for row in bench.rows[start : start + len(COUNTS)]:
            row.reference = bench.rows[start].name


if __name__ == "__main__":
    typer.run(main)
