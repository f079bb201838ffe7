"""Evaluation on photographs: images prepared between model calls, or one batch ahead in a thread.

Both ways give the same replies.

    python perf/preprocessing.py                   # the embedded miniature
    python perf/preprocessing.py --model MODEL --device cuda
"""

import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measure import DEFAULT_DEVICE, Bench, Call, Device, Output, Repeats
from PIL import Image

from sdllava.evaluation.benchmarks.base import Sample
from sdllava.evaluation.responder import Responder, load_model
from sdllava.evaluation.runner import one_ahead

PHOTOGRAPH = (640, 480)
"""Width and height of COCO's photographs, the source of most benchmarks."""


def photographs(folder: Path, count: int) -> list[Sample]:
    """Writes JPEG files of blurred noise and returns one question per file."""
    draw = torch.Generator().manual_seed(0)
    samples = []
    for i in range(count):
        noise = torch.randint(256, (30, 40, 3), generator=draw, dtype=torch.uint8).numpy()
        Image.fromarray(noise).resize(PHOTOGRAPH, Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=95)
        samples.append(Sample(str(i), "Is it red?", (folder / f"{i}.jpg",), question="Is it red?"))
    return samples


def ways(model: Any, processor: Any, samples: list[Sample], batch: int) -> dict[str, Call]:
    """Both ways to answer all samples. Each call starts without cached images."""
    batches = [samples[start : start + batch] for start in range(0, len(samples), batch)]
    generation = {"do_sample": False, "max_new_tokens": 8}

    def questions(group: list[Sample]) -> list[list[str]]:
        return [[sample.question] for sample in group]

    def in_line() -> list[list[str]]:
        responder = Responder(model, processor)
        return [responder.reply(group, generation, questions(group)) for group in batches]

    def ahead() -> list[list[str]]:
        responder = Responder(model, processor)
        prepared = one_ahead(lambda group: responder.prepare(group, questions(group)), batches)
        return [responder.reply(group, generation, questions(group), prepared=next(prepared)) for group in batches]

    return {f"prepared between calls, batches of {batch}": in_line, f"prepared one ahead, batches of {batch}": ahead}


def main(
    model: Annotated[str, typer.Option(help="An sdllava checkpoint, or any image-text-to-text model.")] = "mini",
    batch: Annotated[int, typer.Option(min=1, help="Questions per batch.")] = 8,
    count: Annotated[int, typer.Option(min=1, help="Number of photographs.")] = 64,
    device: Device = DEFAULT_DEVICE,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    repeats: Repeats = 5,
    output: Output = None,
) -> None:
    """Measures the wall-clock seconds for all photographs."""
    bench = Bench("preprocessing", "given", device, "float32", repeats, output, model=model, wall_clock=True)
    loaded_model, processor = load_model(model, dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder:
        calls = ways(loaded_model, processor, photographs(Path(folder), count), batch)
        bench.time(calls, per_call=count)
    in_line, ahead = (bench.results[name] for name in calls)
    bench.rows[-1].note = "the same replies" if in_line == ahead else "DIFFERENT REPLIES"
    bench.report()


if __name__ == "__main__":
    typer.run(main)
