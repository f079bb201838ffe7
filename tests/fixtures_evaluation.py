"""Fixtures of the evaluation tests: tiny models, and benchmark folders in their published layouts."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [
    "yes",
    "no",
    "A",
    "B",
    "(",
    ")",
    "a",
    "red",
    "blue",
    "dog",
    "cat",
    "photo",
    "of",
    "the",
    "Answer",
    "is",
    "image",
    ".",
    ",",
    "?",
    "one",
    "two",
]


def make_image(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture(scope="session")
def tiny_llava():
    """(model, processor) of transformers' LLaVA, see `make_llava`."""
    return make_llava()


@pytest.fixture(scope="session")
def loaded(tiny_llava):
    """The tiny LLaVA of transformers, without a diffusion tower."""
    from sdllava.evaluation.evaluate import LoadedModel

    return LoadedModel("tiny", None, *tiny_llava)


@pytest.fixture(scope="session")
def ours(composed):
    """This package's own tiny model, with a diffusion tower."""
    from sdllava.evaluation.evaluate import LoadedModel

    return LoadedModel.load(str(composed))


@pytest.fixture(scope="session")
def mmvp_folder(build_once):
    """MMVP with six questions."""
    return build_once("mmvp", write_mmvp)


@pytest.fixture(scope="session")
def blink_folder(build_once):
    """BLINK with two questions per task, the second with two images."""
    return build_once("blink", write_blink)


@pytest.fixture
def simple_tokens(monkeypatch):
    """Caption scores without Java, whose start takes longer than all else."""
    monkeypatch.setattr("sdllava.evaluation.benchmarks.captions.ptb_missing", lambda: "not used in this test")
    monkeypatch.setattr("sdllava.evaluation.tokenization.ptb_missing", lambda: "not used in this test")


@pytest.fixture
def few_resamples(monkeypatch):
    """Bootstraps of 100 resamples, for tests that do not read the intervals' width."""
    monkeypatch.setattr("sdllava.evaluation.bootstrap.REPLICATES", 100)


@pytest.fixture
def few_tokens(monkeypatch):
    """At most four new tokens per reply."""
    from sdllava.evaluation.benchmarks.blink import BLINK
    from sdllava.evaluation.benchmarks.captions import CocoCaptions
    from sdllava.evaluation.benchmarks.llava_bench import LLaVABench
    from sdllava.evaluation.benchmarks.mmvp import MMVP

    for benchmark in (BLINK, CocoCaptions, LLaVABench, MMVP):
        monkeypatch.setattr(benchmark, "max_new_tokens", 4)
    sampling = MMVP.generation.fget
    monkeypatch.setattr(MMVP, "generation", property(lambda self: {**sampling(self), "max_new_tokens": 4}))


def make_llava(intermediate_size=64):
    """A tiny LLaVA of transformers and its processor: 4 tokens per image, deterministic random weights in float32."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=intermediate_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config).eval()
    torch.manual_seed(5)  # replies of four tokens differ between samples
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}"
            "{{ c['text'] }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
        ),
    )
    return model, processor


def write_mmvp(folder, questions=6):
    images = folder / "MMVP Images"
    images.mkdir(parents=True)
    with (folder / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Index", "Question", "Options", "Correct Answer"])
        for number in range(1, questions + 1):
            make_image(number, (30 + number, 24)).save(images / f"{number}.jpg")
            extra = " the dog" * (number % 3)
            answer = "(a)" if number % 2 else "(b)"
            writer.writerow([number, f"Is{extra} one red?", "(a) yes (b) no", answer])
    return folder


def write_parquet(path, rows, image_columns):
    """Rows (dicts with PIL images) as a parquet file with the Hub's image encoding."""
    from datasets import Dataset, Features, Image, List, Value

    features = {}
    for column in rows[0]:
        if column in image_columns:
            features[column] = Image()
        else:
            example = next((row[column] for row in rows if row[column] is not None), "")
            kind = Value("int64") if isinstance(example, int) else Value("string")
            features[column] = List(Value("string")) if isinstance(example, list) else kind
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(path))


def write_naturalbench(folder, groups=3):
    rows = []
    for index in range(groups):
        kind = "yes_no" if index % 2 == 0 else "multiple_choice"
        one, zero = ("Yes", "No") if kind == "yes_no" else ("A", "B")
        rows.append(
            {
                "Index": index,
                "Image_0": make_image(10 * index),
                "Image_1": make_image(10 * index + 1),
                "Question_0": "Is the dog red?",
                "Question_1": "Is the cat blue?",
                "Image_0_Question_0": one,
                "Image_1_Question_0": zero,
                "Image_0_Question_1": zero,
                "Image_1_Question_1": one,
                "Question_Type": kind,
                "Source": "test",
            }
        )
    write_parquet(folder / "data" / "train-00000-of-00001.parquet", rows, ("Image_0", "Image_1"))
    return folder


def write_blink(folder, per_task=2):
    from sdllava.evaluation.benchmarks.blink import TASKS

    for position, task in enumerate(TASKS):
        rows, choices = [], WORDS[position : position + 2]
        for number in range(1, per_task + 1):
            images = {f"image_{k}": make_image(k, (20, 10 * k)) if k <= number else None for k in (1, 2, 3, 4)}
            rows.append(
                {
                    "idx": f"val_{task}_{number}",
                    "question": f"Which one of {task}?",
                    "sub_task": task,
                    **images,
                    "choices": choices,
                    "answer": "(A)",
                    "prompt": f"Which one of {task}?\nSelect from the following choices.\n(A) {choices[0]}\n"
                    f"(B) {choices[1]}\n",
                }
            )
        write_parquet(folder / task / "val-00000-of-00001.parquet", rows, ("image_1", "image_2", "image_3", "image_4"))
    return folder


def write_captions(folder, images=4):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(images):
        make_image(number).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "captions": [f"a red dog number {number}", f"the dog {number} is red"]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_winoground(folder, count=3):
    rows = [
        {
            "id": k,
            "caption_0": f"dog {k} on cat",
            "caption_1": f"cat on dog {k}",
            "image_0": make_image(2 * k),
            "image_1": make_image(2 * k + 1),
        }
        for k in range(count)
    ]
    write_parquet(folder / "data" / "test-0.parquet", rows, ("image_0", "image_1"))
    return folder
