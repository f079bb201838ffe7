"""Question answering: time to the first token and decoding speed, against transformers' LLaVA of the same language model
(whose weights are shared) and against our model without its diffusion tower.

    python perf/answering.py                       # Vicuna-7B's size; needs a GPU or 40 GiB of memory
    python perf/answering.py --tie-layers          # as many operations, in 9 GiB
    python perf/answering.py --size mini --batch 1 --batch 8
"""

from typing import Annotated, Any

import models
import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Call, Device, DType, Output, Repeats, Row, Size, batches

QUESTION_TOKENS = 48
"""Tokens of the conversation around the image."""


def text_inputs(config: Any, image_tokens: int, n: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Conversations of random tokens around an image, `(n, QUESTION_TOKENS + image_tokens)`."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.text_config.vocab_size - 1, (n, QUESTION_TOKENS + image_tokens), generator=draw)
    ids[:, 8 : 8 + image_tokens] = config.image_token_index
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


class Subjects:
    """transformers' LLaVA, ours with CLIP alone, and ours: one language model in all three."""

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype, tie_layers: bool = False):
        self.llava = models.build_llava(size, device, dtype, tie_layers)
        self.clip_only = models.build_ours(self.llava, size, diffusion=False)
        self.ours = models.build_ours(self.llava, size)
        self.device, self.dtype = device, dtype

    def ways(self, n: int) -> dict[str, tuple[Any, dict[str, Any]]]:
        """Name of each way to ask, its model, and the inputs of `generate`."""
        draw = torch.Generator().manual_seed(0)
        config = self.ours.config
        side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
        pixels = torch.randn(n, 3, clip_side, clip_side, generator=draw).to(self.device, self.dtype)
        diffusion_pixels = torch.rand(n, 3, side, side, generator=draw).mul(2).sub(1).to(self.device, self.dtype)
        ids = torch.tensor([config.diffusion_config.null_input_ids] * n)
        ids[:, 1:20] = torch.randint(1000, 40000, (n, 19), generator=draw)
        question = {"diffusion_input_ids": ids.to(self.device)}
        text = text_inputs(config, config.num_image_tokens, n, self.device)
        encodings = self.ours.encode_images(pixels, diffusion_pixels)
        images = {"pixel_values": pixels}
        return {
            "transformers' LLaVA": (self.llava, {**text, **images}),
            "ours, CLIP alone": (self.clip_only, {**text, **images}),
            "ours, CLIP alone, image known": (
                self.clip_only,
                {**text, "image_encodings": self.clip_only.encode_images(pixels)},
            ),
            "ours, first question": (
                self.ours,
                {**text, **images, **question, "diffusion_pixel_values": diffusion_pixels},
            ),
            "ours, follow-up question": (self.ours, {**text, **question, "image_encodings": encodings}),
        }


def generation(model: Any, inputs: dict[str, Any], new_tokens: int) -> Call:
    """Greedy decoding of exactly `new_tokens`."""
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(**inputs, **length)


def measure(bench: Bench, subjects: Subjects, n: int, new_tokens: int) -> None:
    """Adds the rows of `n` questions at once: the first token of each way, then decoding alone."""
    ways = subjects.ways(n)
    first = bench.time(
        {f"first token, {name}, batch {n}": generation(*way, 1) for name, way in ways.items()},
        reference=f"first token, ours, CLIP alone, batch {n}",
        per_call=n,
    )
    first[
        f"first token, ours, follow-up question, batch {n}"
    ].reference = f"first token, ours, CLIP alone, image known, batch {n}"
    whole = bench.time(
        {f"{name}, batch {n}": generation(*way, 1 + new_tokens) for name, way in ways.items()}, per_call=n
    )
    del bench.rows[-len(whole) :]  # decoding is what the tokens behind the first add
    reference = f"decoding, transformers' LLaVA, batch {n}"
    for start, end in zip(first.values(), whole.values()):
        row = Row(f"decoding, {end.name}", reference, per_call=n * new_tokens, memory_gib=end.memory_gib)
        row.seconds = [b - a for a, b in zip(start.seconds, end.seconds)]
        row.gflop = end.gflop - start.gflop
        row.note = f"{row.per_call / row.median:.1f} tokens/s"
        bench.rows.append(row)


def main(
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Questions at once; default 1 to 32 on a GPU.")] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens behind the first; decoding is what they add.")] = 32,
    tie_layers: Annotated[
        bool, typer.Option("--tie-layers", help="The language model's layers share weights.")
    ] = False,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 5,
    output: Output = None,
) -> None:
    """Time to the first token and tokens a second, beside transformers' LLaVA."""
    settings = {"new_tokens": new_tokens, "tie_layers": tie_layers}
    bench = Bench(f"answering, {size}", size, device, dtype, repeats, output, **settings)
    subjects = Subjects(size, bench.device, bench.dtype, tie_layers)
    with torch.inference_mode():
        for n in batches(batch, 32 if bench.device.type == "cuda" else 1):
            measure(bench, subjects, n, new_tokens)
    bench.report()


if __name__ == "__main__":
    typer.run(main)
