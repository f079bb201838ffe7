"""Operation counts on the meta device.

Of the UNet's pass, whole and up to the papers' tap: the upper limit of what stopping there can gain. Of the first token
of an answer. Of one training sample, with the share of a GPU's peak that the targeted rates need.

    python perf/operations.py                     # full size; a minute, without weights in memory
"""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from answering import QUESTION_TOKENS
from features import Subject, unet_calls
from measure import Size, count_gflop
from models import DIFFUSION_MODELS, diffusion_config, model_config
from rich.console import Console
from rich.table import Table
from training import PAPER_RATES, Stage, text_lengths

from sdllava import SDLlavaForConditionalGeneration

META = torch.device("meta")
H100_TFLOPS = 989
"""Dense bfloat16 TFLOP/s of an H100 SXM, from NVIDIA's data sheet."""


def empty_images(config: Any) -> dict[str, torch.Tensor]:
    """The image inputs and the prompt of one sample, as meta tensors."""
    side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
    return {
        "pixel_values": torch.empty(1, 3, clip_side, clip_side, device=META),
        "diffusion_pixel_values": torch.empty(1, 3, side, side, device=META),
        "diffusion_input_ids": torch.empty(1, 77, dtype=torch.long, device=META),
    }


def read_conversation(model: Any, image_features: torch.Tensor, text_tokens: int, last: int) -> torch.Tensor:
    """Runs the language model on image features followed by text.

    Args:
        model (`SDLlavaForConditionalGeneration`): A model on the meta device.
        image_features (`torch.Tensor` of shape `(1, tokens, hidden_size)`): Projected image features.
        text_tokens (`int`): Number of text tokens.
        last (`int`): Number of tokens to compute logits for.

    Returns:
        `torch.Tensor` of shape `(1, last, vocab_size)`: Logits of the last tokens.
    """
    text = model.get_input_embeddings()(torch.empty(1, text_tokens, dtype=torch.long, device=META))
    tokens = torch.cat([image_features, text], dim=1)
    mask = torch.empty(1, 1, tokens.shape[1], tokens.shape[1], device=META)  # transformers' own mask needs values
    hidden_states = model.model.language_model(inputs_embeds=tokens, attention_mask=mask).last_hidden_state
    return model.lm_head(hidden_states[:, -last:])


def first_token(ours: Any, clip_only: Any) -> list[tuple[str, float, float]]:
    """Operations up to the first token.

    Args:
        ours (`SDLlavaForConditionalGeneration`): The whole model on the meta device.
        clip_only (`SDLlavaForConditionalGeneration`): The same model without a diffusion tower.

    Returns:
        `list[tuple[str, float, float]]`: For a first and a follow-up question: its name, the GFLOP of the whole model,
            and the GFLOP with CLIP only.
    """

    def gflop(model: Any, **inputs: Any) -> float:
        def call() -> None:
            features = torch.stack(model.get_image_features(**inputs).pooler_output)
            read_conversation(model, features, QUESTION_TOKENS, last=1)

        return count_gflop(call)[0]

    images = empty_images(ours.config)
    pixels, diffusion_pixels, question = images.values()
    with torch.no_grad():
        cached, clip_cached = ours.encode_images(pixels, diffusion_pixels), clip_only.encode_images(pixels)
        first = gflop(ours, **images), gflop(clip_only, pixel_values=pixels)
        follow_up = (
            gflop(ours, image_encodings=cached, diffusion_input_ids=question),
            gflop(clip_only, image_encodings=clip_cached),
        )
    return [("first question", *first), ("follow-up question", *follow_up)]


def follow_up_with_prefix(model: Any) -> tuple[float, float]:
    """GFLOP up to the first token with `concat_tokens`: of a first question, and of one that continues its prefix.

    Args:
        model (`SDLlavaForConditionalGeneration`): A model with `fusion="concat_tokens"` on the meta device.
    """
    pixels, diffusion_pixels, question = empty_images(model.config).values()
    prefix_tokens = 8 + model.config.question_independent_tokens
    embed = model.get_input_embeddings()
    language_model = model.model.language_model

    def continued(encodings: Any, cache: Any) -> None:
        diffusion = model.model.get_diffusion_tokens(encodings, question)
        text = embed(torch.empty(1, QUESTION_TOKENS - 8, dtype=torch.long, device=META))
        tokens = torch.cat([diffusion, text], dim=1)
        length = tokens.shape[1]
        mask = torch.empty(1, 1, length, prefix_tokens + length, device=META)
        states = language_model(inputs_embeds=tokens, attention_mask=mask, past_key_values=cache).last_hidden_state
        model.lm_head(states[:, -1:])

    def prefix(encodings: Any) -> Any:
        text = embed(torch.empty(1, 8, dtype=torch.long, device=META))
        tokens = torch.cat([text, model.model.get_vision_tokens(encodings)], dim=1)
        mask = torch.empty(1, 1, prefix_tokens, prefix_tokens, device=META)
        return language_model(inputs_embeds=tokens, attention_mask=mask, use_cache=True).past_key_values

    def first() -> None:
        encodings = model.encode_images(pixels, diffusion_pixels)
        continued(encodings, prefix(encodings))

    with torch.no_grad():
        encodings = model.encode_images(pixels, diffusion_pixels)
        cache = prefix(encodings)
        return count_gflop(first)[0], count_gflop(lambda: continued(encodings, cache))[0]


