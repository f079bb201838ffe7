"""Training: samples per second in both stages, with random weights and realistic sequence lengths.

The papers' rates on one H100 are 9.7 samples per second in stage 1 (558k samples in 4 hours on four GPUs) and 4.6 in
stage 2 (665k samples in 10 hours).

    python perf/training.py                        # the papers' sizes; needs a GPU with 80 GiB or more
    python perf/training.py --size mini
    python perf/training.py --lengths lengths.txt  # counted lengths: the text tokens of one sample per line

Weights, gradients and AdamW's moments have one dtype (no float32 copies). The language model's activations are
recomputed. Batches are padded to their longest sample. They hold samples of all lengths, or of similar length as with
`train_sampling_strategy: group_by_length`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import models
import torch
import typer
from measure import DEFAULT_DEVICE, DEFAULT_DTYPE, Bench, Call, Device, DType, Output, Repeats, Size

from sdllava.train.memory import estimate_memory

Stage = Literal["align", "finetune"]

PAPER_RATES: dict[Stage, float] = {"align": 9.7, "finetune": 4.6}
"""Samples per second and GPU (S3, A.1: four H100)."""
ASSUMED_LENGTHS: dict[Stage, tuple[int, float]] = {"align": (20, 0.4), "finetune": (220, 0.7)}
"""Median and log-deviation of the text tokens per sample: an assumption about LCS-558k and LLaVA-Mix-665k."""
LONGEST_TEXT = 1400
"""Limit of text tokens per sample. With 576 image tokens, this stays below LLaVA's limit of 2048."""


def text_lengths(stage: Stage, count: int, given: Path | None) -> list[int]:
    """Lengths of `count` samples, spread evenly over the distribution, shortest first.

    Args:
        stage (`str`): `"align"` or `"finetune"`.
        count (`int`): Number of samples.
        given (`Path`, *optional*): File of counted lengths, one per line. Replaces the assumed distribution.
    """
    if given is not None:
        known = sorted(int(line) for line in given.read_text().split())
        return [min(known[int((i + 0.5) / count * len(known))], LONGEST_TEXT) for i in range(count)]
    median, spread = ASSUMED_LENGTHS[stage]
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)
    return (median * (spread * quantiles).exp()).round().clamp(8, LONGEST_TEXT).int().tolist()


def make_batch(model: Any, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Images, prompts and padded conversations with random contents, one sample per length."""
    config, weight, n = model.config, model.lm_head.weight, len(lengths)
    side, clip_side = config.diffusion_config.image_size, config.vision_config.image_size
    tokens = config.num_image_tokens
    ids = torch.randint(3, config.text_config.vocab_size - 1, (n, tokens + max(lengths)), device=weight.device)
    ids[:, :tokens] = config.image_token_index
    attended = torch.arange(ids.shape[1])[None] < tokens + torch.tensor(lengths)[:, None]
    attended = attended.to(weight.device)
    return {
        "input_ids": ids,
        "attention_mask": attended.long(),
        "labels": ids.masked_fill(~attended | (ids == config.image_token_index), -100),
        "pixel_values": torch.randn(n, 3, clip_side, clip_side).to(weight),
        "diffusion_pixel_values": torch.rand(n, 3, side, side).mul(2).sub(1).to(weight),
        "diffusion_input_ids": torch.randint(1000, 40000, (n, 77), device=weight.device),
        "diffusion_noise_seed": torch.arange(n),
    }


def epoch(model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, torch.Tensor]]) -> Call:
    """One optimizer step per batch."""

    def call() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return call


def check_frozen(model: Any, optimizer: torch.optim.Optimizer) -> str:
    """Checks that frozen weights have neither gradients nor optimizer state.

    Returns:
        `str`: The size of the optimizer state.

    Raises:
        SystemExit: If a frozen weight has a gradient or optimizer state.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if any(p.grad is not None or p in optimizer.state for p in frozen):
        raise SystemExit("A frozen weight has a gradient or optimizer state. This is a defect of sdllava: report it.")
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    return f"moments {sum(x.numel() * x.itemsize for x in moments) / 2**30:.2f} GiB"


def measure_stage(bench: Bench, model: Any, stage: Stage, batch: int, steps: int, lengths: Path | None) -> None:
    """Adds the rows of one stage: batches of all lengths, and batches of similar length."""
    model.set_stage(stage)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0)
    tokens = text_lengths(stage, steps * batch, lengths)
    label = f"{stage}, batches of {batch}"
    groups = {
        label: [make_batch(model, tokens[i::steps]) for i in range(steps)],
        f"{label} by length": [make_batch(model, tokens[i * batch : (i + 1) * batch]) for i in range(steps)],
    }
    calls = {way: epoch(model, optimizer, batches) for way, batches in groups.items()}
    longest = model.config.num_image_tokens + tokens[-1]
    estimate = estimate_memory(model, batch, longest, checkpointing=True)
    bench.remark(f"{label}: estimated memory {estimate.total / 2**30:.2f} GiB")
    for row in bench.time(calls, per_call=len(tokens), reference=label).values():
        rate = len(tokens) / row.median
        row.note = f"{rate:.2f} samples/s, {check_frozen(model, optimizer)}"
        if bench.settings["size"] == "full":
            row.note += f", {rate / PAPER_RATES[stage]:.2f}x the papers' rate on one H100"


def main(
    stage: Annotated[list[str] | None, typer.Option(help="align, finetune; default both.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps per round. They cover the whole range of lengths.")] = 4,
    lengths: Annotated[Path | None, typer.Option(exists=True, help="File of text token counts, one per line.")] = None,
    size: Size = "full",
    device: Device = DEFAULT_DEVICE,
    dtype: DType = DEFAULT_DTYPE,
    repeats: Repeats = 3,
    output: Output = None,
) -> None:
    """Measures whole optimizer steps in samples per second, and the size of the optimizer state."""
    stages: list[Stage] = [known for known in PAPER_RATES if stage is None or known in stage]
    for name in stage or []:
        if name not in PAPER_RATES:
            raise SystemExit(f"--stage {name!r} is not a stage. Use {' or '.join(PAPER_RATES)}.")
    assumed = None if lengths else ASSUMED_LENGTHS
    bench = Bench(f"training, {size}", size, device, dtype, repeats, output, batch=batch, steps=steps, lengths=assumed)
    model = models.build_ours(models.build_llava(size, bench.device, bench.dtype), size).train()
    model.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
    for name in stages:
        measure_stage(bench, model, name, batch, steps, lengths)
    bench.report()


if __name__ == "__main__":
    typer.run(main)
