"""Captions by a model: pseudo-captions of any benchmark's images, and refinement over several passes (S4 5)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..atomic_files import write_text
from .benchmarks.base import Sample
from .benchmarks.captions import INSTRUCTION, CocoCaptions
from .evaluate import DEFAULT_OPTIONS, EvaluationOptions, LoadedModel, evaluate_samples, load_samples
from .processes import broadcast, process_state
from .responder import has_diffusion
from .results import read_records
from .runner import Progress


def write_pseudo_captions(
    loaded: LoadedModel,
    name: str,
    file: str | Path,
    options: EvaluationOptions = DEFAULT_OPTIONS,
    progress: Progress | None = None,
    after_stage_1: bool | None = None,
) -> int:
    """Caption every image of a benchmark once and write JSON Lines with `image` and `caption`.

    `--captions` and training's `pseudo_captions` read this file. It is written when it is complete. Until then the
    replies are in `FILE.run`, from which the same command resumes.

    Args:
        loaded: The captioning model.
        name: Name of the benchmark.
        file: The file to write.
        options: `diffusion_prompt` must be "question" (the captioning instruction) or "none".
        progress: Called with the number of captioned images and their total.
        after_stage_1: Whether the captioning model has only been aligned, and captions images without an instruction.
            Default: whether the benchmark's protocol is for such models.

    Returns:
        `int`: The number of captions, 0 on other processes than the main one.

    Raises:
        ValueError: `options.diffusion_prompt` has another value.
    """
    if options.diffusion_prompt not in ("question", "none"):
        raise ValueError(
            f"--diffusion-prompt {options.diffusion_prompt!r} cannot be used for captioning. Choose question or none."
        )
    benchmark, samples, source = load_samples(name, options)
    plain = benchmark.template == "plain" if after_stage_1 is None else after_stage_1
    captioner = CocoCaptions("plain" if plain else "default")
    prompt = "" if plain else INSTRUCTION
    images: dict[str, Sample] = {}
    for sample in samples:
        for image, image_id in zip(sample.images, sample.image_ids, strict=True):
            images.setdefault(image_id, Sample(image_id, prompt, (image,), [], prompt, (image_id,)))
    run = Path(f"{file}.run")
    questions = None if options.diffusion_prompt == "question" else {image_id: [""] for image_id in images}
    options = replace(options, protocol=captioner.protocol, blind=False)
    results = evaluate_samples(
        loaded, captioner, list(images.values()), source, run, options, None, progress, questions, score=False
    )
    if not results:
        return 0
    records = read_records(run / "samples.jsonl")
    lines = [json.dumps({"image": r["id"], "caption": r["reply"]}, ensure_ascii=False) + "\n" for r in records]
    write_text(file, "".join(lines))
    shutil.rmtree(run)
    return len(records)


def refine(
    loaded: LoadedModel,
    name: str,
    output: str | Path,
    passes: int,
    options: EvaluationOptions = DEFAULT_OPTIONS,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Several passes over a captioning benchmark, each reply being the diffusion model's prompt in the next pass.

    `options.diffusion_prompt` determines the prompts of the first pass. Every pass is scored.

    Args:
        loaded: The model, with a diffusion tower.
        name: Name of the benchmark.
        output: Folder of the passes' folders `pass-1`, `pass-2`, ...
        passes: At least 2.
        options: Of every pass.
        progress: Called with the number of answered samples and their total, in every pass.

    Returns:
        `list[dict]`: The results of each pass, empty on other processes than the main one.

    Raises:
        ValueError: `passes` is less than 2, or the model has no diffusion tower.
    """
    if passes < 2:
        raise ValueError(f"--passes {passes} is too small for refinement. Use at least 2.")
    if not has_diffusion(loaded.model):
        raise ValueError(f"{loaded.name!r} has no diffusion tower to condition on captions. Leave out --passes.")
    benchmark, samples, source = load_samples(name, options)
    results, questions = [], None
    for number in range(1, passes + 1):
        folder = Path(output) / f"pass-{number}"
        result = evaluate_samples(loaded, benchmark, samples, source, folder, options, None, progress, questions)
        if result:
            results.append(result)
        records = broadcast(read_records(folder / "samples.jsonl") if process_state().is_main_process else None)
        replies = {record["id"]: record["reply"] for record in records}
        questions = {sample.id: [replies[sample.id]] * len(sample.images) for sample in samples}
    return results
