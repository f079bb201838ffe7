"""When does conditioning on the question help? Variants of the miniature, each trained with and without the question.

A question can only help where the image tokens cannot hold the whole image. The variants therefore differ in the number
of image tokens, in how the maps are fused, in the guidance scale, and in whether the UNet is trained with the question.
Both members of a pair of runs have the same parts, data, seed and number of steps.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers import LlamaForCausalLM

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor, mini_path
from sdllava.atomic_files import atomic_path, write_json, write_text
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate_samples, load_samples
from sdllava.miniature.smol import write_parts
from sdllava.train.machine import computes_in_bfloat16
from sdllava.train.run import train

from .scales import TOWER, StageBudget
from .stages import RECIPES, write_scenes

PARTS = {"diffusion": "diffusion", "vision": "clip", "language_model": "llm"}


@dataclass(frozen=True)
class AskingVariant:
    """One row of the table.

    Attributes:
        guidance: The guidance scale of the run with the question. The run without it has scale 0.
        fields: Options of both runs.
    """

    guidance: float = 1.0
    fields: dict[str, Any] = field(default_factory=dict)


def _tokens(merge: int, **changes: Any) -> dict[str, Any]:
    return {"fusion": "cross_attention", "fusion_num_attention_heads": 6, "spatial_merge_size": merge} | changes


VARIANTS = {
    "16 tokens": AskingVariant(fields=_tokens(2)),
    "4 tokens": AskingVariant(fields=_tokens(4)),
    "1 token": AskingVariant(fields=_tokens(8)),
    "1 token, s = 4": AskingVariant(4.0, _tokens(8)),
    "1 token, s = 8": AskingVariant(8.0, _tokens(8)),
    "1 token, concat": AskingVariant(fields={"fusion": "concat", "spatial_merge_size": 8}),
    "1 token, only diffusion": AskingVariant(fields={"fusion": "none", "spatial_merge_size": 8}),
    "1 token, UNet trained": AskingVariant(fields=_tokens(8, unet_lora_r=16)),
}


def write_language_model(folder: Path) -> None:
    """Write the miniature's Llama and its tokenizer as a checkpoint of its own."""
    model = SDLlavaForConditionalGeneration.from_pretrained(mini_path(), dtype=torch.float32)
    llama = LlamaForCausalLM(model.config.text_config)
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.tie_weights()
    llama.save_pretrained(folder)
    processor: Any = SDLlavaProcessor.from_pretrained(mini_path())
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)


def train_run(work: Path, name: str, asks: bool, seed: int, align: StageBudget, finetune: StageBudget) -> Path:
    """Train both stages of one run, unless it is finished.

    Args:
        work: The folder of parts, data and runs.
        name: A key of `VARIANTS`.
        asks: Whether the question is the diffusion model's prompt, in training and in evaluation.
        seed: Of initial weights, order and dropout.
        align, finetune: The budgets of the stages.
    """
    variant = VARIANTS[name]
    output = work / "runs" / f"{name.replace(' ', '-').replace(',', '')}-{'question' if asks else 'none'}-{seed}"
    write_scenes(work / "align.parquet", "captions", align, 0)
    write_scenes(work / "finetune.parquet", "questions", finetune, 0)
    parts = {option: work / "parts" / place for option, place in PARTS.items()}
    if variant.fields["fusion"] == "none":
        del parts["vision"]
    adapter = {"unet_lora_r": variant.fields.get("unet_lora_r", 0)}
    model = {key: value for key, value in variant.fields.items() if key != "unet_lora_r"}
    model |= TOWER | {"guidance_scales": variant.guidance if asks else 0.0}
    stages: Sequence[tuple[str, StageBudget, dict[str, Any]]] = (
        ("align", align, parts | model),
        ("finetune", finetune, {"init_from": output / "align"} | model | adapter),
    )
    for stage, budget, options in stages:
        if (output / stage / "config.json").exists():
            continue
        values = options | {
            "config": RECIPES / f"study-{stage}.yaml",
            "train_data": work / f"{stage}.parquet",
            "output_dir": output / stage,
            "num_train_epochs": budget.epochs,
            "per_device_train_batch_size": budget.batch_size,
            "diffusion_prompt": "question" if asks and stage == "finetune" else "none",
            "bf16": computes_in_bfloat16(),
            "seed": seed,
        }
        train([word for key, value in values.items() for word in (f"--{key}", *_words(value))])
    return output / "finetune"


def measure(
    out: str | os.PathLike,
    names: Sequence[str],
    seeds: int,
    align: StageBudget,
    finetune: StageBudget,
    limit: int | None,
) -> dict[str, Any]:
    """Train and evaluate the variants, and write `asking.json` and `asking.md` after each.

    Args:
        out: The folder. Finished runs in it are kept.
        names: Keys of `VARIANTS`.
        seeds: The number of pairs of runs per variant.
        align, finetune: The budgets of the stages.
        limit: The approximate number of questions to evaluate. None takes all.

    Returns:
        `dict`: Per variant the scores of both kinds of runs by seed, in percent.
    """
    out = Path(out)
    for place, write in (("parts", write_parts), ("parts/llm", write_language_model)):
        if not (out / place).exists():
            with atomic_path(out / place) as written:
                write(written)
    options = EvaluationOptions(limit=limit, batch_size=32)
    benchmark, samples, source = load_samples("mini", options)
    rows: dict[str, Any] = {}
    for name in names:
        rows[name] = {"question": [], "none": []}
        for seed in range(seeds):
            for prompt in rows[name]:
                folder = train_run(out, name, prompt == "question", seed, align, finetune)
                model = LoadedModel.load(os.fspath(folder))
                found = evaluate_samples(model, benchmark, samples, source, folder / "answers", options)
                rows[name][prompt].append(found["scores"])
        write_json(out / "asking.json", rows)
        write_text(out / "asking.md", table(rows))
    return rows


def table(rows: dict[str, Any], metrics: Sequence[str] = ("questions", "pairs", "compositions")) -> str:
    """A Markdown table: the difference that the question makes, in points, with its standard error over the seeds."""
    lines = [
        f"| variant | {' | '.join(metrics)} | without the question |",
        f"|---|{'---|' * (len(metrics) + 1)}",
    ]
    for name, scores in rows.items():
        cells = []
        for metric in metrics:
            pairs = zip(scores["question"], scores["none"], strict=True)
            gains = [with_it[metric] - without[metric] for with_it, without in pairs if metric in with_it]
            error = f" ± {stdev(gains) / len(gains) ** 0.5:.1f}" if len(gains) > 1 else ""
            cells.append(f"{mean(gains):+.1f}{error}" if gains else "")
        level = mean(entry[metrics[0]] for entry in scores["none"])
        lines.append(f"| {name} | {' | '.join(cells)} | {level:.1f} |")
    return "\n".join(lines) + "\n"


def _words(value: Any) -> list[str]:
    return [str(entry) for entry in value] if isinstance(value, list | tuple) else [str(value)]
