"""Operations, counted on the meta device: of the UNet's pass, whole and up to the papers' tap, which is what a cut can
gain at most; of an answer's first token; and of a training sample, which tells what share of a GPU the aimed-at rates
take.

    python perf/operations.py                     # full size; takes a minute and no memory
"""

from typing import Any

import torch
import typer
from answering import QUESTION_TOKENS
from features import Subject, unet_calls
from measure import Size, count_gflop
from models import model_config
from rich.console import Console
from rich.table import Table
from training import PAPER_RATES, text_lengths

from sdllava import SDLlavaForConditionalGeneration

META = torch.device("meta")
H100_TFLOPS = 989
"""Dense bfloat16 products of an H100 SXM a second, after NVIDIA's data sheet, 10^12."""


def empty_images(config: Any) -> dict[str, torch.Tensor]:
    """One image and one question, without contents."""
    side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
    return {
        "pixel_values": torch.empty(1, 3, clip_side, clip_side, device=META),
        "diffusion_pixel_values": torch.empty(1, 3, side, side, device=META),
        "diffusion_input_ids": torch.empty(1, 77, dtype=torch.long, device=META),
    }


def read_conversation(model: Any, image_features: torch.Tensor, text_tokens: int, kept: int) -> torch.Tensor:
    """Logits `(1, kept, vocabulary)` of the last tokens of an image's features with text behind them."""
    text = model.get_input_embeddings()(torch.empty(1, text_tokens, dtype=torch.long, device=META))
    tokens = torch.cat([image_features, text], dim=1)
    mask = torch.empty(1, 1, tokens.shape[1], tokens.shape[1], device=META)  # given, as making one needs values
    hidden_states = model.model.language_model(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    return model.lm_head(hidden_states[:, -kept:])


def first_token(ours: Any, clip_only: Any) -> list[tuple[str, float, float]]:
    """Ways to ask: their name, GFLOP of the first token, and what that is with CLIP alone."""

    def gflop(model: Any, **inputs) -> float:
        def call() -> None:
            features = torch.stack(model.get_image_features(**inputs).pooler_output)
            read_conversation(model, features, QUESTION_TOKENS, kept=1)

        return count_gflop(call)[0]

    images = empty_images(ours.config)
    pixels, diffusion_pixels, question = images.values()
    with torch.no_grad():
        kept, clip_kept = ours.encode_images(pixels, diffusion_pixels), clip_only.encode_images(pixels)
        first = gflop(ours, **images), gflop(clip_only, pixel_values=pixels)
        follow_up = (
            gflop(ours, image_encodings=kept, diffusion_input_ids=question),
            gflop(clip_only, image_encodings=clip_kept),
        )
    return [("first question", *first), ("follow-up question", *follow_up)]


def training_sample(model: Any, stage: str, recompute: bool) -> float:
    """GFLOP of a forward and backward pass on a sample of mean length, the language model's activations kept or not."""
    model.train().set_stage(stage)
    language_model = model.model.language_model
    if recompute:
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        language_model.gradient_checkpointing_disable()
    lengths = text_lengths(stage, 1000, None)
    text_tokens = round(sum(lengths) / len(lengths))

    def call() -> None:
        features = torch.stack(model.get_image_features(**empty_images(model.config)).pooler_output)
        read_conversation(model, features, text_tokens, kept=text_tokens).sum().backward()

    return count_gflop(call)[0]


def unet_table(size: str) -> Table:
    """One prompt and both halves of the guidance, stock and ours."""
    table = Table("GFLOP", "whole UNet", "to the tap", "ratio", "both halves, whole", "ours", "ratio", box=None)
    for name in ("sd15", "sd21", "sdxl"):
        subject = Subject(name, size, META, torch.float32, batch=1)
        cells = []
        with torch.inference_mode():
            for halves in (1, 2):
                whole, ours = (count_gflop(call)[0] for call in unet_calls(subject, halves).values())
                cells += [f"{whole:.0f}", f"{ours:.0f}", f"{whole / ours:.2f}"]
        table.add_row(name, *cells)
    return table


def main(size: Size = "full") -> None:
    """Three tables: the UNet, the first token, training."""
    console = Console()
    console.print(unet_table(size))

    with META:
        model = SDLlavaForConditionalGeneration(model_config(size)).eval()
        clip_only = SDLlavaForConditionalGeneration(model_config(size, diffusion_config=None)).eval()
    table = Table("first token, GFLOP", "ours", "CLIP alone", "ratio", box=None)
    for name, gflop, alone in first_token(model, clip_only):
        table.add_row(name, f"{gflop:.0f}", f"{alone:.0f}", f"{gflop / alone:.2f}")
    console.print(table)

    table = Table("training", "activations", "GFLOP a sample", "aimed at", f"of {H100_TFLOPS} TFLOP/s", box=None)
    for stage, paper_rate in PAPER_RATES.items():
        rate = 2 * paper_rate
        for recompute in (False, True):
            gflop = training_sample(model, stage, recompute)
            share = rate * gflop / 1e3 / H100_TFLOPS
            how = "recomputed" if recompute else "kept"
            table.add_row(stage, how, f"{gflop:.0f}", f"{rate} samples/s and GPU", f"{share:.0%}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