def training_sample(model: Any, stage: Stage, recompute: bool) -> float:
    """GFLOP of a forward and backward pass on one sample of mean length.

    Args:
        model (`SDLlavaForConditionalGeneration`): A model on the meta device.
        stage (`str`): `"align"` or `"finetune"`.
        recompute (`bool`): Whether the language model's activations are recomputed in the backward pass.
    """
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
        read_conversation(model, features, text_tokens, last=text_tokens).sum().backward()

    return count_gflop(call)[0]


def unet_table(size: str, names: Sequence[str]) -> Table:
    """One prompt, and both halves of the guidance: the stock UNet and ours, for each diffusion model."""
    table = Table("GFLOP", "whole UNet", "to the tap", "ratio", "both halves, whole", "ours", "ratio", box=None)
    for name in names:
        subject = Subject(name, size, META, torch.float32, batch=1)
        cells = []
        with torch.inference_mode():
            for halves in (1, 2):
                whole, ours = (count_gflop(call)[0] for call in unet_calls(subject, halves).values())
                cells += [f"{whole:.0f}", f"{ours:.0f}", f"{whole / ours:.2f}"]
        table.add_row(name, *cells)
    return table


def first_token_table(model: Any, clip_only: Any) -> Table:
    """The first token of a first and of a follow-up question, with and without the diffusion tower."""
    table = Table("first token, GFLOP", "ours", "CLIP only", "ratio", box=None)
    for name, gflop, baseline in first_token(model, clip_only):
        table.add_row(name, f"{gflop:.0f}", f"{baseline:.0f}", f"{gflop / baseline:.2f}")
    return table


def prefix_table(model: Any) -> Table:
    """A first question, and one that continues the prefix of its image."""
    table = Table("first token, concat_tokens, GFLOP", "first question", "follow-up question", "ratio", box=None)
    first, follow_up = follow_up_with_prefix(model)
    size = model.config.diffusion_config.grid_size
    table.add_row(f"{size}x{size}", f"{first:.0f}", f"{follow_up:.0f}", f"{follow_up / first:.2f}")
    return table


def training_table(model: Any) -> Table:
    """One training sample of both stages, and the share of an H100's peak at twice the papers' rates."""
    table = Table("training", "activations", "GFLOP per sample", "target", f"of {H100_TFLOPS} TFLOP/s", box=None)
    for stage, paper_rate in PAPER_RATES.items():
        rate = 2 * paper_rate
        for recompute in (False, True):
            gflop = training_sample(model, stage, recompute)
            share = rate * gflop / 1e3 / H100_TFLOPS
            how = "recomputed" if recompute else "stored"
            table.add_row(stage, how, f"{gflop:.0f}", f"{rate} samples/s per GPU", f"{share:.0%}")
    return table


def main(
    size: Size = "full",
    model: Annotated[list[str] | None, typer.Option(help="sd15, sd21, sdxl, for the first table; default all.")] = None,
) -> None:
    """Prints four tables: the UNet, the first token, the first token with a reused prefix, training."""
    console = Console()
    console.print(unet_table(size, model or list(DIFFUSION_MODELS)))
    with META:
        ours = SDLlavaForConditionalGeneration(model_config(size)).eval()
        clip_only = SDLlavaForConditionalGeneration(model_config(size, diffusion_config=None)).eval()
    console.print(first_token_table(ours, clip_only))
    tokens = {"diffusion_config": diffusion_config("sd21", size, grid_size=8 if size == "full" else 2)}
    with META:
        concat_tokens = SDLlavaForConditionalGeneration(model_config(size, fusion="concat_tokens", **tokens)).eval()
    console.print(prefix_table(concat_tokens))
    console.print(training_table(ours))


if __name__ == "__main__":
    typer.run(main)
