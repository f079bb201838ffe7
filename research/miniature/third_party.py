"""The shipped models, and models with only CLIP, fine-tuned on the training sets of benchmarks that others wrote."""

import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken

from sdllava import SDLlavaForConditionalGeneration, SDLlavaProcessor
from sdllava.atomic_files import atomic_path, write_json
from sdllava.evaluation.benchmarks import get_benchmark
from sdllava.evaluation.benchmarks.base import open_image
from sdllava.evaluation.benchmarks.statements import read_nlvr, read_shapes
from sdllava.evaluation.evaluate import EvaluationOptions, LoadedModel, evaluate_samples, load_samples
from sdllava.run_records import begin_run
from sdllava.train.adapters import merge
from sdllava.train.run import cache, train

from .shapes_scenes import compose_images, explain, name_cell, read_cells
from .stages import RECIPES

Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Task:
    """A benchmark, and how much is trained on its training set.

    Attributes:
        epochs: Passes over the rows, where the whole model is trained.
        every: LoRA is trained once, on one of this many rows.
        protocol: The benchmark's.
    """

    epochs: int
    every: int
    protocol: str = "default"


TASKS = {
    "easy_vqa": Task(10, every=4),
    "shapes": Task(8, every=16, protocol="describe"),
    "nlvr": Task(20, every=1, protocol="even"),
}
_COMPOSED = 3
"""Images per question of SHAPES, where they are composed."""
LORA_LIMIT = 1000
"""Test questions of a model trained by LoRA. All of easy-VQA's would take longer than its training."""


def training_rows(name: str, data: Path | None) -> Iterator[tuple[Any, Turns]]:
    """The images of a benchmark's training set with their questions and answers.

    Args:
        name: A key of `TASKS`.
        data: The folder of SHAPES or NLVR. Where SHAPES has no images for `train.large`, they are composed.
    """
    if name == "easy_vqa":
        yield from _easy_vqa()
    elif name == "nlvr":
        for identifier, _, sentence, label, image in read_nlvr(_folder(name, data)):
            if int(identifier.partition("-")[0]) % 2:  # the benchmark has the even numbers
                yield image, [(f"{sentence.strip()} True or false?", "yes" if label else "no")]
    else:
        folder = _folder(name, data)
        published = (folder / "train.large.input.npy").is_file()
        composed = chain.from_iterable(compose_images(folder, seed=seed) for seed in range(_COMPOSED))
        rows: Iterable[Any] = read_shapes(folder, "train.large") if published else composed
        for source, question, _ in rows:
            image = open_image(source)
            (cells,) = read_cells(np.asarray(image)[None, ..., ::-1])
            yield image, [(f"{question}?", explain([name_cell(cell) for cell in cells], question))]


def _folder(name: str, data: Path | None) -> Path:
    if data is None:
        raise ValueError(f"The data of {name} is not a package. Give its folder with --data.")
    return data


def _easy_vqa() -> Iterator[tuple[Path, Turns]]:
    folder = get_benchmark("easy_vqa").default_folder() / "train/images"
    import easy_vqa

    turns: dict[int, Turns] = defaultdict(list)
    for question, answer, image in zip(*easy_vqa.get_train_questions(), strict=True):
        turns[image].append((question, answer))
    return ((folder / f"{image}.png", questions) for image, questions in turns.items())


def write_training_data(file: Path, name: str, data: Path | None, every: int = 1) -> list[str]:
    """Write one of `every` rows of a training set in TRL's format, a conversation each, and return their texts."""
    import datasets

    rows, texts = [], []
    for source, turns in islice(training_rows(name, data), 0, None, every):
        buffer = io.BytesIO()
        open_image(source).convert("RGB").save(buffer, format="PNG")
        messages = []
        for number, (question, answer) in enumerate(turns):
            content = [*([{"type": "image"}] if number == 0 else []), {"type": "text", "text": question}]
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            texts += [question, answer]
        rows.append({"images": [{"bytes": buffer.getvalue(), "path": None}], "messages": messages})
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    with atomic_path(file) as written:
        table.cast_column("images", datasets.List(datasets.Image())).to_parquet(written)
    return texts


