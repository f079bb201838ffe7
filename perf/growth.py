"""How cost and memory grow with questions per image, images at once, taps, timesteps, guidance scales, and, of the whole
model up to the first token, with images in one conversation.

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
    """What can be measured: the diffusion tower, the whole model."""

    tower = "tower"
    conversation = "conversation"


def ask(tower: SDLlavaDiffusionModel, images: int = 1, questions: int = 1) -> Call:
    """`questions` about each of `images`: one first question, then follow-up ones from what was kept."""
    config, weight = tower.config, tower.unet.conv_in.weight
    pixels = torch.rand(images, 3, config.image_size, config.image_size).mul(2).sub(1).to(weight)
    ids = torch.randint(1000, 40000, (images, 77), device=weight.device)
    prompt = {"input_ids": ids, "input_ids_2": ids if config.text_encoder_2_config else None}

    def call() -> None:
        latents = tower.encode_latents(pixels)
        kept = tower(latents=latents, **prompt).unconditional_features
        for _ in range(questions - 1):
            tower(latents=latents, unconditional_features=kept, **prompt)

    return call


def ask_at_once(tower: SDLlavaDiffusionModel, questions: int) -> Call:
    """Several questions about one image in one pass, which shares what no question has reached."""
    config, weight = tower.config, tower.unet.conv_in.weight
    latents = torch.randn(1, 4, config.latent_size, config.latent_size, device=weight.device)
    ids = torch.randint(1000, 40000, (questions, 77), device=weight.device)
    ids_2 = ids if config.text_encoder_2_config else None
    return lambda: tower.extract(latents, tower.encode_prompts(ids, ids_2))


def ask_about_several(model: Any, images: int) -> Call:
    """The first token of an answer about several images in one conversation, each asked the same question."""
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
    """Adds the diffusion tower's rows, one tower after the other."""
    taps = TAPS_SDXL if model == "sdxl" else TAPS

    def tower(**fields) -> SDLlavaDiffusionModel:
        return models.build_tower(model, size, bench.device, bench.dtype, **fields)

    one: SDLlavaDiffusionModel | None = tower()
    for n in COUNTS:
        bench.time({f"{n} question(s) on an image, one by one": ask(one, questions=n)}, per_call=n)
    for n in COUNTS:
        bench.time({f"{n} question(s) on known latents, in one pass": ask_at_once(one, n)}, per_call=n)
    for n in COUNTS:
        bench.time({f"{n} image(s) at once": ask(one, images=n)}, per_call=n)
    for name, values, field in (
        ("tap", taps, "taps"),
        ("timestep", TIMESTEPS, "timesteps"),
        ("scale", SCALES, "guidance_scales"),
    ):
        for n in COUNTS:
            one = None  # so that memory holds one tower at a time
            one = tower(**{field: values[-n:] if name == "scale" else values[:n]})
            bench.time({f"{n} {name}(s)": ask(one)}, per_call=n)


def measure_conversation(bench: Bench, size: str) -> None:
    """Adds the whole model's rows; its language model's layers share their weights."""
    llava = models.build_llava(size, bench.device, bench.dtype, tie_layers=True)
    model = models.build_ours(llava, size)
    for n in COUNTS:
        bench.time({f"{n} image(s) in a conversation, to the first token": ask_about_several(model, n)}, per_call=n)


def main(
    model: Annotated[str, typer.Option(help="sd15, sd21 or sdxl; a conversation is always sd21's.")] = "sd21",
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; default both.")] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 3,
    output: Output = None,
) -> None:
    """Seconds for one, two and four questions, images, taps, timesteps, scales, beside one."""
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
    """A row's ratio is to the first of its group."""
    for start in range(0, len(bench.rows), len(COUNTS)):
        for row in bench.rows[start : start + len(COUNTS)]:
            row.reference = bench.rows[start].name


if __name__ == "__main__":
    typer.run(main)
