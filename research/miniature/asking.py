"""When does conditioning on the question help? Variants of the miniature, each trained with and without the question.

A question can only help where the image tokens cannot hold the whole image. The variants therefore differ in the number
of image tokens, in the number of objects, in how the maps are fused, in the guidance scale, in what the prompt is, and
in whether the UNet is trained with the question. Both members of a pair of runs have the same data, seed and number of
steps. Features are computed once ([`~research.miniature.asking_features`]), except those of a trained UNet.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.atomic_files import write_json
from sdllava.evaluation.bootstrap import difference
from sdllava.run_records import begin_run
from sdllava.train.adapters import inject_unet_lora
from sdllava.train.tokens import IGNORED

from .asking_features import Examples, compose, examples
from .loop import Budget, Run, mixed_precision
from .unpack import unpack

_EVAL_BATCH = 100


@dataclass(frozen=True)
class Reader:
    """How a model reads its images.

    Attributes:
        world: A key of `WORLDS`.
        merge: Side of the square of features that make one image token. 8 gives one token per scene.
        fusion: How both maps are fused. "none" has only the diffusion model.
        trains_unet: Whether LoRA on the UNet's cross-attention is trained, too.
    """

    world: str = "scenes"
    merge: int = 8
    fusion: str = "cross_attention"
    trains_unet: bool = False


@dataclass(frozen=True)
class AskingVariant:
    """One row of the table: a reader, and the guidance scales and the prompt of the run with the question.

    The run without the question has the scale 0, or an empty prompt where the UNet is trained.
    """

    reader: Reader = Reader()
    scales: tuple[float, ...] = (1.0,)
    prompt: str = "question"


VARIANTS = {
    "16 tokens": AskingVariant(Reader(merge=2)),
    "4 tokens": AskingVariant(Reader(merge=4)),
    "1 token": AskingVariant(),
    "1 token, s = 2": AskingVariant(scales=(2.0,)),
    "1 token, s = 4": AskingVariant(scales=(4.0,)),
    "1 token, s = 8": AskingVariant(scales=(8.0,)),
    "1 token, both maps": AskingVariant(scales=(0.0, 1.0)),
    "1 token, caption as prompt": AskingVariant(prompt="caption"),
    "1 token, CLIP concatenated": AskingVariant(Reader(fusion="concat")),
    "1 token, only diffusion": AskingVariant(Reader(fusion="none")),
    "nine objects, 9 tokens": AskingVariant(Reader("crowded", 4)),
    "nine objects, 1 token": AskingVariant(Reader("crowded", 12)),
    "nine objects, 1 token, caption as prompt": AskingVariant(Reader("crowded", 12), prompt="caption"),
    "1 token, UNet trained": AskingVariant(Reader(trains_unet=True)),
}


@dataclass(frozen=True)
class AskingBudget:
    """Images of training and of evaluation, and optimizer steps of both stages, of 32 images each."""

    train: int = 10_000
    test: int = 2_000
    align: int = 150
    finetune: int = 500


class AskingPart:
    """A stage of a run, for [`~research.miniature.loop.Run`].

    Args:
        name: "align" (captions) or "finetune" (questions).
        model, processor: Of the run.
        data: What is trained on.
        prompt: One of `PROMPTS`, or "none".
    """

    def __init__(self, name: str, model: Any, processor: Any, data: Examples, prompt: str):
        self.name, self.model, self.processor, self.data, self.prompt = name, model, processor, data, prompt
        model.set_stage(name)
        turns = zip(data.captions if name == "align" else data.questions, data.answers, strict=True)
        self.texts = [
            tokenize(processor, *((None, text) if name == "align" else (text, answer))) for text, answer in turns
        ]

    def loss(self, step: int, batch_size: int) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        rows = torch.randint(len(self.texts), (batch_size,)).tolist()
        with mixed_precision(self.model.device):
            return self.model(**self.inputs(rows)).loss

    def inputs(self, rows: Sequence[int]) -> dict[str, Any]:
        """The model's inputs for some images."""
        found = pad([self.texts[row] for row in rows], self.processor.tokenizer.pad_token_id)
        stored = {name: tensor[rows].float() for name, tensor in self.data.features.items()}
        encodings = {"vision_features": stored["vision"]} if self.model.model.vision_tower is not None else {}
        if hasattr(self.model.model.diffusion_tower.unet, "peft_config"):
            encodings["latents"] = stored["latents"]
            prompts = [self.data.questions[row] if self.prompt == "question" else "" for row in rows]
            found |= self.processor.tokenize_questions(prompts, return_tensors="pt")
        else:
            encodings["unconditional_features"] = stored["unconditional"]
            encodings["conditional_features"] = stored.get(self.prompt, stored["unconditional"])
        return found | {"image_encodings": encodings, "use_cache": False}

    @torch.no_grad()
    def right(self) -> list[bool]:
        """Whether each answer is what greedy decoding would give: every token is the most likely one."""
        self.model.eval()
        verdicts: list[bool] = []
        for start in range(0, len(self.texts), _EVAL_BATCH):
            inputs = self.inputs(range(start, min(start + _EVAL_BATCH, len(self.texts))))
            labels = inputs.pop("labels")[:, 1:]
            with mixed_precision(self.model.device):
                likely = self.model(**inputs).logits[:, :-1].argmax(-1)
            verdicts += ((likely == labels) | (labels == IGNORED)).all(1).tolist()
        return verdicts