def add_words(source: str | os.PathLike, texts: list[str], target: Path) -> list[str]:
    """Write a model whose tokenizer also knows the words of some texts, with new embeddings.

    Args:
        source: A checkpoint with a word-level tokenizer, as the miniature's.
        texts: The texts.
        target: The folder of the new checkpoint.

    Returns:
        `list`: The added words.
    """
    model = SDLlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    processor: Any = SDLlavaProcessor.from_pretrained(source)
    known = processor.tokenizer.get_vocab()
    words = sorted({word for text in texts for word in re.findall(r"\w+", text.lower())} - known.keys())
    processor.tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in words])
    torch.manual_seed(0)
    model.resize_token_embeddings(len(processor.tokenizer))
    with atomic_path(target) as written:
        model.save_pretrained(written)
        processor.save_pretrained(written)
    return words


def train_and_score(
    out: str | os.PathLike, name: str, base: str | os.PathLike, data: str | os.PathLike | None, seed: int = 0
) -> dict[str, Any]:
    """Fine-tune a checkpoint on the training set of a benchmark, and score it on the benchmark, also with grey images.

    A model with a word-level tokenizer learns the words that it lacks, and is trained as a whole. Others are trained by
    LoRA, with projector and fusion.

    Args:
        out: The folder of the data and the runs. What is finished in it is kept.
        name: A key of `TASKS`.
        base: The checkpoint. Its last folder names the run.
        data: The folder of SHAPES or NLVR.
        seed: Selects the order of the training.

    Returns:
        `dict`: The results of the evaluation.

    Raises:
        FileNotFoundError: The checkpoint, the data or the package is missing.
        ValueError: The folder has a run of another checkpoint with this name, or with another seed.
    """
    folder, task = Path(out) / name, TASKS[name]
    run = folder / Path(base).name
    for needed in ("config.json", "tokenizer.json"):
        if not (Path(base) / needed).is_file():
            raise FileNotFoundError(f"{os.fspath(base)!r} has no {needed}. Give --base the folder of a checkpoint.")
    whole = knows_only_words(base)
    begin_run(run / "settings.json", {"base": str(Path(base).resolve()), "seed": seed} | asdict(task))
    file = folder / ("train.parquet" if whole else "train-lora.parquet")
    texts = file.with_suffix(".json")
    if not texts.exists():
        write_json(texts, write_training_data(file, name, Path(data) if data else None, 1 if whole else task.every))
    if whole and not (run / "base").exists():
        add_words(base, json.loads(texts.read_text(encoding="utf-8")), run / "base")
    if not (run / "trained" / "config.json").exists():
        _train(run, file, task, seed, run / "base" if whole else Path(base), whole)
    options = EvaluationOptions(
        batch_size=32,
        protocol=task.protocol,
        data=os.fspath(data) if data else None,
        limit=None if whole else LORA_LIMIT,
        blind=True,
    )
    benchmark, samples, source = load_samples(name, options)
    model = LoadedModel.load(os.fspath(run / "trained"))
    return evaluate_samples(model, benchmark, samples, source, run / "answers", options)


def knows_only_words(checkpoint: str | os.PathLike) -> bool:
    """Whether a checkpoint has a word-level tokenizer, as the miniature's. Only then are all weights trained."""
    tokenizer = json.loads((Path(checkpoint) / "tokenizer.json").read_text(encoding="utf-8"))
    return tokenizer["model"]["type"] == "WordLevel"


def _train(run: Path, file: Path, task: Task, seed: int, start: Path, whole: bool) -> None:
    trained = run / ("trained" if whole else "adapter")
    options: dict[str, Any] = {
        "config": RECIPES / ("third-party.yaml" if whole else "third-party-lora.yaml"),
        "init_from": start,
        "train_data": file,
        "output_dir": trained,
        "num_train_epochs": task.epochs if whole else 1,
        "seed": seed,
    }
    diffuses = json.loads((start / "config.json").read_text(encoding="utf-8"))["diffusion_config"]
    options |= {} if diffuses else {"diffusion_prompt": "none"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    if diffuses:
        kind = "conditional" if whole else "vision"
        cache(arguments, str(run / "features"), kind=kind, dtype="bfloat16", batch_size=64)
        arguments += ["--feature_cache", str(run / "features")]
    train(arguments)
    if not whole:
        merge(str(trained), str(run / "trained"))
