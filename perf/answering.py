"""Question answering: time to the first token, and decoding speed.

Compares transformers' LLaVA, sdllava with CLIP only, and sdllava. All three share one language model.

    python perf/answering.py                       # Vicuna-7B's size; needs a GPU or 40 GiB of memory
    python perf/answering.py --tie-layers          # the same number of operations, in 9 GiB
    python perf/answering.py --size mini --batch 1 --batch 8
"""

from typing import Annotated, Any

import models
import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Call, Device, DType, Output, Repeats, Row, Size, batches

QUESTION_TOKENS = 48
"""Text tokens of the conversation around the image."""


def text_inputs(config: Any, image_tokens: int, n: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Conversations of random tokens around an image.

    Args:
        config (`SDLlavaConfig`): The model's configuration.
        image_tokens (`int`): Placeholders per conversation.
        n (`int`): Number of conversations.
        device (`torch.device`): Device of the tensors.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask` of shape `(n, QUESTION_TOKENS + image_tokens)`.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.text_config.vocab_size - 1, (n, QUESTION_TOKENS + image_tokens), generator=draw)
    ids[:, 8 : 8 + image_tokens] = config.image_token_index
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


class Subjects:
    """The three models to compare, around one language model.

    Args:
        size (`str`): `"full"` or `"mini"`.
        device (`torch.device`): Device of the weights.
        dtype (`torch.dtype`): Dtype of the weights.
        tie_layers (`bool`): Whether the language model's layers share their weights.
    """

    def __init__(self, size: str, device: torch.device, dtype: torch.dtype, tie_layers: bool = False):
        self.llava = models.build_llava(size, device, dtype, tie_layers)
        self.clip_only = models.build_ours(self.llava, size, diffusion=False)
        self.ours = models.build_ours(self.llava, size)
        self.device, self.dtype = device, dtype

    def ways(self, n: int) -> dict[str, tuple[Any, dict[str, Any]]]:
        """The ways to answer `n` questions: the model and the inputs of `generate`, by name."""
        draw = torch.Generator().manual_seed(0)
        config = self.ours.config
        side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
        pixels = torch.randn(n, 3, clip_side, clip_side, generator=draw).to(self.device, self.dtype)
        diffusion_pixels = torch.rand(n, 3, side, side, generator=draw).mul(2).sub(1).to(self.device, self.dtype)
        ids = torch.tensor([config.diffusion_config.null_input_ids] * n)
        ids[:, 1:20] = torch.randint(1000, 40000, (n, 19), generator=draw)
        question = {"diffusion_input_ids": ids.to(self.device)}
        text = text_inputs(config, config.num_image_tokens, n, self.device)
        images = {"pixel_values": pixels}
        cached = {"image_encodings": self.ours.encode_images(pixels, diffusion_pixels)}
        clip_cached = {"image_encodings": self.clip_only.encode_images(pixels)}
        both_images = {**images, "diffusion_pixel_values": diffusion_pixels}
        return {
            "transformers' LLaVA": (self.llava, {**text, **images}),
            "ours, CLIP only": (self.clip_only, {**text, **images}),
            "ours, CLIP only, cached": (self.clip_only, {**text, **clip_cached}),
            "ours, first question": (self.ours, {**text, **question, **both_images}),
            "ours, follow-up question": (self.ours, {**text, **question, **cached}),
        }


def generation(model: Any, inputs: dict[str, Any], new_tokens: int) -> Call:
    """Greedy decoding of exactly `new_tokens` tokens."""
    length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(**inputs, **length)


def measure(bench: Bench, subjects: Subjects, n: int, new_tokens: int) -> None:
    """Adds the rows of `n` questions per batch: the first token, then the decoding of `new_tokens` more."""
    ways = subjects.ways(n)
    first = bench.time(
        {f"first token, {name}, batch {n}": generation(*way, 1) for name, way in ways.items()},
        reference=f"first token, ours, CLIP only, batch {n}",
        per_call=n,
    )
    follow_up = first[f"first token, ours, follow-up question, batch {n}"]
    follow_up.reference = f"first token, ours, CLIP only, cached, batch {n}"
    whole = bench.time(
        {f"{name}, batch {n}": generation(*way, 1 + new_tokens) for name, way in ways.items()}, per_call=n
    )
    del bench.rows[-len(whole) :]  # the decoding rows hold the difference between both runs
    reference = f"decoding, transformers' LLaVA, batch {n}"
    for start, end in zip(first.values(), whole.values(), strict=True):
        row = Row(f"decoding, {end.name}", reference, per_call=n * new_tokens, memory_gib=end.memory_gib)
        row.seconds = [b - a for a, b in zip(start.seconds, end.seconds, strict=True)]
        row.gflop = end.gflop - start.gflop
        row.note = f"{row.per_call / row.median:.1f} tokens/s"
        bench.rows.append(row)


def main(
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Questions per batch; default 1, on a GPU 1 to 32.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode after the first.")] = 32,
    tie_layers: Annotated[bool, typer.Option("--tie-layers", help="Share the language model's layer weights.")] = False,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 5,
    output: Output = None,
) -> None:
    """Measures time to the first token and decoded tokens per second, compared with transformers' LLaVA."""
    settings = {"new_tokens": new_tokens, "tie_layers": tie_layers}
    bench = Bench(f"answering, {size}", size, device, dtype, repeats, output, **settings)
    subjects = Subjects(size, bench.device, bench.dtype, tie_layers)
    with torch.inference_mode():
        for n in batches(batch, 32 if bench.device.type == "cuda" else 1):
            measure(bench, subjects, n, new_tokens)
    bench.report()


if __name__ == "__main__":
    typer.run(main)
