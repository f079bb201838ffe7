"""Training: samples a second of both stages, with random weights and realistic sequence lengths.

The papers' rates on one H100: 558k samples in 4 hours of four, 9.7 a second and GPU; 665k in 10 hours, 4.6.

    python perf/training.py                        # the papers' sizes; needs a GPU with 80 GiB or more
    python perf/training.py --size mini
    python perf/training.py --lengths lengths.txt  # counted lengths, one number of text tokens a line

Weights, gradients and AdamW's moments are in one dtype (no float32 copies), the language model's activations are
recomputed. Batches are padded to their longest sample: they hold samples of all lengths, or of alike ones, as with
`train_sampling_strategy: group_by_length`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import models
import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Call, Device, DType, Output, Repeats, Size

PAPER_RATES = {"align": 9.7, "finetune": 4.6}
"""Samples a second and GPU (S3, A.1: four H100)."""
ASSUMED_LENGTHS = {"align": (20, 0.4), "finetune": (220, 0.7)}
"""Median and log-deviation of text tokens a sample: an assumption about LCS-558k and LLaVA-Mix-665k, not a count."""
LONGEST_TEXT = 1400
"""Text tokens at most: with 576 of the image, LLaVA's limit of 2048 with some room."""

Stage = Literal["align", "finetune"]


def text_lengths(stage: Stage, count: int, given: Path | None) -> list[int]:
    """Lengths of `count` samples spread evenly over the distribution, shortest first."""
    if given is not None:
        known = sorted(int(line) for line in given.read_text().split())
        return [min(known[int((i + 0.5) / count * len(known))], LONGEST_TEXT) for i in range(count)]
    median, spread = ASSUMED_LENGTHS[stage]
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
    return (median * (spread * quantiles).exp()).round().clamp(8, LONGEST_TEXT).int().tolist()


def make_batch(model: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Images, prompts and padded conversations with random contents."""
    config, weight, n = model.config, model.lm_head.weight, len(lengths)
    side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
    tokens = config.num_image_tokens
    ids = torch.randint(3, config.text_config.vocab_size - 1, (n, tokens + max(lengths)), device=weight.device)
    ids[:, :tokens] = config.image_token_index
    kept = torch.arange(ids.shape[1])[None] < tokens + torch.tensor(lengths)[:, None]
    kept = kept.to(weight.device)
    return {
        "input_ids": ids,
        "attention_mask": kept.long(),
        "labels": ids.masked_fill(~kept | (ids == config.image_token_index), -100),
        "pixel_values": torch.randn(n, 3, clip_side, clip_side).to(weight),
        "diffusion_pixel_values": torch.rand(n, 3, side, side).mul(2).sub(1).to(weight),
        "diffusion_input_ids": torch.randint(1000, 40000, (n, 77), device=weight.device),
        "diffusion_noise_seed": torch.arange(n),
    }


def epoch(model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, torch.Tensor]]) -> Call:
    """One optimizer step on each batch."""

    def call() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return call


def check_frozen(model: Any, optimizer: torch.optim.Optimizer) -> str:
    """That frozen parts hold neither gradients nor optimizer state, and how much the trained ones hold."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if any(p.grad is not None or p in optimizer.state for p in frozen):
        raise SystemExit("a frozen weight holds a gradient or optimizer state")
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    return f"moments {sum(x.numel() * x.itemsize for x in moments) / 2**30:.2f} GiB"


def main(
    stage: Annotated[list[str] | None, typer.Option(help="align, finetune; default both.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps a round, over the whole range of lengths.")] = 4,
    lengths: Annotated[Path | None, typer.Option(exists=True, help="Counted text tokens, one number a line.")] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 3,
    output: Output = None,
) -> None:
    """Samples a second of whole optimizer steps, and what the optimizer holds."""
    assumed = None if lengths else ASSUMED_LENGTHS
    bench = Bench(f"training, {size}", size, device, dtype, repeats, output, batch=batch, steps=steps, lengths=assumed)
    model = models.build_ours(models.build_llava(size, bench.device, bench.dtype), size).train()
    model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    for name in stage or PAPER_RATES:
        if name not in PAPER_RATES:
            raise SystemExit(f"--stage {name!r} is not one of {', '.join(PAPER_RATES)}")
        model.set_stage(name)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
        tokens = text_lengths(name, steps * batch, lengths)
        label = f"{name}, batches of {batch}"
        groups = {
            label: [make_batch(model, tokens[i::steps]) for i in range(steps)],
            f"{label} by length": [make_batch(model, tokens[i * batch : (i + 1) * batch]) for i in range(steps)],
        }
        calls = {way: epoch(model, optimizer, batches) for way, batches in groups.items()}
        for row in bench.time(calls, per_call=len(tokens), reference=label).values():
            rate = len(tokens) / row.median
            row.note = f"{rate:.2f} samples/s, {check_frozen(model, optimizer)}"
            if size == "full":
                row.note += f", {rate / PAPER_RATES[name]:.2f}x the papers' rate on one H100"
        del optimizer, groups, calls
    bench.report()


if __name__ == "__main__":
    typer.run(main)