def tokenize(processor: Any, question: str | None, answer: str) -> tuple[list[int], list[int]]:
    """Token ids and labels of one turn about an image. Without a question the text is LLaVA's plain template."""
    tokenizer = processor.tokenizer
    image = "<image>" * processor.num_image_tokens
    start = f"{image}\n" if question is None else f"USER: {image}\n{question} ASSISTANT: "
    context = tokenizer(start)["input_ids"]
    target = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return context + target, [IGNORED] * len(context) + target


def pad(texts: Sequence[tuple[list[int], list[int]]], filler: int) -> dict[str, Tensor]:
    """Tokenised texts as tensors, filled at the end."""
    length = max(len(ids) for ids, _ in texts)
    return {
        "input_ids": torch.tensor([ids + [filler] * (length - len(ids)) for ids, _ in texts]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in texts]),
        "labels": torch.tensor([labels + [IGNORED] * (length - len(labels)) for _, labels in texts]),
    }


def build(
    parts: Path, reader: Reader, scales: Sequence[float]
) -> tuple[SDLlavaForConditionalGeneration, SDLlavaProcessor]:
    """The untrained model of a run, and its processor."""
    fields: dict[str, Any] = {
        "fusion": reader.fusion,
        "spatial_merge_size": reader.merge,
        "guidance_scales": list(scales),
    }
    if reader.fusion == "cross_attention":
        fields["fusion_num_attention_heads"] = 6
    model, processor = compose(parts, reader.world, **fields)
    language_model: Any = model.model.language_model
    language_model.set_attn_implementation("eager")  # on a CPU faster in training than the fused kernel
    return model, processor


def answer_questions(out: Path, variant: AskingVariant, asks: bool, seed: int, budget: AskingBudget) -> list[bool]:
    """Train both stages of a run, unless it is finished, and return which test questions it answers correctly.

    Args:
        out: The folder of parts, features and runs.
        variant: The row of the table.
        asks: Whether the diffusion model is conditioned on the question.
        seed: Of initial weights and order.
        budget: The size of the run.

    Raises:
        ValueError: The folder has runs of another size.
    """
    reader = variant.reader
    scales = variant.scales if asks or reader.trains_unet else (0.0,)
    names = [reader.world, reader.merge, reader.fusion, *(["unet"] if reader.trains_unet else [])]
    place = out / "runs" / "-".join(map(str, names)) / f"seed-{seed}"
    run = place / ("-".join([variant.prompt, *map(str, scales)]) if asks else "none")
    begin_run(place / "settings.json", asdict(budget))
    if (run / "right.json").exists():
        return json.loads((run / "right.json").read_text(encoding="utf-8"))
    train, test = (
        examples(out, reader.world, split, count) for split, count in (("train", budget.train), ("test", budget.test))
    )
    torch.manual_seed(seed)
    model, processor = build(out / "parts", reader, scales)
    align = AskingPart("align", model, processor, train, "none")
    Run(align, Budget(budget.align, 32, 2e-3, warmup=20), place / f"align-{len(scales)}", seed).train()
    if reader.trains_unet:
        inject_unet_lora(model, 16, 32)
    prompt = variant.prompt if asks else "none"
    finetune = AskingPart("finetune", model, processor, train, prompt)
    if reader.trains_unet:
        for name, parameter in model.model.diffusion_tower.unet.named_parameters():
            parameter.requires_grad_("lora_" in name)
    Run(finetune, Budget(budget.finetune, 32, 1e-3, warmup=20), run, seed).train()
    right = AskingPart("finetune", model, processor, test, prompt).right()
    write_json(run / "right.json", right)
    return right


def measure(out: str | os.PathLike, names: Sequence[str], seeds: int, budget: AskingBudget) -> dict[str, Any]:
    """Train and evaluate variants, and add them to `asking.json`, the rows of all calls.

    Args:
        out: The folder. Finished runs in it are kept.
        names: Keys of `VARIANTS`.
        seeds: The number of pairs of runs per variant.
        budget: The size of every run.

    Returns:
        `dict`: Per variant [`compare`] of its runs and their budget, in the order of `VARIANTS`.
    """
    out = Path(out)
    unpack(out / "parts")
    file = out / "asking.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in names:
        variant = VARIANTS[name]
        pairs = [
            [answer_questions(out, variant, asks, seed, budget) for asks in (False, True)] for seed in range(seeds)
        ]
        rows[name] = compare(pairs) | {"budget": asdict(budget)}
        rows = {name: rows[name] for name in VARIANTS if name in rows}
        write_json(file, rows)
    return rows


def compare(pairs: Sequence[Sequence[list[bool]]]) -> dict[str, Any]:
    """Accuracy without and with the question over all seeds, and the difference with its 95% interval, in percent.

    Args:
        pairs: By seed, which questions were answered correctly without and with the question.

    Returns:
        `dict`: `without`, `with`, `difference`, `interval`, and the differences `by_seed`.
    """
    units = [
        {str(row): {"right": 100 * mean(verdicts)} for row, verdicts in enumerate(zip(*runs, strict=True))}
        for runs in zip(*pairs, strict=True)
    ]
    found = difference(units[0], units[1], dict, "right")
    levels = [mean(unit["right"] for unit in runs.values()) for runs in units]
    by_seed = [100 * (mean(conditioned) - mean(plain)) for plain, conditioned in pairs]
    return {"without": levels[0], "with": levels[1], "by_seed": by_seed} | {
        name: found[name] for name in ("difference", "interval")
    }
